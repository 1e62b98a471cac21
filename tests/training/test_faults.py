"""What a run does when the disk is full, a checkpoint is damaged or a signal comes."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from msil.config import Config
from msil.data.module import AugmentedImages
from msil.errors import ConfigError
from msil.interruption import Preempted
from msil.runs import DiskFull
from msil.training import checkpoint
from msil.training.experiment import run

from .cases import load, rows, tiny_config
from .faults import SETTINGS, assert_like, before_reading, folder, last


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Config:
    """An undisturbed run. Read only."""
    config = tiny_config(tmp_path_factory.mktemp("whole"), shapes, *SETTINGS)
    run(config)
    return config


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_at_the_next_batch_and_the_run_goes_on_there(
    tmp_path: Path, shapes: Path, whole: Config, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    config = tiny_config(tmp_path, shapes, *SETTINGS, "trainer.save_every=100")
    with monkeypatch.context() as patch:
        # While the third batch is loaded: two steps are taken, and the third is not begun.
        before_reading(patch, 9, lambda: os.kill(os.getpid(), number))
        with pytest.raises(Preempted, match=f"stopped by {number.name} before step 3; the same command continues"):
            run(config)
    assert last(config)["global_step"] == 2
    assert signal.getsignal(number) is signal.SIG_DFL  # what was there before
    run(config)
    assert_like(config, whole)


def test_a_signal_in_the_evaluation_costs_one_step_at_most(
    tmp_path: Path, shapes: Path, whole: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, shapes, *SETTINGS, "trainer.save_every=100")
    from msil.detection import Detector

    predict = Detector.predict
    with monkeypatch.context() as patch:

        def predicts(self: Detector, images: list[torch.Tensor]) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return predict(self, images)

        patch.setattr(Detector, "predict", predicts)
        with pytest.raises(Preempted, match="stopped by SIGTERM in an evaluation"):
            run(config)
    assert last(config)["global_step"] == 7  # of 8: the evaluation comes after the second epoch's last step
    run(config)
    assert_like(config, whole)


# Disk


def test_a_disk_that_fills_up_while_saving_keeps_the_checkpoint_before(
    tmp_path: Path, shapes: Path, whole: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, shapes, *SETTINGS)
    size = (folder(whole) / "checkpoints" / "last.ckpt").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        # From the fourth batch on no file may grow beyond half a checkpoint, as on a disk that is full.
        limit = (size // 2, before[1])
        before_reading(patch, 13, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
        try:
            with pytest.raises(DiskFull) as caught:
                run(config)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    needed = float(re.search(r"needs about ([\d.]+) MB", str(caught.value))[1])  # type: ignore[index]
    assert needed * 1e6 == pytest.approx(size, rel=0.1)
    assert "checkpoints/last.ckpt" in str(caught.value)
    names = sorted(path.name for path in (folder(config) / "checkpoints").iterdir())
    assert names == ["last.ckpt", "previous.ckpt"]  # and no part of the one that had no room
    assert last(config)["global_step"] == 2
    run(config)
    assert_like(config, whole)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_a_small_file_system_is_named_with_what_is_free(tmp_path: Path, shapes: Path, whole: Config) -> None:
    size = (folder(whole) / "checkpoints" / "last.ckpt").stat().st_size
    (tmp_path / "small").mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "none", str(tmp_path / "small")], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        config = tiny_config(tmp_path / "small", shapes, *SETTINGS)
        with pytest.raises(DiskFull, match=r"no room for .*: it needs about [\d.]+ MB, and [\d.]+ MB are free there"):
            run(config)
        assert [path.name for path in (folder(config) / "checkpoints").iterdir()] == ["last.ckpt"]
        assert last(config)["global_step"] == 1  # the second did not fit beside it
    finally:
        subprocess.run(["umount", str(tmp_path / "small")], check=True)


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path, shapes: Path) -> None:
    config = tiny_config(tmp_path, shapes, "schedule.max_steps=1")
    left = folder(config) / "checkpoints" / ".last.ckpt.0123abcd.tmp"
    own = folder(config) / ".notes.tmp"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    own.write_bytes(b"a user's")
    run(config)
    assert not left.exists() and own.exists()


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


def test_a_runs_dir_that_cannot_be_is_a_sentence(tmp_path: Path, shapes: Path) -> None:
    (tmp_path / "file").touch()
    config = tiny_config(tmp_path / "file", shapes)
    with pytest.raises(ConfigError, match=r"file/.* cannot be used \(Not a directory\): mend it, or set runs_dir"):
        run(config)


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


@pytest.mark.parametrize("damage", [truncate, garble, poison, lambda path: path.write_bytes(b"")])
def test_a_damaged_last_checkpoint_is_passed_over(
    tmp_path: Path,
    shapes: Path,
    whole: Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], object],
) -> None:
    config = tiny_config(tmp_path, shapes, *SETTINGS)
    with monkeypatch.context() as patch:
        before_reading(patch, 13, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Preempted):
            run(config)
    damage(folder(config) / "checkpoints" / "last.ckpt")
    capsys.readouterr()
    run(config)
    assert re.search(
        r"last\.ckpt cannot be read as a checkpoint \(.+\); going on from .*previous\.ckpt, step 2",
        capsys.readouterr().err,
    )
    assert not (folder(config) / "checkpoints" / "mark").exists()
    assert_like(config, whole)


def test_two_damaged_checkpoints_are_refused_in_words(tmp_path: Path) -> None:
    for name in ("last.ckpt", "previous.ckpt"):
        (tmp_path / "checkpoints" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "checkpoints" / name).write_bytes(b"no checkpoint")
    with pytest.raises(ConfigError, match=r"last\.ckpt cannot .* and .*previous\.ckpt cannot .*; delete .* to start"):
        checkpoint.resume_point(tmp_path / "checkpoints")


def test_resume_never_begins_again(tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path, shapes, *SETTINGS)
    with monkeypatch.context() as patch:
        before_reading(patch, 13, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Preempted):
            run(config)
    again = tiny_config(tmp_path, shapes, *SETTINGS, "resume=never")
    assert folder(again) == folder(config)
    read = []
    real = AugmentedImages.__getitem__
    monkeypatch.setattr(AugmentedImages, "__getitem__", lambda self, key: read.append(key) or real(self, key))
    run(again)
    assert len(read) == 32  # both epochs' 16 images
    assert [int(row["step"]) for row in rows(folder(again)) if "loss" in row] == list(range(8))
