"""A process that ends with its parent, however the parent ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from msil.sweep.orphans import PARENT_PIPE

CHILD = """
import pathlib, signal, sys, time
from msil.sweep.orphans import end_with_parent
here = pathlib.Path(sys.argv[1])
end_with_parent(0.2)
{}
(here / "ready").touch()
time.sleep(60)
"""
SAVES = "signal.signal(signal.SIGTERM, lambda *_: ((here / 'saved').touch(), sys.exit(75)))"
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
PARENT = """
import os, pathlib, subprocess, sys, time
from msil.sweep.orphans import PARENT_PIPE, lifeline
with lifeline() as pipe:
    command = [sys.executable, "-c", sys.argv[2], sys.argv[1]]
    environment = {**os.environ, PARENT_PIPE: str(pipe)}
    child = subprocess.Popen(command, env=environment, pass_fds=(pipe,), start_new_session=True)
    (pathlib.Path(sys.argv[1]) / "pid").write_text(str(child.pid))
    time.sleep(60)
"""


def until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1].startswith("Z")
    except FileNotFoundError:
        return True


def orphaned(folder: Path, what_it_does: str) -> int:
    """The process id of a child whose parent has been killed by kill -9."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(folder), CHILD.format(what_it_does)])
    assert until((folder / "ready").exists)
    pid = int((folder / "pid").read_text())
    assert not gone(pid)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    return pid


def test_a_child_saves_and_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    pid = orphaned(tmp_path, SAVES)
    assert until(lambda: gone(pid))
    assert (tmp_path / "saved").exists()


def test_a_child_that_does_not_end_is_ended(tmp_path: Path) -> None:
    pid = orphaned(tmp_path, DEAF)
    assert until(lambda: gone(pid))


def test_without_a_pipe_nothing_happens(tmp_path: Path) -> None:
    """Neither without the variable nor where the number is by now that of another file."""
    code = "import os, threading; from msil.sweep.orphans import end_with_parent; end_with_parent();"
    code += f"assert threading.active_count() == 1 and {PARENT_PIPE!r} not in os.environ"
    with (tmp_path / "file").open("w") as file:
        for value in (None, "", "x", "987", str(file.fileno())):
            environment = {**os.environ} if value is None else {**os.environ, PARENT_PIPE: value}
            subprocess.run([sys.executable, "-c", code], env=environment, pass_fds=(file.fileno(),), check=True)
