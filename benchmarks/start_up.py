"""P14: from `python run.py` to the end of the first training step, default config, in at most 8 s on 2 cores, warm.

    python -m benchmarks.start_up

Wall-clock seconds of whole processes, the median of STARTS after one that also makes data=shapes; threads as a user
has them. benchmarks/first_step.py is run.py with time stamps; the rows below the goal say where the time goes, and how
much of it are the imports of which packages (by -X importtime, which itself costs a tenth; a package counts with its
own files, whoever asked for it).
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.compare import Row, run

ROOT = Path(__file__).resolve().parents[1]
STARTS = 5
GOAL = 8.0  # seconds

# Whose files the imports are of; the first match counts.
OWNERS = (
    ("torch._dynamo (for optimizers)", r"torch\._(dynamo|inductor|functorch)|torch\.fx|sympy|mpmath|triton"),
    ("torch, torchvision, numpy", r"torch|torchgen|torchvision|numpy|PIL"),
    ("scipy, matplotlib (for torchmetrics)", r"scipy|matplotlib|mpl_toolkits|pyparsing|dateutil|kiwisolver|fontTools"),
    ("lightning, torchmetrics", r"lightning|torchmetrics|lightning_utilities|fsspec|rich|aiohttp"),
    ("wandb", r"wandb|pydantic|pydantic_core|google|opentelemetry"),
    ("pycocotools, faster_coco_eval", r"pycocotools|faster_coco_eval"),
    ("hydra, omegaconf", r"hydra|omegaconf|antlr4|yaml|hydra_plugins"),
    ("msil", r"msil"),
    ("Python's own and others", r".*"),
)  # fmt: skip


def start(folder: Path, name: str, *options: str) -> tuple[dict[str, Any], str]:
    """One start in a process of its own: what benchmarks/first_step.py prints, and what is written to stderr."""
    command = [sys.executable, *options, "-m", "benchmarks.first_step"]
    settings = [f"runs_dir={folder / 'runs'}", f"data.root={folder / 'shapes'}", f"run_name={name}"]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment["STARTED"] = f"{time.time():.6f}"
    done = subprocess.run([*command, *settings], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def import_seconds(report: str) -> dict[str, float]:
    """Seconds by OWNERS of a report that -X importtime wrote."""
    seconds: dict[str, float] = defaultdict(float)
    for microseconds, module in re.findall(r"^import time: +(\d+) \| +\d+ \| +(\S+)$", report, re.MULTILINE):
        owner = next(owner for owner, names in OWNERS if re.match(rf"({names})(\.|$)", module))
        seconds[owner] += int(microseconds) / 1e6
    return dict(seconds)


def measure() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start(folder, "warm_up")
        starts = [start(folder, f"start{number}")[0] for number in range(STARTS)]
        imported = import_seconds(start(folder, "imports", "-X", "importtime")[1])
    total = statistics.median(sum(one["stages"].values()) for one in starts)
    cpu = statistics.median(one["cpu"] for one in starts)
    said = f"{cpu:.1f} CPU seconds; {STARTS} starts"
    yield Row("P14 start to first step", f"{total:.2f} s", "", None, f"<= {GOAL:g} s", total <= GOAL, said)
    for stage in starts[0]["stages"]:
        seconds = statistics.median(one["stages"][stage] for one in starts)
        yield Row(f"P14 {stage}", f"{seconds:.2f} s", "", None, "", None, "part of the start")
    for owner, _ in OWNERS:
        seconds = imported.get(owner, 0.0)
        yield Row(f"P14 imports: {owner}", f"{seconds:.2f} s", "", None, "", None, "part of the imports")


if __name__ == "__main__":
    run(measure, __doc__)
