"""A result belongs to its data: a run of changed data is neither taken for finished nor continued."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from msil.errors import ConfigError
from msil.training.experiment import run

from .cases import stop, tiny_config


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


def test_a_stopped_run_of_other_classes_is_not_continued(tmp_path: Path, own: Path) -> None:
    config = tiny_config(tmp_path, own, "schedule.epochs=1")
    stop(config, 5)  # in the second step
    for path in (own / "annotations").iterdir():
        path.write_text(path.read_text().replace('"circle"', '"disc"'))
    was, now = "circle, square, triangle, cross", "disc, square, triangle, cross"
    message = f"cannot be continued on other data: its classes were {was}, and now are {now}"
    with pytest.raises(ConfigError, match=message):
        run(config)
