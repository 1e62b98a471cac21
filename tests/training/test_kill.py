"""kill -9 at random moments: the same command goes on as if nothing had happened, to the last bit."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from msil.config import Config
from msil.data.shapes import write_shapes
from msil.runs import read_result
from msil.training.experiment import run

from .cases import assert_same, load, rows, tiny_config
from .killing import kill_at_random, killed_itself, started

# About 40 images in batches of 4; evaluated in every second epoch.
SETTINGS = ("data.num_train=44", "data.batch_size=4", "schedule.eval_every=2", "trainer.save_every=1")


@pytest.fixture(scope="module")
def forty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("forty") / "shapes", num_train=44, num_val=8, image_size=64, seed=0)


def folder(config: Config) -> Path:
    return Path(config.runs_dir) / config.run_name


def killed_and_resumed(config: Config, kills: int, seed: int) -> list[int]:
    """Kills the run so many times, lets it end, and tells after which steps it was killed."""
    dice = random.Random(seed)
    last = folder(config) / "checkpoints" / "last.ckpt"
    steps = []
    for _ in range(kills):
        kill_at_random(started(config), last, dice)
        steps.append(load(last)["global_step"])
    run(config)
    return steps


def assert_same_run(ours: Config, theirs: Config) -> None:
    """The weights, the optimizer's state, the numbers of every step and the result are the same, bit for bit."""
    our_last, their_last = (load(folder(config) / "checkpoints" / "last.ckpt") for config in (ours, theirs))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        assert_same(our_last[part], their_last[part], part)
    assert_same(*(load(folder(c) / "checkpoints" / "best.ckpt")["state_dict"] for c in (ours, theirs)))
    our_rows, their_rows = (
        [{key: value for key, value in row.items() if key != "images_per_second"} for row in rows(folder(config))]
        for config in (ours, theirs)
    )
    assert our_rows == their_rows
    our_result, their_result = read_result(folder(ours)), read_result(folder(theirs))
    assert our_result is not None and their_result is not None
    for name in ("metrics", "steps", "epochs"):
        assert our_result[name] == their_result[name]


@pytest.mark.parametrize(
    ("workers", "kills", "epochs"),
    [
        (0, 3, 2),
        pytest.param(0, 20, 12, marks=pytest.mark.slow),
        pytest.param(2, 20, 12, marks=pytest.mark.slow),
    ],
)
def test_kill_9_changes_nothing(tmp_path: Path, forty: Path, workers: int, kills: int, epochs: int) -> None:
    settings = (*SETTINGS, f"data.workers={workers}", f"schedule.epochs={epochs}")
    undisturbed = tiny_config(tmp_path / "whole", forty, *settings)
    result = run(undisturbed)
    an_epoch = result["steps"] // epochs
    config = tiny_config(tmp_path / "killed", forty, *settings)
    steps = killed_and_resumed(config, kills, seed=kills + workers)
    assert len(steps) == kills
    inside = [step for step in steps if step % an_epoch]
    assert len(inside) >= kills // 2, f"too few kills inside an epoch: after steps {steps}"
    assert_same_run(config, undisturbed)
    assert not list(folder(config).rglob("*.tmp"))


# A save: write and flush, give the checkpoint before its second name, flush, move the new one to the first name. Killed
# in the second save, after the second name was given (so both are of step 1), or in the third, before.
@pytest.mark.parametrize(("call", "last", "previous"), [("fsync", 1, 1), ("link", 2, 1), ("replace", 1, 1)])
def test_kill_9_in_the_middle_of_saving(
    tmp_path: Path, forty: Path, monkeypatch: pytest.MonkeyPatch, call: str, last: int, previous: int
) -> None:
    config = tiny_config(tmp_path, forty, *SETTINGS, "schedule.epochs=1", "schedule.eval_every=1")
    checkpoints = folder(config) / "checkpoints"
    real = getattr(os, call)

    def dies(*arguments: Any) -> Any:
        if (checkpoints / "previous.ckpt").exists() and (call != "replace" or Path(arguments[1]).name == "last.ckpt"):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, dies)
        pid = started(config)
    assert killed_itself(pid)
    assert list(checkpoints.glob(".last.ckpt.*.tmp"))  # it was in the middle
    assert sorted(path.name for path in checkpoints.glob("[!.]*")) == ["last.ckpt", "previous.ckpt"]
    assert load(checkpoints / "last.ckpt")["global_step"] == last
    assert load(checkpoints / "previous.ckpt")["global_step"] == previous
    assert run(config)["steps"] > 3
    assert not list(checkpoints.glob(".*.tmp"))
