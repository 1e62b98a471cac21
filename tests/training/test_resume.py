"""kill -9, signals, a full disk, damaged checkpoints: the same command goes on as if nothing had happened."""

from __future__ import annotations

import os
import random
import re
import resource
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from tests.launch.faults import small_disk

from msil.config import Config, Resume
from msil.detection import Detector
from msil.errors import ConfigError
from msil.interruption import Preempted
from msil.runs import DiskFull
from msil.training.checkpoint import AtomicCheckpointIO, best_checkpoint, resume_point
from msil.training.experiment import run

from .cases import Finished, assert_same_run, before_reading, folder, last, load, rows, stop, tiny_config
from .killing import kill_at_random, started, was_killed

RARELY = "trainer.save_every=100"


# kill -9


@pytest.mark.parametrize(
    ("accumulate", "workers", "kills", "epochs"),
    [
        (2, 0, 3, 2),
        pytest.param(1, 0, 20, 20, marks=pytest.mark.slow),
        pytest.param(2, 2, 20, 20, marks=pytest.mark.slow),
    ],
)
def test_kill_9_changes_nothing(
    tmp_path: Path, shapes: Path, accumulate: int, workers: int, kills: int, epochs: int
) -> None:
    """At random moments, most of them inside an epoch; also with a step's images in two batches."""
    settings = (f"data.workers={workers}", f"schedule.epochs={epochs}", f"trainer.accumulate={accumulate}")
    whole = tiny_config(tmp_path / "whole", shapes, *settings)
    assert run(whole)["steps"] == 4 * epochs
    config = tiny_config(tmp_path / "killed", shapes, *settings)
    dice = random.Random(kills + workers)
    path = folder(config) / "checkpoints" / "last.ckpt"
    steps = []
    for _ in range(kills):
        kill_at_random(started(config), path, dice)
        steps.append(load(path)["global_step"])
    run(config)
    assert len([step for step in steps if step % 4]) >= kills // 2, f"too few inside an epoch: after steps {steps}"
    assert_same_run(config, whole)
    assert not list(folder(config).rglob("*.tmp"))


# A save: write and flush, give the checkpoint before its second name, flush, move the new one to the first name. Killed
# in the second save, after the second name was given (so both are of step 1), or in the third, before.
@pytest.mark.parametrize(("call", "at", "previous"), [("fsync", 1, 1), ("link", 2, 1), ("replace", 1, 1)])
def test_kill_9_in_the_middle_of_saving(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch, call: str, at: int, previous: int
) -> None:
    config = tiny_config(tmp_path, shapes, "schedule.epochs=1")
    checkpoints = folder(config) / "checkpoints"
    real = getattr(os, call)

    def dies(*arguments: Any) -> Any:
        if (checkpoints / "previous.ckpt").exists() and (call != "replace" or Path(arguments[1]).name == "last.ckpt"):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, dies)
        pid = started(config)
    assert was_killed(pid)
    assert list(checkpoints.glob(".last.ckpt.*.tmp"))  # it was in the middle
    assert sorted(path.name for path in checkpoints.glob("[!.]*")) == ["last.ckpt", "previous.ckpt"]
    assert load(checkpoints / "last.ckpt")["global_step"] == at
    assert load(checkpoints / "previous.ckpt")["global_step"] == previous
    own = folder(config) / ".notes.tmp"
    own.touch()
    assert run(config)["steps"] == 4
    assert not list(checkpoints.glob(".*.tmp")) and own.exists()


def test_a_run_killed_in_its_last_evaluation_is_only_evaluated(
    finished: Finished, tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, shapes)
    with monkeypatch.context() as patch:
        patch.setattr("msil.training.experiment.evaluate", lambda parts: os.kill(os.getpid(), signal.SIGKILL))
        pid = started(config)
    assert was_killed(pid)
    with monkeypatch.context() as patch:
        patch.setattr(Detector, "loss", None)  # no step is taken
        assert run(config)["images_per_second"] > 0  # of the training that was
    assert_same_run(config, finished[0])


# Signals


# While the third step's first batch of two is loaded, or its second.
@pytest.mark.parametrize(("number", "images"), [(signal.SIGTERM, 9), (signal.SIGUSR1, 11)])
def test_a_signal_stops_before_the_next_step_and_the_run_goes_on_there(
    tmp_path: Path, shapes: Path, number: signal.Signals, images: int
) -> None:
    whole, config = (tiny_config(tmp_path / name, shapes, RARELY, "trainer.accumulate=2") for name in ("a", "b"))
    run(whole)
    done = 2 if images == 9 else 3  # a step is not left half way
    stop(config, images, number, f"by {number.name} before step {done + 1}; the same command")
    assert last(config)["global_step"] == done
    assert signal.getsignal(number) is signal.SIG_DFL  # what was there before
    run(config)
    assert_same_run(config, whole)


def test_a_signal_in_the_evaluation_costs_one_step_at_most(
    finished: Finished, tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, shapes, RARELY)
    predict = Detector.predict
    with monkeypatch.context() as patch:

        def predicts(self: Detector, images: list[torch.Tensor]) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return predict(self, images)

        patch.setattr(Detector, "predict", predicts)
        with pytest.raises(Preempted, match="stopped by SIGTERM in an evaluation"):
            run(config)
    assert last(config)["global_step"] == 3  # of the first epoch's 4
    run(config)
    assert_same_run(config, finished[0])


# Disk


def test_a_disk_that_fills_up_while_saving_keeps_the_checkpoint_before(
    finished: Finished, tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, shapes)
    size = (finished[1] / "checkpoints" / "last.ckpt").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        # From the fourth batch on no file may grow beyond half a checkpoint, as on a disk that is full.
        limit = (size // 2, before[1])
        before_reading(patch, 13, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
        try:
            with pytest.raises(DiskFull, match=r"checkpoints/last\.ckpt") as caught:
                run(config)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    needed = float(re.search(r"needs about ([\d.]+) MB", str(caught.value))[1])  # type: ignore[index]
    assert needed * 1e6 == pytest.approx(size, rel=0.1)
    names = sorted(path.name for path in (folder(config) / "checkpoints").iterdir())
    assert names == ["last.ckpt", "previous.ckpt"]  # and no part of the one that had no room
    assert last(config)["global_step"] == 2
    run(config)
    assert_same_run(config, finished[0])


def test_a_small_file_system_is_named_with_what_is_free(finished: Finished, tmp_path: Path, shapes: Path) -> None:
    size = (finished[1] / "checkpoints" / "last.ckpt").stat().st_size
    with small_disk(tmp_path / "small", size * 3 // 2) as disk:
        config = tiny_config(disk, shapes)
        with pytest.raises(DiskFull, match=r"no room for .*: it needs about [\d.]+ MB, and [\d.]+ MB are free there"):
            run(config)
        assert [path.name for path in (folder(config) / "checkpoints").iterdir()] == ["last.ckpt"]
        assert last(config)["global_step"] == 1  # the second did not fit beside it


@pytest.mark.parametrize("limit", [0, 200])
def test_a_disk_that_is_full_at_the_start_is_a_sentence(tmp_path: Path, shapes: Path, limit: int) -> None:
    """Too small for the lock's line, and for config.yaml."""
    config = tiny_config(tmp_path, shapes)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(DiskFull, match="there is no room for"):
            run(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Damaged checkpoints


class Code:
    """Unpickled, it would leave a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path: Path) -> None:
    """One byte in the middle, inside a tensor: torch.load would not notice."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def poison(path: Path) -> None:
    torch.save({**load(path), "extra": Code(path.parent / "mark")}, path)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    """The folder of a run that a signal stopped before step 4. Read only."""
    config = tiny_config(tmp_path_factory.mktemp("stopped"), shapes)
    stop(config, 13)
    return folder(config)


def copied(stopped: Path, config: Config) -> Path:
    """The checkpoints of a copy of the stopped run, as that of `config`."""
    subprocess.run(["cp", "-r", str(stopped), str(folder(config))], check=True)
    return folder(config) / "checkpoints"


@pytest.mark.parametrize("damage", [truncate, garble, poison, lambda path: path.write_bytes(b"")])
def test_a_damaged_last_checkpoint_is_passed_over(
    finished: Finished,
    stopped: Path,
    tmp_path: Path,
    shapes: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], object],
) -> None:
    config = tiny_config(tmp_path, shapes)
    checkpoints = copied(stopped, config)
    damage(checkpoints / "last.ckpt")
    run(config)
    assert re.search(
        r"last\.ckpt cannot be read as a checkpoint \(.+\); going on from .*previous\.ckpt, step 2",
        capsys.readouterr().err,
    )
    assert not (checkpoints / "mark").exists()
    assert_same_run(config, finished[0])


def test_two_damaged_checkpoints_are_refused_in_words(tmp_path: Path) -> None:
    for name in ("last.ckpt", "previous.ckpt"):
        (tmp_path / "checkpoints" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "checkpoints" / name).write_bytes(b"no checkpoint")
    with pytest.raises(ConfigError, match=r"last\.ckpt cannot .* and .*previous\.ckpt cannot .*; delete .* to start"):
        resume_point(Resume.auto, tmp_path / "checkpoints")


def test_a_checkpoint_of_another_net_is_refused_in_words(stopped: Path, tmp_path: Path, shapes: Path) -> None:
    config = tiny_config(tmp_path, shapes, "model.channels=32")
    (folder(config) / "checkpoints").mkdir(parents=True)
    (folder(config) / "checkpoints" / "last.ckpt").write_bytes((stopped / "checkpoints" / "last.ckpt").read_bytes())
    with pytest.raises(ConfigError, match=r"last\.ckpt does not fit this net; delete .* to start again"):
        run(config)


def test_resume_never_begins_again(stopped: Path, tmp_path: Path, shapes: Path) -> None:
    config = tiny_config(tmp_path, shapes, "resume=never")
    refused = tiny_config(tmp_path, shapes, "resume=never", "trainer.precision=16-mixed", f"run_name={config.run_name}")
    before = (copied(stopped, config).parent / "metrics.csv").read_text()
    with pytest.raises(ConfigError, match="16-mixed"):
        run(refused)
    assert (folder(config) / "checkpoints" / "last.ckpt").exists()
    run(config)
    assert [int(row["step"]) for row in rows(folder(config)) if "loss" in row] == list(range(8))
    assert before.splitlines()[1] not in (folder(config) / "metrics.csv").read_text()  # its speed at least is another


def test_the_best_stays_the_best_in_a_copied_folder(tmp_path: Path) -> None:
    state = {"best_model_score": torch.tensor(0.5), "best_model_path": "/before/best.ckpt", "dirpath": "/before",
             "best_k_models": {"/before/best.ckpt": torch.tensor(0.5)}, "kth_value": torch.tensor(0.5),
             "kth_best_model_path": "/before/best.ckpt", "last_model_path": ""}  # fmt: skip
    for there in (False, True):
        if there:
            (tmp_path / "best.ckpt").touch()
        best = best_checkpoint(tmp_path)
        best.load_state_dict(state)
        assert best.check_monitor_top_k(Trainer(logger=False, barebones=True), torch.tensor(0.4)) is not there
        assert set(best.best_k_models) == ({str(tmp_path / "best.ckpt")} if there else set())


def test_ctrl_c_while_saving_is_ctrl_c(tmp_path: Path) -> None:
    """torch.save hides it behind an error of its own. Only last.ckpt has a previous.ckpt."""
    saver = AtomicCheckpointIO()
    for name in ("best.ckpt", "last.ckpt"):
        saver.save_checkpoint({"step": 1}, tmp_path / name)

    class Stops:
        def __reduce__(self) -> Any:
            raise KeyboardInterrupt

    for name in ("best.ckpt", "last.ckpt"):
        with pytest.raises(KeyboardInterrupt):
            saver.save_checkpoint({"weight": torch.zeros(9), "step": Stops()}, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert saver.load_checkpoint(tmp_path / "last.ckpt") == {"step": 1}
