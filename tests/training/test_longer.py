"""A run goes on for more epochs; any other change of its settings is refused and costs nothing."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

import msil.main
from msil.checkpoints.load import load_detector
from msil.errors import ConfigError, DataError
from msil.interruption import Interruption
from msil.reporting.groups import key
from msil.runs import read_result
from msil.training.build import build
from msil.training.experiment import run
from msil.training.faults import FiniteSteps
from msil.training.start import start_lines

from .cases import assert_same_run, folder, load, rows, stop, tiny_config

EVEN = ("schedule.decay=step", "schedule.milestones=[]", "run_name=mine")


def test_more_epochs_go_on_as_if_they_had_been_set_at_once(
    tmp_path: Path, shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the lr is the same under both."""
    whole = tiny_config(tmp_path / "whole", shapes, *EVEN)
    short, long = (tiny_config(tmp_path, shapes, *EVEN, f"schedule.epochs={epochs}") for epochs in (1, 2))
    run(whole)
    first = run(short)
    result = run(long)
    assert_same_run(long, whole)
    assert result["continued"] == [{"epochs": 1, "steps": 4}] and first["continued"] == []
    before = json.loads((folder(long) / "result-1-epochs.json").read_text())
    assert (before["epochs"], before["metrics"]["AP"]) == (1, first["metrics"]["AP"])
    assert run(long)["skipped"]
    again = run(short)  # as a sweep of it does
    assert again["skipped"] and (again["epochs"], again["steps"], again["metrics"]["AP"]) == (
        1,
        4,
        first["metrics"]["AP"],
    )
    for config, newer in ((short, True), (long, False)):
        capsys.readouterr()
        msil.main.run(config)
        assert ("these are the numbers in result-1-epochs.json" in capsys.readouterr().out) is newer
    # It is no row of runs that had all of their epochs planned from the start.
    own, other = (read_result(folder(config)) for config in (long, whole))
    assert own is not None and other is not None and key(own) != key(other)


def test_without_its_optimizer_s_state_a_finished_run_does_not_go_on(tmp_path: Path, shapes: Path) -> None:
    one = tiny_config(tmp_path, shapes, *EVEN, "schedule.epochs=1", "trainer.keep_optimizer=false")
    run(one)
    assert load(folder(one) / "checkpoints" / "last.ckpt")["optimizer_states"] == []
    assert run(one)["skipped"]
    load_detector(folder(one))
    with pytest.raises(ConfigError, match=r"has no optimizer state .*model\.weights=\S+mine, with another run_name"):
        run(tiny_config(tmp_path, shapes, *EVEN, "schedule.epochs=2"))
    assert read_result(folder(one)) is not None


def test_the_lr_is_that_of_the_longer_schedule_from_the_first_step_on(
    tmp_path: Path, shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run that was stopped after 3 of its 8 steps, and is stopped again under the longer one."""
    short, long = (tiny_config(tmp_path, shapes, "run_name=mine", f"schedule.epochs={epochs}") for epochs in (2, 3))
    stop(short, 13)  # while a fourth step's first image is read,
    stop(long, 9)  # and two steps later
    result = run(long)
    assert result["steps"] == 12 and result["continued"] == [{"epochs": 2, "steps": 3}]
    planned = [*((step, 8) for step in range(3)), *((step, 12) for step in range(3, 12))]
    expected = [0.001 * (1 + math.cos(math.pi * step / steps)) for step, steps in planned]
    assert [float(row["lr"]) for row in rows(folder(long)) if "lr" in row] == pytest.approx(expected, rel=1e-12)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("longer")]
    # (1 + cos(pi / 4)) / 2 of 0.002; and (1 + cos(2 pi / 8)) / 2 of it was the last one.
    way = "half a cosine over 3 epochs"
    assert lines == [f"longer  3 epochs in place of 2, 9 steps to go; lr 0.0017 from here on, 0.0017 before: {way}"]


def test_what_does_not_continue_a_run_says_what_differs(finished_once: Path, shapes: Path) -> None:
    before = {path: path.read_bytes() for path in finished_once.rglob("*") if path.is_file() and path.name != ".lock"}
    fewer = "(schedule.epochs: 2 -> 1): give its own ("
    refused = {
        ("schedule.epochs=1",): fewer,
        ("schedule.epochs=4", "seed=1"): "(schedule.epochs: 2 -> 4, seed: 0 -> 1)",
        ("schedule.epochs=4", "resume=never"): "(schedule.epochs: 2 -> 4)",
        ("trainer.precision=bf16-mixed",): "(trainer.precision: 32-true -> bf16-mixed)",
    }
    for words, part in refused.items():
        with pytest.raises(ConfigError) as caught:
            run(tiny_config(finished_once.parent, shapes, "run_name=mine", *words))
        assert f"mine holds a run with other settings {part}" in str(caught.value)
    many = ("data.flip=0", "seed=1", "schedule.lr=1", "schedule.ema=0.9", "model.msil.apply=cls", "schedule.gamma=1")
    with pytest.raises(ConfigError) as caught:
        run(tiny_config(finished_once.parent, shapes, "run_name=mine", *many))
    assert str(caught.value).count(" -> ") == 5 and " and 1 more): give" in str(caught.value)
    after = {path: path.read_bytes() for path in finished_once.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before


def test_a_start_names_the_run_that_it_would_continue(finished_once: Path, shapes: Path) -> None:
    for words, hints in (
        (("schedule.epochs=3",), ["hint    mine has 2 epochs of this: run_name=mine continues it"]),
        (("schedule.epochs=3", "seed=1"), []),
    ):
        config = tiny_config(finished_once.parent, shapes, "run_name=other", *words)
        parts = build(config, finished_once.parent / "other", Interruption(), FiniteSteps())
        assert [line for line in start_lines(parts) if line.startswith("hint")] == hints


def test_a_run_of_so_many_steps_has_no_more_epochs(tmp_path: Path, shapes: Path) -> None:
    ended = (*EVEN, "schedule.max_steps=2")
    run(tiny_config(tmp_path, shapes, *ended))
    with pytest.raises(ConfigError, match=r"It ends by schedule\.max_steps=2, so more epochs do not continue it"):
        run(tiny_config(tmp_path, shapes, *ended, "schedule.epochs=9"))


def test_more_epochs_on_changed_data_are_refused_and_cost_nothing(tmp_path: Path, shapes: Path) -> None:
    own = shutil.copytree(shapes, tmp_path / "own")
    run(tiny_config(tmp_path, own, *EVEN, "schedule.epochs=1"))
    kept = {name: (tmp_path / "mine" / name).read_bytes() for name in ("config.yaml", "result.json")}
    picture = min((own / "train").iterdir())
    picture.write_bytes(picture.read_bytes() + b"\0")  # behind its end
    with pytest.raises(ConfigError, match="cannot be continued on other data: the images of train differ"):
        run(tiny_config(tmp_path, own, *EVEN))
    assert {name: (tmp_path / "mine" / name).read_bytes() for name in kept} == kept


def test_a_refused_start_leaves_no_folder(tmp_path: Path, shapes: Path) -> None:
    config = tiny_config(tmp_path, shapes, "run_name=mine", "data.train_split=nosuch")
    with pytest.raises(DataError):
        run(config)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "console.log").touch()  # a sweep's, which names it
    with pytest.raises(DataError):
        run(config)
    assert (tmp_path / "mine" / "console.log").exists()
    # Of a start that was killed: there is nothing to continue, whatever its settings.
    (tmp_path / "mine" / "console.log").unlink()
    (tmp_path / "mine" / "config.yaml").write_text("# settings 01234567\nmode: train\n")
    assert run(tiny_config(tmp_path, shapes, "run_name=mine", "schedule.epochs=1"))["steps"] == 4


@pytest.fixture
def finished_once(tmp_path: Path, shapes: Path) -> Path:
    run(tiny_config(tmp_path, shapes, "run_name=mine"))
    return tmp_path / "mine"
