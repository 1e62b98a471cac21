"""result.json: whole or not at all, and refused where it is not a finished run's."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tests.reporting.cases import result

from msil.errors import ConfigError, quoted
from msil.explain import parse
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


def write(folder: Path, content: Any) -> Path:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / "result.json").write_bytes(text)
    return folder


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


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    write_json(
        tmp_path / "a.json", {"AP": nan, "deep": [1.5, (inf, -inf), {"x": nan}], "text": "NaN", "n": 3, "b": True}
    )
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "AP": None, "deep": [1.5, [None, None], {"x": None}], "text": "NaN", "n": 3, "b": True,
    }  # fmt: skip
    assert text.endswith("}\n")


def test_fractions_keep_every_digit(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"AP": 0.1 + 0.2})
    assert json.loads((tmp_path / "a.json").read_text())["AP"] == 0.1 + 0.2


def test_text_is_utf8(tmp_path: Path) -> None:
    write_json(tmp_path / "result.json", result(classes=["žába", "猫"]))
    found = read_result(tmp_path)
    assert found is not None and found["classes"] == ["žába", "猫"]


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


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_not_finished(tmp_path: Path, share: float) -> None:
    text = json.dumps(result()).encode()
    assert read_result(write(tmp_path, text[: int(share * len(text))])) is None


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"null", b"[]", b"3", b'"finished"', b"{}", b'{"status": "finished"}']
)
def test_a_foreign_file_is_not_finished(tmp_path: Path, content: bytes) -> None:
    assert read_result(write(tmp_path, content)) is None
    assert not is_finished(tmp_path, "1a2b3c4d")


@pytest.mark.parametrize("status", ["running", "failed", None])
def test_an_unfinished_run_is_not_finished(tmp_path: Path, status: str | None) -> None:
    assert read_result(write(tmp_path, result(status=status))) is None


@pytest.mark.parametrize("key", REQUIRED_KEYS)
def test_every_required_key_is_required(tmp_path: Path, key: str) -> None:
    less = result()
    del less[key]
    assert read_result(write(tmp_path, less)) is None


@pytest.mark.parametrize("change", [{"metrics": None}, {"metrics": [0.4]}, {"config": "hash"}])
def test_metrics_and_config_must_be_objects(tmp_path: Path, change: dict[str, Any]) -> None:
    assert read_result(write(tmp_path, {**result(), **change})) is None


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


def test_values_are_quoted_as_hydra_reads_them() -> None:
    for value in ({"traffic light": "a, b", "a:b": "c"}, ["x y", "it's"], {"train": "/a b/c.json"}, 0.2, "plain"):
        assert parse(f"data.classes={quoted(value)}").value() == value
