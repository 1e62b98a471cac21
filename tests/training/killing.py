"""Runs in processes of their own, to be killed for good. A process is forked from this one, so that it need not import
everything again."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
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


def kill_at_random(pid: int, checkpoint: Path, dice: random.Random) -> None:
    """kill -9 at a random moment: one to three checkpoints from now and up to a step's time later."""
    seen, deadline = _stamp(checkpoint), time.monotonic() + DEADLINE_SECONDS
    for _ in range(dice.randint(1, 3)):
        while (now := _stamp(checkpoint)) == seen:
            assert time.monotonic() < deadline, "nothing was saved in time"
            assert os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None, "it ended by itself"
            time.sleep(0.002)
        seen = now
    time.sleep(dice.uniform(0, 0.1))
    os.kill(pid, signal.SIGKILL)
    assert was_killed(pid), "it ended by itself"


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def was_killed(pid: int) -> bool:
    """Whether SIGKILL is its end, which this waits for."""
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
