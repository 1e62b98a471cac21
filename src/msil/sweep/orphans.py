"""A process that ends when the one that started it does, however that ends, kill -9 included.

The starter keeps one end of a pipe that nobody writes to. The system closes it with the starter, and the process at the
other end reads the end of the file. No polling of process ids, which are used again, and nothing of Linux alone.
Standard library alone.
"""

from __future__ import annotations

import os
import signal
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

PARENT_PIPE = "MSIL_PARENT_PIPE"  # the environment variable that names the pipe's file descriptor
GRACE_SECONDS = 20.0


@contextmanager
def lifeline() -> Iterator[int]:
    """The reading end of a pipe that breaks when this process ends or the block does.

    For each process started by exec: `Popen(..., pass_fds=(fd,), env={..., PARENT_PIPE: str(fd)})`. A process that is
    forked and goes on in Python would inherit the other end too, and keep itself alive.
    """
    reading, writing = os.pipe()
    try:
        yield reading
    finally:
        os.close(reading)
        os.close(writing)


def end_with_parent(grace_seconds: float = GRACE_SECONDS) -> None:
    """From here on this process gets SIGTERM when the pipe of its environment breaks, and is ended after the grace.

    Ended with its whole process group, where it leads one. Does nothing without a pipe. To be called once, early and
    in the main process; what this process starts is not bound to the pipe.
    """
    name = os.environ.pop(PARENT_PIPE, "")
    # A number that came through a shell which closed the file would by now name some other file, or none.
    if name.isdecimal() and _is_pipe(int(name)):
        os.set_inheritable(int(name), False)
        threading.Thread(target=_wait, args=(int(name), grace_seconds), name="end-with-parent", daemon=True).start()


def _is_pipe(fd: int) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(fd).st_mode)
    except OSError:
        return False


def _wait(fd: int, grace_seconds: float) -> None:
    try:
        while os.read(fd, 1):
            pass
    except OSError:  # nothing can be said of the parent any more, so nothing is done to this process
        return
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_seconds)
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(128 + signal.SIGTERM)
