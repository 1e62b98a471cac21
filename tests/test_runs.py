"""result.json: whole or not at all, and refused where it is not a finished run's."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tests.reporting.cases import result

from msil.errors import ConfigError
from msil.runs import (
    REQUIRED_KEYS,
    data_title,
    is_finished,
    read_result,
    read_results,
    weights_file,
    write_bytes,
    write_json,
)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"  # made as needed
    write_json(run / "result.json", result())
    assert read_result(run) == result()
    assert read_result(str(run)) == result()
    assert is_finished(run, "1a2b3c4d")
    assert not is_finished(run, "1a2b3c4e")
    assert [path.name for path in run.iterdir()] == ["result.json"]


def test_a_run_is_named_by_its_folder_or_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    last = Path("runs/one/checkpoints/last.ckpt")
    write_bytes(last, b"")
    assert weights_file("one") == weights_file("runs/one") == last
    assert weights_file(last) == last and weights_file("two") == Path("two")
    write_json(tmp_path / "runs" / "one" / "result.json", result())
    with pytest.raises(ConfigError, match=r"no finished run is in \.: they are in runs"):
        read_results(".")


def test_numbers_keep_every_digit_and_those_that_json_lacks_become_null(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    written = {"AP": nan, "deep": [0.1 + 0.2, (inf, -inf), {"x": nan}], "text": "NaN 猫", "n": 3, "b": True}
    write_json(tmp_path / "a.json", written)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == {
        "AP": None, "deep": [0.1 + 0.2, [None, None], {"x": None}], "text": "NaN 猫", "n": 3, "b": True,
    }  # fmt: skip
    assert text.endswith("}\n")


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"new": Path("x")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_write_leaves_the_old_file_and_no_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, error: BaseException
) -> None:
    write_bytes(tmp_path / "a.bin", b"old")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, broken, fail)
    for path in (tmp_path / "a.bin", tmp_path / "b.bin"):
        with pytest.raises(type(error)):
            write_bytes(path, b"new")
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_the_old_file_is_whole_until_the_new_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes(tmp_path / "a.bin", b"old")
    replace, seen = os.replace, []

    def look(source: Path, target: Path) -> None:
        seen.append((Path(source).read_bytes(), Path(target).read_bytes(), Path(source).parent == Path(target).parent))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    write_bytes(tmp_path / "a.bin", b"newer")
    assert seen == [(b"newer", b"old", True)]
    assert (tmp_path / "a.bin").read_bytes() == b"newer"


def test_a_folder_in_the_way_stays(tmp_path: Path) -> None:
    (tmp_path / "a" / "inner").mkdir(parents=True)
    with pytest.raises(OSError):
        write_bytes(tmp_path / "a", b"new")
    assert os.listdir(tmp_path) == ["a"] and os.listdir(tmp_path / "a") == ["inner"]


def test_nothing_there_is_not_finished(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        assert read_result(folder) is None
        assert not is_finished(folder, "1a2b3c4d")
    (tmp_path / "result.json").mkdir()
    assert read_result(tmp_path) is None


WHOLE = json.dumps(result()).encode()
UNFINISHED = {
    **{f"cut at {share}": WHOLE[: int(share * len(WHOLE))] for share in (0.0, 0.3, 0.9, 0.999)},
    **{str(content): content for content in (b"\xff\xfe", b"null", b"[]", b"3", b'"finished"', b"{}")},
    **{f"status {status}": result(status=status) for status in ("running", "failed", None)},
    **{f"no {key}": {name: value for name, value in result().items() if name != key} for key in REQUIRED_KEYS},
    **{str(change): {**result(), **change} for change in ({"metrics": None}, {"metrics": [0.4]}, {"config": "hash"})},
}


@pytest.mark.parametrize("content", UNFINISHED.values(), ids=UNFINISHED)
def test_what_is_no_whole_result_is_not_finished(tmp_path: Path, content: Any) -> None:
    (tmp_path / "result.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    assert read_result(tmp_path) is None
    assert not is_finished(tmp_path, "1a2b3c4d")


def test_a_sets_own_name_stands_in_a_runs_name() -> None:
    """At the places of conf/data, and for made shapes, the layout's does, as ever."""
    for data, title in (
        ({"name": "coco", "root": "data/coco"}, "coco"),
        ({"name": "voc", "root": "data/VOCdevkit/VOC2012/"}, "voc"),
        ({"name": "shapes", "root": "/tmp/elsewhere"}, "shapes"),
        ({"name": "auto", "root": "/home/me/my pets (2)/"}, "my-pets-2"),
        ({"name": "yolo", "root": "/"}, "yolo"),
        ({"name": "coco", "root": "data/coco", "title": "pets/v2"}, "pets-v2"),
        ({"name": "coco", "root": "/sets/pets/images", "annotations": "/sets/pets/a.json"}, "pets"),
        ({"name": "coco", "root": "pets/images", "annotations": {"train": "pets/json/a.json"}}, "pets"),
        ({"name": "coco", "root": "data/coco/images", "annotations": "data/coco/a.json"}, "coco"),
        ({"name": "coco", "root": "/sets/pets", "annotations": "/labels/a.json"}, "pets"),
        ({"name": "coco", "root": "/sets/pets", "annotations": "/sets/pets/a.json"}, "pets"),
    ):
        assert data_title(data) == title
