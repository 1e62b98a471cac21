"""A process that ends with its parent, however the parent ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from msil.launch.lifeline import PARENT_PIPE

from .faults import alive, until

CHILD = """
import pathlib, signal, sys, time
from msil.launch.lifeline import end_with_parent
here = pathlib.Path(sys.argv[1])
end_with_parent(0.2)
signal.signal(signal.SIGTERM, {})
(here / "ready").touch()
time.sleep(60)
"""
SAVES = "lambda *_: ((here / 'saved').touch(), sys.exit(75))"
PARENT = """
import os, pathlib, subprocess, sys, time
from msil.launch.lifeline import PARENT_PIPE, lifeline
with lifeline() as pipe:
    command = [sys.executable, "-c", sys.argv[2], sys.argv[1]]
    environment = {**os.environ, PARENT_PIPE: str(pipe)}
    child = subprocess.Popen(command, env=environment, pass_fds=(pipe,), start_new_session=True)
    (pathlib.Path(sys.argv[1]) / "pid").write_text(str(child.pid))
    time.sleep(60)
"""


@pytest.mark.parametrize("handler", [SAVES, "signal.SIG_IGN"])
def test_a_child_ends_when_its_parent_is_killed(tmp_path: Path, handler: str) -> None:
    """After it has saved, or, deaf to SIGTERM, after the grace."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), CHILD.format(handler)])
    until((tmp_path / "ready").exists)
    pid = int((tmp_path / "pid").read_text())
    assert alive(pid)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    until(lambda: not alive(pid))
    assert (tmp_path / "saved").exists() == (handler == SAVES)


def test_without_a_pipe_nothing_happens(tmp_path: Path) -> None:
    """Neither without the variable nor where the number is by now that of another file."""
    code = "import os, threading; from msil.launch.lifeline import end_with_parent; end_with_parent();"
    code += f"assert threading.active_count() == 1 and {PARENT_PIPE!r} not in os.environ"
    with (tmp_path / "file").open("w") as file:
        for value in (None, "x", "987", str(file.fileno())):
            environment = {**os.environ} if value is None else {**os.environ, PARENT_PIPE: value}
            subprocess.run([sys.executable, "-c", code], env=environment, pass_fds=(file.fileno(),), check=True)
