"""P14: from `python run.py` to the end of the first training step, default config, in at most 8 s on 2 cores, warm.

    python -m benchmarks.start_up

Wall-clock seconds of whole processes, the median of STARTS after one that also makes data=shapes; threads as a user
has them.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.compare import Row, run

ROOT = Path(__file__).resolve().parents[1]
STARTS = 5
GOAL = 8.0  # seconds

# run.py, which prints the time at the optimizer's first step and ends there.
FIRST_STEP = """
import os, runpy, sys, time
from torch.optim.optimizer import register_optimizer_step_post_hook

def end(*_):
    print(f"first step at {time.time()}", flush=True)
    os._exit(0)

register_optimizer_step_post_hook(end)
sys.argv[0] = "run.py"
runpy.run_path("run.py", run_name="__main__")
"""


def start(folder: Path, name: str) -> float:
    """Seconds of one start in a process of its own."""
    settings = [f"runs_dir={folder / 'runs'}", f"data.root={folder / 'shapes'}", f"run_name={name}"]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-c", FIRST_STEP, *settings], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout.rpartition("first step at ")[2]) - began


def measure() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as name:
        start(Path(name), "warm_up")
        seconds = statistics.median(start(Path(name), f"start{number}") for number in range(STARTS))
    said = f"the median of {STARTS} starts"
    yield Row("P14 start to first step", f"{seconds:.2f} s", "", None, f"<= {GOAL:g} s", seconds <= GOAL, said)


if __name__ == "__main__":
    run(measure, __doc__)
