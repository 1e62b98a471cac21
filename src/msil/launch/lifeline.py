"""A process that ends when its parent does, however the parent ends, kill -9 included. Standard library alone.

The parent holds the writing end of a pipe to which nothing is written. The system closes it when the parent ends, and
the child reads the end of the file. Process ids, which are reused, are not polled, and nothing is specific to Linux.
"""

from __future__ import annotations

import os
import signal
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PARENT_PIPE = "MSIL_PARENT_PIPE"  # the environment variable with the pipe's file descriptor
GRACE_SECONDS = 20.0


@contextmanager
def lifeline() -> Iterator[int]:
    """The reading end of a pipe that breaks when this process ends or the block does.

    For each process started by exec: `Popen(..., pass_fds=(fd,), env={..., PARENT_PIPE: str(fd)})`. A forked process
    would inherit the writing end too, and keep itself alive.
    """
    reading, writing = os.pipe()
    try:
        yield reading
    finally:
        os.close(reading)
        os.close(writing)


def end_with_parent(grace_seconds: float = GRACE_SECONDS) -> None:
    """From here on this process gets SIGTERM when the pipe of its environment breaks, and SIGKILL after the grace.

    SIGKILL goes to its whole process group where it leads one. Does nothing without a pipe. To be called once, early,
    in the main process; what this process starts is not bound to the pipe.
    """
    name = os.environ.pop(PARENT_PIPE, "")
    # A shell in between closes the file, and its number may by now be another file's.
    with suppress(OSError):
        if name.isdecimal() and stat.S_ISFIFO(os.fstat(int(name)).st_mode):
            os.set_inheritable(int(name), False)
            threading.Thread(target=_wait, args=(int(name), grace_seconds), name="end-with-parent", daemon=True).start()


def _wait(fd: int, grace_seconds: float) -> None:
    while os.read(fd, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_seconds)
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(128 + signal.SIGTERM)
