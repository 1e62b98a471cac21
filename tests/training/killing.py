"""Runs in processes of their own, to be killed for good. A process is forked from this one, so that it need not import
everything again."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from msil.config import Config
from msil.training.experiment import run

DEADLINE_SECONDS = 120.0


def started(config: Config) -> int:
    """Run `config` in a child; its pid."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        run(config)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def saves(checkpoint: Path, pid: int, count: int) -> None:
    """Wait until the process has saved `count` more checkpoints; fails if it ends before."""
    wait_for(lambda: ended(pid), lambda: stamp(checkpoint), count)


def wait_for(has_ended: Callable[[], bool], state: Callable[[], object], changes: int) -> None:
    """Wait until `state()` has changed so many times."""
    seen, deadline = state(), time.monotonic() + DEADLINE_SECONDS
    while changes > 0:
        assert time.monotonic() < deadline, "nothing was saved in time"
        now = state()
        if now != seen:
            seen, changes = now, changes - 1
        else:
            assert not has_ended(), "it ended before it was killed"
            time.sleep(0.002)


def stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def kill_at_random(pid: int, checkpoint: Path, dice: random.Random) -> None:
    """kill -9 at a random moment: one to three checkpoints from now and up to a step's time later."""
    saves(checkpoint, pid, dice.randint(1, 3))
    time.sleep(dice.uniform(0, 0.1))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, "it ended by itself"


def killed_itself(pid: int) -> bool:
    """Wait for its end: whether SIGKILL was it."""
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
