"""Loader worker processes under real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from msil.data import workers
from msil.data.module import DetectionDataModule
from msil.data.shapes import write_shapes
from msil.data.transforms import Augmentation, Untransformed
from msil.data.workers import packed, unpacked
from msil.detection.structures import Target
from msil.errors import DataError

from .files import read_coco


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("workers") / "shapes", num_train=40, num_val=4, image_size=32, seed=1)


@pytest.fixture
def data(root: Path) -> Iterator[DetectionDataModule]:
    train = read_coco(root, "train")
    settings = SimpleNamespace(
        batch_size=4, eval_batch_size=4, min_size=32, max_size=32, multiscale=None, flip=0.5, augment=None,
        filter_empty=None, device_transforms=False, workers=2,
    )  # fmt: skip
    yield DetectionDataModule(settings, train, train)


def started(loader: Any) -> tuple[Any, list[Any]]:
    """An epoch of which each worker has given a batch, and the workers."""
    batches = iter(loader)
    next(batches)
    next(batches)
    return batches, loader.processes


def send(number: signal.Signals, pid: int) -> None:
    """From another process than the worker's parent, as a scheduler does."""
    subprocess.run(["/bin/kill", f"-{number.name.removeprefix('SIG')}", str(pid)], check=True)


def wait(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def blocked(pid: int) -> bool:
    """Whether a SIGTERM that the process got is still to be looked at."""
    status = Path(f"/proc/{pid}/status").read_text()
    pending = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (signal.SIGTERM - 1) & 1 for mask in pending)


def test_signals_meant_for_the_run_do_not_end_its_workers(data: DetectionDataModule) -> None:
    batches, workers = started(data.train_dataloader())
    for worker in workers:
        for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            send(number, worker.pid)
        wait(lambda pid=worker.pid: not blocked(pid))
    assert len(list(batches)) == data.steps_per_epoch - 2
    assert all(worker.is_alive() for worker in workers)


def test_the_first_sigterm_of_the_run_itself_is_obeyed(data: DetectionDataModule) -> None:
    """What torch and multiprocessing send at the end to a worker that does not answer; they then wait for it."""
    batches, workers = started(data.train_dataloader())
    workers[0].terminate()
    workers[0].join(20)
    assert workers[0].exitcode == 0
    del batches


@pytest.mark.parametrize(("training", "number"), [(True, signal.SIGKILL), (False, signal.SIGSEGV)])
def test_a_dead_worker_is_reported_by_pid_and_signal(
    data: DetectionDataModule, training: bool, number: signal.Signals
) -> None:
    with pytest.raises(DataError) as error, data.naming_lost_workers():
        batches, workers = started(data.train_dataloader() if training else data.val_dataloader())
        pid = workers[1].pid
        os.kill(pid, number)
        list(batches)
    assert str(error.value) == (
        f"loader worker process {pid} was killed by a signal ({signal.strsignal(number)}), perhaps for want of memory:"
        " lower data.workers or data.batch_size; the same command continues after the last checkpoint."
    )


@pytest.mark.parametrize("ended_by_torch", [True, False])
def test_a_broken_connection_to_a_dead_worker_is_its_death(data: DetectionDataModule, ended_by_torch: bool) -> None:
    """What a loaded machine shows first: a worker dies while its parent takes a tensor from it. The loader may be gone
    and its processes waited for by the time that the error comes."""
    with pytest.raises(DataError, match=r"was killed by a signal \(Killed\)"), data.naming_lost_workers():
        batches, workers = started(data.train_dataloader())
        os.kill(workers[1].pid, signal.SIGKILL)
        if ended_by_torch:
            workers[1].join()
            del batches
        raise ConnectionResetError(104, "Connection reset by peer")


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (
            RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"),
            "--shm-size",
        ),
        (OSError(24, "Too many open files"), "ulimit -n"),
    ],
)
def test_a_limit_that_a_worker_meets_is_a_sentence(
    data: DetectionDataModule, monkeypatch: pytest.MonkeyPatch, error: Exception, advice: str
) -> None:
    def fails(parts: Any) -> Any:
        raise error

    monkeypatch.setattr(workers, "_shared", fails)
    with pytest.raises(DataError, match=advice), data.naming_lost_workers():
        list(data.train_dataloader())


def test_a_batch_leaves_its_worker_in_three_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "get_worker_info", object)
    images = [torch.randint(0, 256, (3, height, 5), dtype=torch.uint8) for height in (4, 7)]
    boxes = [torch.zeros(0, 4), torch.rand(2, 4)]
    targets = [Target(one, torch.arange(len(one)), 7, (4, 5)) for one in boxes]
    for batch in ((images, targets), Untransformed(images, targets, [Augmentation(8, 10, True)] * 2)):
        sent = packed(lambda given: given, batch)
        assert [isinstance(part, torch.Tensor) and part.is_shared() for part in sent[:3]] == [True] * 3
        pinned: list[torch.Tensor] = []
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda part, *_, pinned=pinned: pinned.append(part) or part)
        again = unpacked(pin_memory(sent))  # as torch's loader does beside a GPU
        assert all(map(torch.equal, pinned, sent[:3])) and len(pinned) == 3
        assert type(again) is type(batch) and again[2:] == batch[2:]
        assert all(map(torch.equal, again[0], images))
        for ours, theirs in zip(again[1], targets, strict=True):
            assert torch.equal(ours.boxes, theirs.boxes) and torch.equal(ours.labels, theirs.labels)
            assert (ours.image_id, ours.size) == (7, (4, 5))


def test_other_errors_pass_as_they_are(data: DetectionDataModule) -> None:
    for error in (RuntimeError("another"), FileNotFoundError("another")):
        with pytest.raises(type(error), match="another"), data.naming_lost_workers():
            raise error
