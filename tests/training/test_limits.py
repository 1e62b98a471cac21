"""A run with too little memory, and a folder that another run works in."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from msil.lock import Locked, locked
from msil.training.experiment import run

from .cases import tiny_config
from .faults import folder

RUN = Path(__file__).resolve().parents[2] / "run.py"


# Memory


def test_too_little_memory_is_said_with_what_to_set(tmp_path: Path) -> None:
    """A process whose address space is limited, and images (of 64 pixels, made larger for the net) too large for it."""
    words = [
        "schedule=smoke", "data.image_size=64", "data.num_train=4", "data.num_val=2", "data.min_size=2048",
        "data.max_size=2048", f"data.root={tmp_path}/data", f"runs_dir={tmp_path}/runs", "trainer.accelerator=cpu",
        "run_name=large", "logger=csv",
    ]  # fmt: skip
    limit = 7 << 30
    ended = subprocess.run(
        [sys.executable, str(RUN), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert ended.returncode == 2, ended.stderr
    assert re.fullmatch(
        r"error: out of memory in training step 1 on 2 images of up to 2048x2048 pixels: raise trainer\.accumulate.*or"
        r" lower data\.batch_size \(now 2\), lower data\.min_size .* the same command continues.*",
        ended.stderr.strip().splitlines()[-1],
    ), ended.stderr
    assert "Traceback" not in ended.stderr


# One folder


def test_a_second_run_is_told_who_is_there(tmp_path: Path, shapes: Path) -> None:
    config = tiny_config(tmp_path, shapes, "run_name=mine")
    code = (
        "import sys, pathlib\nfrom msil.lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print(1, flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(folder(config))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "1\n"
    try:
        with pytest.raises(
            Locked, match=rf"mine is in use by another run \(pid {other.pid} on host {os.uname().nodename}"
        ):
            run(config)
    finally:
        other.kill()
        other.communicate()


def test_a_lock_left_behind_by_a_killed_run_locks_nothing(tmp_path: Path) -> None:
    """Even while a child of it, such as a loader's worker, still lives."""
    ready, done = os.pipe(), os.pipe()
    holder = os.fork()
    if holder == 0:
        with locked(tmp_path):
            if os.fork() == 0:
                os.write(ready[1], b"%d" % os.getppid())
                os.read(done[0], 1)
                os._exit(0)
            signal.pause()
    assert int(os.read(ready[0], 20)) == holder
    with pytest.raises(Locked), locked(tmp_path):
        pass
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    with locked(tmp_path):
        pass
    os.write(done[1], b"x")
