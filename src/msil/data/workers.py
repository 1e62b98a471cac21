"""Loader worker processes: which file each of them reads, what signals do to them, and what to say when one is lost."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from torch.utils.data._utils import signal_handling

from msil.data.annotated import AnnotatedImages
from msil.detection.structures import Target
from msil.errors import DataError

WAIT = 5.0  # seconds; the system tells of a child's death in some milliseconds

# torch's words, of its SIGCHLD handler and of its loader: "DataLoader worker (pid 12) is killed by signal: Killed. ",
# "DataLoader worker (pid 12) exited unexpectedly with exit code 1. ...", "DataLoader worker (pid(s) 12, 13) exited ..."
_PIDS = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")
_HOW = re.compile(r"is killed by signal: ([^.]+)\.|with (exit code \d+)")


class Reading:
    """What the workers of one loader read: (workers, 2) int64 of (pid, image index) in memory shared with them."""

    def __init__(self, dataset: AnnotatedImages, workers: int) -> None:
        self.dataset = dataset
        self.table = torch.full((workers, 2), -1, dtype=torch.int64).share_memory_()

    def begins(self, index: int) -> None:
        """To be called by whoever reads that image, before it does."""
        worker = get_worker_info()
        if worker is not None:
            self.table[worker.id] = torch.tensor([os.getpid(), index])

    def last(self, pid: int) -> str | None:
        """The file that this worker began last."""
        indices = self.table[self.table[:, 0] == pid, 1].tolist()
        return str(self.dataset.path(indices[0])) if indices else None


class WatchedImages(Dataset[tuple[Tensor, Target]]):
    """A data set as it is, whose reads are noted."""

    def __init__(self, dataset: AnnotatedImages, reading: Reading) -> None:
        self.dataset = dataset
        self.reading = reading

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        self.reading.begins(index)
        return self.dataset[index]


def heed_dead_workers() -> None:
    """Have torch tell of workers that die; to be called before Lightning sets the signal handlers of a run.

    torch sets its handler once a process, with the first worker. When its run ends, Lightning puts back the handlers
    that it found: without this call a second run in the same process would not learn what killed a worker.
    """
    signal_handling._set_SIGCHLD_handler()


def lost_worker(error: BaseException, readings: Sequence[Reading]) -> DataError | None:
    """What to tell if the error, or what caused it, is torch's of a worker process that died; else None.

    A connection to a worker that broke may be noticed before its death, which is then waited for.
    """
    if isinstance(error, ConnectionError | EOFError | FileNotFoundError):
        dead = _await_death(readings)
        return None if dead is None else _sentence({dead[0]}, dead[1], readings)
    texts = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    text = " ".join(texts)
    pids = {int(pid) for match in _PIDS.finditer(text) for pid in match.group(1).split(",")}
    if not pids:
        return None
    how = _HOW.search(text)
    end = "died" if how is None else f"was killed by a signal ({how[1]})" if how[1] else f"ended with {how[2]}"
    return _sentence(pids, end, readings)


def _await_death(readings: Sequence[Reading]) -> tuple[int, str] | None:
    """(pid, how it ended) of the first worker that is found dead, without taking that news from its parent's loader."""
    pids = [pid for reading in readings for pid in reading.table[:, 0].tolist() if pid > 0]
    until = time.monotonic() + WAIT
    while time.monotonic() < until and hasattr(os, "waitid"):
        for pid in pids:
            with contextlib.suppress(ChildProcessError):  # gone, and known to be
                found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if found is not None and found.si_code in (os.CLD_KILLED, os.CLD_DUMPED):
                    return pid, f"was killed by a signal ({signal.strsignal(found.si_status)})"
        time.sleep(0.02)
    return None


def _sentence(pids: set[int], end: str, readings: Sequence[Reading]) -> DataError:
    files = [file for pid in sorted(pids) for reading in readings if (file := reading.last(pid)) is not None]
    where = f" while it read {' and '.join(files)}, or just after" if files else " before it read an image"
    return DataError(
        f"loader worker process {', '.join(map(str, sorted(pids)))} {end}{where}, perhaps for want of memory: lower"
        " data.workers or data.batch_size; the same command continues after the last checkpoint."
    )


def outlive_signals(worker_id: int) -> None:
    """A worker_init_fn: signals that end a run must not end its workers first, for it goes on to its checkpoint.

    Ctrl-C and schedulers signal every process of a job. SIGINT and SIGUSR1 are ignored. Of SIGTERM the first is; the
    second ends the worker, and so does any that the run itself sends, as torch and multiprocessing do when they clean
    up: they would wait forever for a worker that ignored it. A worker whose run is gone ends by itself in 5 s.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS has none, and so keeps torch's handler
        # Only a thread that waits for the signal learns who sent it, and only if no other thread would take it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_await_sigterm, args=(os.getppid(),), daemon=True).start()


def _await_sigterm(parent: int) -> None:
    for _ in range(2):
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent:
            os._exit(0)  # as torch's own handler does
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.kill(os.getpid(), signal.SIGTERM)  # to die by the signal, not by an exit code that hides it
