"""A result belongs to its data: a run of changed data is neither taken for finished nor continued."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from msil.errors import ConfigError
from msil.training.experiment import run

from .cases import stop, tiny_config


def edit(root: Path, split: str, before: str, after: str) -> None:
    path = root / "annotations" / f"instances_{split}.json"
    path.write_text(path.read_text().replace(before, after))


@pytest.fixture
def own(tmp_path: Path, shapes: Path) -> Path:
    return shutil.copytree(shapes, tmp_path / "own")


def test_a_finished_run_of_other_data_is_not_the_result(tmp_path: Path, own: Path) -> None:
    config = tiny_config(tmp_path, own, "schedule.epochs=1")
    result = run(config)
    assert run(config)["skipped"]
    content = json.loads((own / "annotations/instances_val.json").read_text())
    content["annotations"].pop()
    (own / "annotations/instances_val.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"was finished on other data \(the annotations of val differ\): set"):
        run(config)
    again = run(tiny_config(tmp_path, own, "schedule.epochs=1", "resume=never"))
    assert "skipped" not in again and again["run_name"] == result["run_name"]
    assert run(config)["data"] == again["data"] != result["data"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("classes", "its classes were circle, square, triangle, cross, and now are disc, square, triangle, cross"),
        ("images", "the images of train differ"),
    ],
)
def test_a_stopped_run_of_other_data_is_not_continued(tmp_path: Path, own: Path, change: str, message: str) -> None:
    config = tiny_config(tmp_path, own, "schedule.epochs=1")
    stop(config, 5)  # in the second step
    if change == "classes":
        for split in ("train", "val"):
            edit(own, split, '"circle"', '"disc"')
    else:
        path = min((own / "train").iterdir())
        path.write_bytes(path.read_bytes() + b"\0")  # behind its end
    with pytest.raises(ConfigError, match=f"cannot be continued on other data: {message}"):
        run(config)
