"""`msil runs` and `msil compare`, on made-up runs whose numbers are known."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import yaml
from tests.training.cases import tiny_config

from msil import cli
from msil.config import plain
from msil.errors import ConfigError
from msil.finished import title
from msil.metrics.matching import match_coco
from msil.metrics.precision import per_class
from msil.reporting.own_runs import runs_tables
from msil.reporting.tables import to_text

from .cases import METRICS, result
from .made_runs import evaluated, write_runs


def write(runs: Path, name: str, ap: float | None, **changes: object) -> None:
    made = result(name, metrics={**METRICS, "AP": ap}, data={"train_split": "train", "val_split": "val"})
    data = changes.pop("of_data", {})
    made["config"]["data"] |= data  # pyright: ignore[reportOperatorIssue]
    (runs / name).mkdir(parents=True)
    (runs / name / "result.json").write_text(json.dumps({**made, **changes}))


def test_runs_are_listed_best_first_by_what_they_were_scored_on(tmp_path: Path) -> None:
    write(tmp_path, "second", 0.42)
    write(tmp_path, "best", 0.5, epochs=24, continued=[{"epochs": 12, "steps": 96}])
    write(tmp_path, "none", None)
    write(tmp_path, "own", 0.99, of_data={"val_split": "train"})
    of_voc = {**METRICS, "AP": 0.9, "VOC_AP": 0.1}
    write(tmp_path, "voc", 0.9, metrics=of_voc, of_data={"name": "voc", "root": "/a/cells"})
    write(tmp_path, "voc2", 0.1, metrics={**of_voc, "VOC_AP": 0.2}, of_data={"name": "voc", "root": "/a/cells"})
    # A split of the name that its detector was trained on, of other data.
    write(tmp_path, "other", 0.3, seen=False, of_data={"val_split": "train", "root": "/a/other"})
    shapes, voc, other, own = runs_tables(tmp_path)
    assert other.caption == "shapes, 100 images of train."
    assert [row["run"] for row in shapes.rows] == ["best", "second", "none"]
    assert [row["epochs"] for row in shapes.rows] == ["12->24", "12", "12"] and shapes.notes
    assert shapes.caption == "shapes, 100 images of val."
    assert [row["run"] for row in voc.rows] == ["voc2", "voc"] and voc.caption.startswith("voc (cells), ")
    assert [column.title for column in voc.columns[:3]] == ["VOC AP", "AP", "AP50"]
    assert [row["run"] for row in own.rows] == ["own"] and "it says nothing of other images" in own.caption
    assert max(map(len, to_text(shapes).splitlines())) <= 80
    digests = {split: {"images": "1f", "annotations": split} for split in ("train", "train2017")}
    write(tmp_path / "b", "alike", 0.9, data=digests, of_data={"val_split": "train2017"})  # under another name
    assert "on which these runs were trained" in runs_tables(tmp_path / "b")[0].caption


def test_long_names_go_below_their_numbers(tmp_path: Path) -> None:
    for name, ap in (("a" * 60, 0.5), ("b" * 60, 0.4)):
        write(tmp_path, name, ap)
    lines = to_text(runs_tables(tmp_path)[0]).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.strip() for line in lines[5:8:2]] == ["a" * 60, "b" * 60]
    assert lines[4].startswith("50.0") and lines[6].startswith("40.0")


def test_a_wider_run_is_told_by_its_channels(tmp_path: Path) -> None:
    for name, channels in (("usual", 64), ("wide", 96)):
        write(tmp_path, name, 0.5)
        result = json.loads((tmp_path / name / "result.json").read_text())
        result["config"]["model"]["channels"] = channels
        (tmp_path / name / "result.json").write_text(json.dumps(result))
    (table,) = runs_tables(tmp_path)
    assert {row["run"]: row["also"] for row in table.rows} == {"usual": "channels=64", "wide": "channels=96"}


def test_images_that_were_held_out_are_of_no_split_and_not_trained_on(tmp_path: Path) -> None:
    """Though the split that they are of has the digests of the trained part."""
    fraction = {"name": "coco", "root": "/a/pets", "train_split": "train", "val_split": "val2017", "val_fraction": 0.2}
    digests = {"images": "1f", "annotations": "2e"}
    write(tmp_path, "held", 0.5, of_data=fraction, data={"train": digests, "val2017": digests})
    assert runs_tables(tmp_path)[0].caption == "coco (pets), 100 held-out images."


def test_runs_of_other_classes_are_no_contest(tmp_path: Path) -> None:
    """Nor is their order one: [dog,cat] are the classes of [cat,dog]."""
    write(tmp_path, "all", 0.1, classes=["cat", "cow", "dog"])
    write(tmp_path, "by name", 0.05, classes=["cow", "cat", "dog"], of_data={"classes": ["cow", "cat", "dog"]})
    for name, classes in (("two", ["cat", "dog"]), ("turned", ["dog", "cat"]), ("one", ["pet"])):
        write(tmp_path, name, 0.5, classes=classes, of_data={"classes": {"cat": "pet"} if name == "one" else classes})
    found = {table.caption: [row["run"] for row in table.rows] for table in runs_tables(tmp_path)}
    images = "shapes, 100 images of val"
    assert found == {
        f"{images}, classes cat, dog.": ["turned", "two"],
        f"{images}.": ["all", "by name"],
        f"{images}, classes pet.": ["one"],
    }


def test_a_test_is_of_a_run_and_has_no_epochs(tmp_path: Path) -> None:
    """Its schedule is that of no training, so it is not told apart by it."""
    write(tmp_path, "mine", 0.5)
    write(tmp_path, "tested", 0.4)
    path = tmp_path / "tested" / "result.json"
    tested = json.loads(path.read_text())
    tested["config"] |= {"mode": "test", "schedule": {"name": "1x", "epochs": 12, "lr": 9.0}}
    tested["config"]["model"]["weights"] = "runs/mine/checkpoints/last.ckpt"
    path.write_text(json.dumps(tested | {"epochs": 0}))
    (table,) = runs_tables(tmp_path)
    lines = to_text(table).splitlines()[4:6]
    assert lines[0].endswith("mine") and lines[1].endswith("tested  test of mine") and "  -  " in lines[1]
    (tmp_path / "smaller").mkdir()
    tested["config"]["data"]["min_size"] = 64
    (tmp_path / "smaller" / "result.json").write_text(json.dumps(tested | {"run_name": "smaller", "epochs": 0}))
    words = {row["run"]: row["also"] for row in runs_tables(tmp_path)[0].rows}
    assert words["smaller"] == "test of mine, min_size=64" and words["tested"].startswith("test of mine, min_size=")
    with pytest.raises(ConfigError, match=f"it is a run itself, so name {tmp_path}"):
        runs_tables(tmp_path / "smaller")


def test_unfinished_runs_have_their_step(tmp_path: Path) -> None:
    nobody = 2**22 + 1  # beyond the largest pid there is
    for name, pid in (("going", os.getpid()), ("nan", nobody), ("stopped", nobody)):
        values = plain(tiny_config(tmp_path, "data", "schedule.epochs=7", f"run_name={name}"))
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"{title(values)}\n{yaml.safe_dump(values, sort_keys=False)}")
        (tmp_path / name / ".lock").write_text(f"pid {pid} on host {socket.gethostname()} since 2026-01-01")
    (tmp_path / "going" / "metrics.csv").write_text("epoch,step,loss\n0,3,1.5\n1,9,\n")
    (tmp_path / "nan" / "metrics.csv").write_text("epoch,step,diverged,loss,loss_cls\n0,3,,1.5,1.5\n0,4,1,,nan\n")
    (table,) = runs_tables(tmp_path)
    going, diverged, stopped = table.rows
    assert diverged == {"step": 5, "epoch": "1 of 7", "state": "diverged", "run": "nan"}
    assert going == {"step": 10, "epoch": "2 of 7", "state": f"running, pid {os.getpid()}", "run": "going"}
    assert stopped == {"step": 0, "epoch": "0 of 7", "state": "stopped", "run": "stopped"}
    with pytest.raises(ConfigError, match="is no folder"):
        runs_tables(tmp_path / "nowhere")


def test_two_runs_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of detections moved by 3 pixels, and by 1."""
    plain_run, _, msil_run, *_ = write_runs(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", plain_run["run_name"], f"runs/{msil_run['run_name']}/"]) == 0
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    assert ["model.msil.apply", "none", "both"] in lines
    one, other = (100 * run["metrics"]["AP"] for run in (plain_run, msil_run))
    (ap,) = [line for line in lines if line[:1] == ["AP"] and "[" in "".join(line)]
    assert ap[1:4] == [f"{one:.1f}", f"{other:.1f}", f"{other - one:+.1f}"]
    assert "The interval leaves out 0: on such images B is better" in text
    expected = per_class(match_coco(evaluated(3.0, 3000)), "AP")
    for name, value in zip(("circle", "square"), expected, strict=True):
        (line,) = [line for line in lines if line[:1] == [name]]
        assert line[1] == f"{100 * value:.1f}"
    again = tmp_path / "runs" / "again"
    shutil.copytree(tmp_path / "runs" / plain_run["run_name"], again)
    text = (again / "result.json").read_text()
    longer = {**json.loads(text), "continued": [{"epochs": 1, "steps": 8}, {"epochs": 6, "steps": 48}]}
    for content, difference in ((text, "No setting differs."), (json.dumps(longer), "from 1 epoch, 6 epochs")):
        (again / "result.json").write_text(content)
        assert cli.main(["compare", plain_run["run_name"], "again"]) == 0
        text = capsys.readouterr().out
        assert difference in text and "The interval holds 0" in text
    assert cli.main(["compare", "again", "runs/again/"]) == 2
    assert capsys.readouterr().err == "error: A and B are one run, runs/again: name another one.\n"
    (tmp_path / "runs" / msil_run["run_name"] / "evaluation.npz").unlink()
    assert cli.main(["compare", plain_run["run_name"], msil_run["run_name"]]) == 0
    assert "No interval: " in capsys.readouterr().out
    (again / "result.json").write_text("{")
    assert cli.main(["compare", plain_run["run_name"], "again"]) == 2
    assert "again/result.json is damaged or incomplete" in capsys.readouterr().err
    for name, end in (("nosuch", "msil runs lists them.\n"), ("runs/agian", "lists them. Did you mean again?\n")):
        assert cli.main(["compare", plain_run["run_name"], name]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"error: {name} is no finished run: give its folder") and told.endswith(end)
