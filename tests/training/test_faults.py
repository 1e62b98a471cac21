"""What a run does when the disk is full, a checkpoint is damaged, a signal comes, or numbers and memory run out."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from msil.cli import main
from msil.config import Config
from msil.data.module import AugmentedImages
from msil.errors import ConfigError
from msil.files import DiskFull
from msil.interruption import Preempted
from msil.lock import Locked, locked
from msil.reporting.results import read_result
from msil.training import checkpoint
from msil.training.divergence import TrainingDiverged
from msil.training.experiment import run

from .cases import assert_same, load, rows, tiny_config

RUN = Path(__file__).resolve().parents[2] / "run.py"
# Four steps an epoch, a checkpoint at each.
SETTINGS = ("data.batch_size=4", "trainer.save_every=1", "schedule.eval_every=2")


def folder(config: Config) -> Path:
    return Path(config.runs_dir) / config.run_name


def last(config: Config) -> dict[str, Any]:
    return load(folder(config) / "checkpoints" / "last.ckpt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Config:
    """An undisturbed run. Read only."""
    config = tiny_config(tmp_path_factory.mktemp("whole"), shapes, *SETTINGS)
    run(config)
    return config


def assert_like(config: Config, whole: Config) -> None:
    ours, theirs = last(config), last(whole)
    for part in ("state_dict", "optimizer_states", "global_step"):
        assert_same(ours[part], theirs[part], part)
    ours, theirs = read_result(folder(config)), read_result(folder(whole))
    assert ours is not None and theirs is not None
    assert ours["metrics"] == theirs["metrics"]


def before_reading(monkeypatch: pytest.MonkeyPatch, count: int, act: Callable[[], object]) -> None:
    """Do something real just before the `count`-th training image is read; 4 to a step."""
    read, seen = AugmentedImages.__getitem__, []

    def reads(self: AugmentedImages, key: tuple[int, int]) -> Any:
        seen.append(key)
        if len(seen) == count:
            act()
        return read(self, key)

    monkeypatch.setattr(AugmentedImages, "__getitem__", reads)


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


def limited_run(config_words: list[str], limit: int) -> subprocess.CompletedProcess[str]:
    """run.py in a process that cannot write files larger than `limit` bytes."""
    return subprocess.run(
        [sys.executable, str(RUN), *config_words],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )


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


# Numbers


def break_losses(monkeypatch: pytest.MonkeyPatch, steps: set[int], value: float) -> list[list[int]]:
    """Multiply loss_bbox by `value` in these steps (from 0); the image ids of each step."""
    from msil.detection import Detector

    real, seen = Detector.loss, []

    def loss(self: Detector, images: Any, targets: Any) -> Any:
        found = real(self, images, targets)
        if len(seen) in steps:
            found["loss_bbox"] = found["loss_bbox"] * value
        seen.append([target.image_id for target in targets])
        return found

    monkeypatch.setattr(Detector, "loss", loss)
    return seen


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_not_learnt_from(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    config = tiny_config(tmp_path, shapes, *SETTINGS)
    ids = break_losses(monkeypatch, {2}, value)
    with pytest.raises(TrainingDiverged) as caught:
        run(config)
    named = ", ".join(map(str, ids[2]))
    assert f"at step 3 loss_bbox is {value} (images {named})" in str(caught.value)
    assert last(config)["global_step"] == 2  # of before the step
    path = folder(config) / "nan_batch_rank0.pt"
    kept = load(path)
    assert [target["image_id"] for target in kept["targets"]] == ids[2]
    weights = last(config)["state_dict"]
    assert_same(kept["state_dict"], {key: weights[key] for key in kept["state_dict"]})
    # Replayed without what broke it, the batch is well again: that is what the verb says.
    monkeypatch.undo()
    assert main(["replay", str(path)]) == 0
    said = capsys.readouterr().out
    assert f"training step 3, images {named}: loss_cls" in said and "all of it is finite here" in said
    assert read_result(folder(config)) is None


def test_a_gradient_that_is_no_number_is_not_learnt_from(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, shapes, *SETTINGS)
    from msil.detection import Detector

    real = Detector.loss

    def loss(self: Detector, images: Any, targets: Any) -> Any:
        found = real(self, images, targets)
        # The square root's slope at 0 is infinite, its value is 0.
        weight = self.head.cls_logits.bias
        found["loss_cls"] = found["loss_cls"] + torch.sqrt((weight - weight.detach()).abs().sum())
        return found

    monkeypatch.setattr(Detector, "loss", loss)
    expected = r"at step 1 the losses are finite, but the gradients of parameter head\.cls_logits\.bias are not"
    with pytest.raises(TrainingDiverged, match=expected):
        run(config)


def test_pixels_that_are_no_numbers_are_named(tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path, shapes, *SETTINGS)
    real, ids = AugmentedImages.__getitem__, []

    def reads(self: AugmentedImages, key: tuple[int, int]) -> Any:
        image, target = real(self, key)
        if not ids:
            ids.append(target.image_id)
            image = image.float() / 255
            image[0, 0, 0] = float("nan")
        return image, target

    monkeypatch.setattr(AugmentedImages, "__getitem__", reads)
    with pytest.raises(TrainingDiverged, match=r"at step 1 the pixels or boxes of image \d+ are not finite") as caught:
        run(config)
    assert f"image {ids[0]} " in str(caught.value)


def test_three_bad_steps_in_a_row_may_be_skipped_and_no_fourth(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path / "three", shapes, *SETTINGS, "trainer.nan_policy=skip")
    with monkeypatch.context() as patch:
        break_losses(patch, {1, 2, 3, 5}, float("nan"))
        result = run(config)
    assert (result["steps"], result["skipped_steps"]) == (8, 4)
    said = capsys.readouterr().err.splitlines()
    assert [line.split("; ")[-1] for line in said if "skipped" in line] == [
        f"skipped, {count} of at most 3 in a row" for count in (1, 2, 3, 1)
    ]
    # Of the eight steps four were taken: the optimizer counts no other.
    states = last(config)["optimizer_states"][0]["state"]
    assert {int(state["step"]) for state in states.values()} == {4}

    config = tiny_config(tmp_path / "four", shapes, *SETTINGS, "trainer.nan_policy=skip")
    break_losses(monkeypatch, {1, 2, 3, 4}, float("nan"))
    with pytest.raises(TrainingDiverged, match=r"at step 5 loss_bbox is nan .*, the 4th time in a row"):
        run(config)


def test_a_skipped_step_leaves_the_statistics_of_norms_alone(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward pass has moved them already: here by pixels that are no numbers, in the second of two steps."""
    config = tiny_config(
        tmp_path, shapes, *SETTINGS, "model.backbone.norm=bn", "trainer.nan_policy=skip", "schedule.max_steps=2"
    )
    real, seen = AugmentedImages.__getitem__, []

    def reads(self: AugmentedImages, key: tuple[int, int]) -> Any:
        seen.append(key)
        image, target = real(self, key)
        return (image.float() * (float("nan") if len(seen) > 4 else 1 / 255)), target

    monkeypatch.setattr(AugmentedImages, "__getitem__", reads)
    assert run(config)["skipped_steps"] == 1
    state = last(config)["state_dict"]
    counts = [value for name, value in state.items() if name.endswith("num_batches_tracked")]
    assert counts and all(int(count) == 1 for count in counts)
    assert all(torch.isfinite(value).all() for value in state.values())


def test_a_full_disk_does_not_hide_that_the_numbers_broke(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, shapes, *SETTINGS, "trainer.save_every=100")
    break_losses(monkeypatch, {2}, float("nan"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    before_reading(monkeypatch, 9, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1])))
    try:
        with pytest.raises(
            TrainingDiverged, match=r"at step 3 loss_bbox is nan .* there is no room to keep the batch in"
        ):
            run(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(folder(config).rglob("nan_batch*"))


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


# Memory


def test_too_little_memory_is_said_with_what_to_set(tmp_path: Path) -> None:
    """A process whose address space is limited, and images (of 64 pixels, made larger for the net) too large for it."""
    words = [
        "schedule=smoke", "data.image_size=64", "data.num_train=4", "data.num_val=2", "data.min_size=2048",
        "data.max_size=2048", f"data.root={tmp_path}/data", f"runs_dir={tmp_path}/runs", "trainer.accelerator=cpu",
        "run_name=large", "logger=csv",
    ]  # fmt: skip
    limit = 7 << 30
    ended = subprocess.run(
        [sys.executable, str(RUN), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert ended.returncode == 2, ended.stderr
    assert re.fullmatch(
        r"error: out of memory in training step 1 on 2 images of up to 2048x2048 pixels: raise trainer\.accumulate.*or"
        r" lower data\.batch_size \(now 2\), lower data\.min_size .* the same command continues.*",
        ended.stderr.strip().splitlines()[-1],
    ), ended.stderr
    assert "Traceback" not in ended.stderr


# One folder


def test_a_second_run_is_told_who_is_there(tmp_path: Path, shapes: Path) -> None:
    config = tiny_config(tmp_path, shapes, "run_name=mine")
    code = (
        "import sys, pathlib\nfrom msil.lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print(1, flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(folder(config))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "1\n"
    try:
        with pytest.raises(
            Locked, match=rf"mine is in use by another run \(pid {other.pid} on host {os.uname().nodename}"
        ):
            run(config)
    finally:
        other.kill()
        other.communicate()


def test_a_lock_left_behind_by_a_killed_run_locks_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Even while a child of it, such as a loader's worker, still lives."""
    ready, done = os.pipe(), os.pipe()
    holder = os.fork()
    if holder == 0:
        with locked(tmp_path):
            if os.fork() == 0:
                os.write(ready[1], b"%d" % os.getppid())
                os.read(done[0], 1)
                os._exit(0)
            signal.pause()
    assert int(os.read(ready[0], 20)) == holder
    with pytest.raises(Locked), locked(tmp_path):
        pass
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    with locked(tmp_path):
        pass
    os.write(done[1], b"x")
    said = capsys.readouterr().err
    assert f"the process before (pid {holder} on host" in said and "did not end in order" in said
    with locked(tmp_path):  # and now it did
        pass
    assert capsys.readouterr().err == ""
