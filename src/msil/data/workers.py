"""Loader worker processes: how a batch leaves them, the signals that they outlive, and what is said when one dies."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from msil.data.transforms import Augmentation, Untransformed
from msil.detection.structures import Target
from msil.errors import DataError

WAIT = 5.0  # seconds; a child's death shows after some milliseconds


# What torch, Python and the kernel say where /dev/shm or the number of open files ends.
NO_SHARED_MEMORY = ("unable to allocate shared memory", "unable to resize file", "unable to mmap")
NO_FILES = ("Too many open files", "received 0 items of ancdata")


class Packed(NamedTuple):
    """A batch on its way from a worker, in three tensors of shared memory: each costs a file descriptor at both ends.

    pixels: of all images, end to end. boxes (M, 4), labels (M,): of all targets. shapes: (3, H, W) of each image.
    targets: (number of boxes, image_id, size) of each. augmentations: of an Untransformed batch.
    """

    pixels: Tensor
    boxes: Tensor
    labels: Tensor
    shapes: list[tuple[int, ...]]
    targets: list[tuple[int, int, tuple[int, int]]]
    augmentations: list[Augmentation] | None


def packed(collate: Callable[[list[Any]], Any], samples: list[Any]) -> Any:
    """A collate_fn: what `collate` makes of the samples, in a worker as a Packed.

    Where shared memory ends the error is raised here: in torch's own thread it would be printed, and the run would wait
    for ever.
    """
    batch = collate(samples)
    if get_worker_info() is None:
        return batch
    images, targets = batch[:2]
    return Packed(
        _shared([image.flatten() for image in images]),
        _shared([target.boxes for target in targets]),
        _shared([target.labels for target in targets]),
        [tuple(image.shape) for image in images],
        [(len(target.labels), target.image_id, target.size) for target in targets],
        batch.augmentations if isinstance(batch, Untransformed) else None,
    )


def unpacked(batch: Any) -> Any:
    """The batch again, its tensors views of the packed ones."""
    if not isinstance(batch, Packed):
        return batch
    counts = [count for count, *_ in batch.targets]
    pixels = batch.pixels.split([math.prod(shape) for shape in batch.shapes])
    images = [part.view(shape) for part, shape in zip(pixels, batch.shapes, strict=True)]
    columns = (batch.boxes.split(counts), batch.labels.split(counts), batch.targets)
    targets = [Target(boxes, labels, *about[1:]) for boxes, labels, about in zip(*columns, strict=True)]
    return (images, targets) if batch.augmentations is None else Untransformed(images, targets, batch.augmentations)


def _shared(parts: list[Tensor]) -> Tensor:
    """End to end in shared memory."""
    count = sum(part.numel() for part in parts)
    if not count:
        return torch.cat(parts)
    storage = torch.UntypedStorage._new_shared(count * parts[0].element_size())
    whole = torch.empty(0, dtype=parts[0].dtype).set_(storage)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return torch.cat(parts, out=whole.view(-1, *parts[0].shape[1:]))


class WatchedLoader(DataLoader):
    """Unpacks the workers' batches, and keeps the processes, for their exit codes after torch has cleaned up.

    processes: of the last epoch.
    """

    processes: Sequence[BaseProcess] = ()

    def __iter__(self) -> Any:
        handler = signal.getsignal(signal.SIGCHLD)
        try:
            iterator = super().__iter__()
        except OSError as error:
            # As for want of file descriptors: torch's half-made iterator would complain when it is collected.
            hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
            traceback.clear_frames(error.__traceback__)
            sys.unraisablehook = hook
            raise
        if threading.current_thread() is threading.main_thread():
            # torch's handler raises at any line, and in waitpid an exit code is lost by that. Its loader polls as well.
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        self.processes = getattr(iterator, "_workers", ())
        return map(unpacked, iterator)


@contextlib.contextmanager
def naming_lost_workers(loaders: Iterable[WatchedLoader]) -> Iterator[None]:
    """Around what uses the loaders: the death of a worker process becomes a DataError that names how it died.

    It shows as a RuntimeError of torch's loader, within 5 s, or as a broken connection to the worker. A DataError of a
    worker, to which torch adds a traceback, becomes its own sentence again.
    """
    try:
        yield
    except DataError as error:
        if not str(error).startswith("Caught DataError in "):
            raise
        raise DataError(str(error).strip().splitlines()[-1].partition("DataError: ")[2]) from None
    except (RuntimeError, OSError, EOFError) as error:
        if any(phrase in str(error) for phrase in NO_SHARED_MEMORY):
            raise DataError(
                f"the batches of the loader workers do not fit into /dev/shm, of which {_free_shared_memory()}: start "
                "the container with --shm-size=8g or --ipc=host, lower data.workers or data.batch_size, or set "
                "data.workers=0; the same command continues after the last checkpoint."
            ) from error
        if any(phrase in str(error) for phrase in NO_FILES):
            raise DataError(
                "too many files are open for this number of loader workers: raise the limit (ulimit -n), or lower "
                "data.workers; the same command continues after the last checkpoint."
            ) from error
        lost = _lost_worker(loaders, wait=isinstance(error, ConnectionError | EOFError | FileNotFoundError))
        if lost is None:
            raise
        pid, code = lost
        how = f"was killed by a signal ({signal.strsignal(-code)})" if code < 0 else f"ended with exit code {code}"
        raise DataError(
            f"loader worker process {pid} {how}, perhaps for want of memory: lower data.workers or data.batch_size;"
            " the same command continues after the last checkpoint."
        ) from error


def _free_shared_memory() -> str:
    usage = shutil.disk_usage("/dev/shm") if os.path.isdir("/dev/shm") else None
    return (
        "this machine has none" if usage is None else f"{usage.free / 1e6:,.0f} of {usage.total / 1e6:,.0f} MB are free"
    )


def _lost_worker(loaders: Iterable[WatchedLoader], wait: bool) -> tuple[int, int] | None:
    """(pid, exit code) of a worker that failed. wait: up to WAIT for its death, after a broken connection."""
    processes = [process for loader in loaders for process in loader.processes]
    until = time.monotonic() + (WAIT if wait and processes else 0)
    while True:
        for process in processes:
            if process.exitcode:
                return process.pid or 0, process.exitcode
        if time.monotonic() >= until:
            return None
        time.sleep(0.02)


def outlive_signals(worker_id: int) -> None:
    """A worker_init_fn: signals that end a run must not end its workers first, for it goes on to its checkpoint.

    Ctrl-C and schedulers signal every process of a job. SIGINT and SIGUSR1 are ignored, and SIGTERM unless the run
    itself sends it, as torch and multiprocessing do when they clean up: they would wait forever for a worker that
    ignored it. A worker whose run is gone ends by itself in 5 s.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS has none, and so keeps torch's handler
        # Only a thread that waits for the signal learns who sent it, and only if no other thread would take it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_await_sigterm, args=(os.getppid(),), daemon=True).start()


def _await_sigterm(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)  # as torch's own handler does
