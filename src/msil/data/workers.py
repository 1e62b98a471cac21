"""Loader worker processes: the signals that they outlive, and what to report when one of them dies."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader

from msil.errors import DataError

WAIT = 5.0  # seconds; a child's death shows after some milliseconds


class WatchedLoader(DataLoader):
    """Keeps its worker processes, for their exit codes after torch has cleaned up.

    processes: of the last epoch.
    """

    processes: Sequence[BaseProcess] = ()

    def __iter__(self) -> Any:
        handler = signal.getsignal(signal.SIGCHLD)
        iterator = super().__iter__()
        if threading.current_thread() is threading.main_thread():
            # torch's handler raises at any line, and in waitpid an exit code is lost by that. Its loader polls as well.
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        self.processes = getattr(iterator, "_workers", ())
        return iterator


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
        lost = _lost_worker(loaders, wait=isinstance(error, ConnectionError | EOFError | FileNotFoundError))
        if lost is None:
            raise
        pid, code = lost
        how = f"was killed by a signal ({signal.strsignal(-code)})" if code < 0 else f"ended with exit code {code}"
        raise DataError(
            f"loader worker process {pid} {how}, perhaps for want of memory: lower data.workers or data.batch_size;"
            " the same command continues after the last checkpoint."
        ) from error


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
