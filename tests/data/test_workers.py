"""Loader worker processes under real signals."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from msil.data.coco import CocoDataset
from msil.data.module import DetectionDataModule
from msil.data.shapes import write_shapes
from msil.errors import DataError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("workers") / "shapes", num_train=40, num_val=4, image_size=32, seed=1)


@pytest.fixture
def data(root: Path) -> Iterator[DetectionDataModule]:
    train = CocoDataset(root, "train")
    yield DetectionDataModule(
        train, train, batch_size=4, eval_batch_size=4, seed=0, min_size=32, max_size=32, workers=2
    )  # fmt: skip


def started(loader: Any) -> tuple[Any, list[Any]]:
    """An epoch of which each worker has given a batch, and the workers."""
    batches = iter(loader)
    next(batches)
    next(batches)
    return batches, batches._workers


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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_second_sigterm_is_obeyed_and_told(data: DetectionDataModule) -> None:
    with pytest.raises(DataError, match=r"was killed by a signal \(Terminated\)"), data.naming_lost_workers():
        batches, workers = started(data.train_dataloader())
        send(signal.SIGTERM, workers[0].pid)
        wait(lambda: not blocked(workers[0].pid))
        send(signal.SIGTERM, workers[0].pid)
        wait(lambda: not Path(f"/proc/{workers[0].pid}").exists())
        list(batches)


def test_the_first_sigterm_of_the_run_itself_is_obeyed(data: DetectionDataModule) -> None:
    """What torch and multiprocessing send at the end to a worker that does not answer; they then wait for it."""
    batches, workers = started(data.train_dataloader())
    workers[0].terminate()
    workers[0].join(20)
    assert workers[0].exitcode == 0
    del batches


LEFT_OPEN = """
import sys
from pathlib import Path
from msil.data.coco import CocoDataset
from msil.data.module import DetectionDataModule
train = CocoDataset(sys.argv[1], "train")
data = DetectionDataModule(train, train, batch_size=4, eval_batch_size=4, seed=0, min_size=32, max_size=32, workers=2)
batches = iter(data.train_dataloader())
next(batches)
print(*(worker.pid for worker in batches._workers), flush=True)
{end}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "end", ["sys.exit(3)", "import torch.utils.data._utils as u; u.python_exit_status = True; sys.exit(3)"],
    ids=["torch", "multiprocessing"],
)  # fmt: skip
def test_a_program_that_ends_in_the_middle_of_an_epoch_does_not_wait_for_its_workers(root: Path, end: str) -> None:
    """Whether torch still cleans up, or has already given up and leaves it to multiprocessing."""
    done = subprocess.run(
        [sys.executable, "-c", LEFT_OPEN.format(end=end), str(root)], capture_output=True, text=True, timeout=90,
        check=False,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert not any(Path(f"/proc/{pid}").exists() for pid in done.stdout.split())


@pytest.mark.parametrize("training", [True, False])
def test_a_killed_worker_is_told_by_pid_signal_and_file(data: DetectionDataModule, training: bool) -> None:
    """One of two workers is killed in the middle of an epoch: the table says what it began last."""
    with pytest.raises(DataError) as error, data.naming_lost_workers():
        batches, workers = started(data.train_dataloader() if training else data.val_dataloader())
        pid = workers[1].pid
        os.kill(pid, signal.SIGKILL)
        list(batches)
    table = data._readings[1 if training else 0].table
    (index,) = table[table[:, 0] == pid, 1].tolist()
    assert str(error.value) == (
        f"loader worker process {pid} was killed by a signal (Killed) while it read {data.train.path(index)}, or just"
        " after, perhaps for want of memory: lower data.workers or data.batch_size; the same command continues"
        " after the last checkpoint."
    )


SECOND_RUN = """
import os, signal, sys
from pathlib import Path
import lightning as L
import torch
from msil.data.coco import CocoDataset
from msil.data.module import DetectionDataModule

class Module(L.LightningModule):
    def training_step(self, batch):
        return None

    def configure_optimizers(self):
        return torch.optim.SGD([torch.zeros(1, requires_grad=True)])

class Kill(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        os.kill(trainer.fit_loop._combined_loader._iterator.iterators[0]._workers[1].pid, signal.SIGKILL)

train = CocoDataset(sys.argv[1], "train")
for callbacks in [], [Kill()]:
    data = DetectionDataModule(
        train, train, batch_size=4, eval_batch_size=4, seed=0, min_size=32, max_size=32, workers=2
    )
    trainer = L.Trainer(
        max_epochs=1, limit_val_batches=0, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, use_distributed_sampler=False, callbacks=callbacks, default_root_dir=sys.argv[1],
    )
    with data.naming_lost_workers():
        trainer.fit(Module(), datamodule=data)
"""


def test_a_second_run_in_the_same_process_learns_what_killed_a_worker(root: Path) -> None:
    """As in a multirun. In its own process, since torch sets its signal handler once in a process."""
    done = subprocess.run(
        [sys.executable, "-c", SECOND_RUN, str(root)], capture_output=True, text=True, timeout=90, check=False
    )
    told = r"DataError: loader worker process \d+ was killed by a signal \(Killed\) while it read"
    assert re.search(told, done.stderr), done.stderr


def test_other_errors_pass_as_they_are(data: DetectionDataModule) -> None:
    with pytest.raises(RuntimeError, match="another"), data.naming_lost_workers():
        raise RuntimeError("another")


def test_the_file_that_kills_its_reader_is_the_one_named(root: Path, data: DetectionDataModule, tmp_path: Path) -> None:
    """As a decoder that crashes on one file would: here the worker kills itself when it comes to image 7."""
    with pytest.raises(DataError) as error, data.naming_lost_workers():
        loader = data.train_dataloader()
        whole = type(data.train).__getitem__

        class Deadly(CocoDataset):
            def __getitem__(self, index: int) -> Any:
                if index == 7 and multiprocessing.parent_process() is not None:
                    os.kill(os.getpid(), signal.SIGSEGV)
                return whole(self, index)

        loader.dataset.dataset = Deadly(root, "train")  # pyright: ignore
        list(loader)
    assert "was killed by a signal (Segmentation fault)" in str(error.value)
    assert f"while it read {data.train.path(7)}, or" in str(error.value)
