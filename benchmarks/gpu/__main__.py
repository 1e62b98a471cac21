"""Everything about one NVIDIA GPU in one call: whether it is right there (group A), then how fast it is (group B).

    python -m benchmarks.gpu --out gpu --limit 330                  # seconds in all
    python -m benchmarks.gpu --out gpu --only fcos8 micro           # some parts
    python -m benchmarks.gpu --out gpu --device cpu --limit 3000    # a rehearsal at toy size, without a GPU

Each part is a process of its own. In a call of all parts it has a time limit of its own, by --only that of the call:
what is compiled can take minutes, and a second call finds it in PyTorch's cache. Those of A run side by side, those of
B alone, the most important first; what the time does not suffice for is left out. Into OUT: log.txt, all that the parts
print, and results.json, written anew whenever a part reports, whose rows `python -m benchmarks --gpu OUT/results.json`
puts into the table of docs/performance.md.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # it imports torch, which the parts' processes are to do at once
    from benchmarks.compare import Row

ROOT = Path(__file__).resolve().parents[2]
SHARE_OF_A = 0.48  # of the time, where B is to run too
PACKAGES = ("torch", "torchvision", "lightning")
VERSIONS = ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in PACKAGES)])
LEAST_S = 12  # no part begins with less
NO_GPU = "no GPU here; python -m benchmarks.gpu on a machine with one writes these rows."


class Part(NamedTuple):
    """function: "module.function" of this package; called as function(setup, *arguments), it emits checks or returns
    rows of the table."""

    group: str
    seconds: int
    function: str
    arguments: tuple[Any, ...] = ()


PARTS = {
    "runs": Part("A", 160, "runs.runs"),
    "units": Part("A", 120, "units.units"),
    "waits": Part("A", 120, "training.waits"),
    "moved": Part("A", 120, "training.moved"),
    "tests": Part("A", 150, "training.own_tests"),
    # The compiler's cache is filled beside these: what is measured later does not wait for it.
    "prime-fcos": Part("A", 160, "speed.prime", ("fcos", 8)),
    "prime-fcos2": Part("A", 160, "speed.prime", ("fcos", 2)),
    "prime-vfnet": Part("A", 160, "speed.prime", ("vfnet", 8)),
    "fcos8": Part("B", 75, "speed.training", ("fcos", 8)),
    "predict": Part("B", 60, "speed.inference", ("fcos",)),
    "micro": Part("B", 60, "micro.micro"),
    "env": Part("B", 25, "bounds.ceilings"),
    "vfnet8": Part("B", 50, "speed.training", ("vfnet", 8)),
    "predict-vfnet": Part("B", 45, "speed.inference", ("vfnet",)),
    "fcos2": Part("B", 75, "speed.training", ("fcos", 2)),
    "profile": Part("B", 45, "bounds.profiled"),
    "loader": Part("B", 40, "bounds.loading"),
}


class Call:
    """All parts of one call, and what they report."""

    def __init__(self, options: argparse.Namespace, chosen: list[str]) -> None:
        self.options, self.chosen, self.began = options, chosen, time.monotonic()
        self.out: Path = options.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = (self.out / "log.txt").open("w")
        self.lock = threading.Lock()
        self.parts: dict[str, dict[str, Any]] = {}
        self.rows: list[dict[str, Any]] = []
        self.on_gpu = options.device == "cuda"
        self.waiting: dict[str, subprocess.Popen[str]] = {}

    def passed(self) -> float:
        return time.monotonic() - self.began

    def started(self, name: str) -> subprocess.Popen[str]:
        folders = (ROOT / "src", ROOT, ROOT / "tests", os.environ.get("PYTHONPATH", ""))
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "PYTHONUNBUFFERED": "1"}
        compilers = 4 if PARTS[name].group == "A" else os.cpu_count()
        env |= {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": str(compilers), "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--device", self.options.device]
        return subprocess.Popen(
            command, cwd=ROOT, env=env, text=True, errors="replace", start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def all(self) -> None:
        first = [name for name in self.chosen if PARTS[name].group == "A"]
        then = [name for name in self.chosen if PARTS[name].group == "B"]
        until = self.options.limit * (SHARE_OF_A if then and self.on_gpu else 1)
        threads = [threading.Thread(target=self.run, args=(name, until)) for name in first]
        for thread in threads:
            thread.start()
            if not self.on_gpu:
                thread.join()
        if self.on_gpu:  # those that wait their turn have imported everything by then
            time.sleep(30 if first else 0)
            self.waiting = {name: self.started(name) for name in then}
        for thread in threads:
            thread.join()
        for name in then:
            self.run(name, self.options.limit)

    def run(self, name: str, until: float) -> None:
        process = self.waiting.pop(name, None) or self.started(name)
        own = PARTS[name].seconds * (1 if self.on_gpu else 20)
        allowed = min(own if len(self.chosen) == len(PARTS) else self.options.limit, until - self.passed())
        if allowed < LEAST_S:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self.ended(name, "left out: no time")
            return
        began = time.monotonic()
        timer = threading.Timer(allowed, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        assert process.stdin and process.stdout
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write("go\n")
            process.stdin.flush()
        tail: collections.deque[str] = collections.deque(maxlen=14)
        for line in process.stdout:
            with self.lock:
                self.log.write(f"{name}| {line}" if line.strip() else "")
            if not (line.startswith("@@") and self.reported(name, line[2:])):
                tail.append(line.rstrip()[:250])
        code = process.wait()
        timer.cancel()
        state = {0: "ok", -signal.SIGKILL: "stopped at its limit"}.get(code, "failed")
        self.ended(name, state, round(time.monotonic() - began, 1), [*tail] if state == "failed" else [])

    def reported(self, name: str, text: str) -> bool:
        """Whether it is a whole row: another process may have written into the line."""
        try:
            row = {"part": name, **json.loads(text)}
        except ValueError:
            return False
        with self.lock:
            self.rows.append(row)
            self.write()
        if PARTS[name].group == "B" or not row["ok"]:
            print(f"{self.passed():4.0f} s {said(row)[:230]}", flush=True)
        return True

    def ended(self, name: str, state: str, seconds: float = 0, tail: Sequence[str] = ()) -> None:
        with self.lock:
            self.parts[name] = {"state": state, "s": seconds, "tail": tail}
            self.log.flush()
            self.write()

    def write(self) -> None:
        """results.json, whole at any time."""
        found: dict[str, Any] = {"rows": [row["row"] for row in self.rows if "row" in row]}
        found |= {"date": time.strftime("%F"), "machine": self.options.machine, "versions": VERSIONS}
        found |= {"seconds": round(self.passed()), "parts": self.parts, "checks": self.rows}
        text = json.dumps(found, indent=1, default=str) + "\n"
        for path in filter(None, (self.out / "results.json", self.options.json)):
            part = path.with_name(f".{path.name}")
            part.write_text(text)
            part.replace(path)

    def summary(self) -> None:
        """Last, so that the end of the output holds all that matters: parts, speed, what is not as it should be."""
        for name, state in self.parts.items():
            print(f"{name}: {state['state']}, {state['s']} s", *state["tail"], sep="\n    ")
        bad = [row for row in self.rows if not row["ok"]]
        for row in bad:
            print(f"\nBAD {said(row)[:600]}")
        print(f"\n{len(self.rows)} checks, {len(bad)} bad, {self.passed():.0f} s; {self.out / 'results.json'}")


def said(row: dict[str, Any]) -> str:
    if "row" in row:
        own = row["row"]
        numbers = " ".join(str(own[key]) for key in ("ours", "anchor", "ratio", "goal") if own[key])
        return f"{row['part']}: {own['name']}: {numbers} {own['agreement']}"
    return f"{row['part']}: {'ok ' if row['ok'] else 'BAD'} {row['check']}, {row['s']} s: {row['detail']}"


def part(name: str, device: str) -> None:
    module, function = PARTS[name].function.split(".")
    from benchmarks.gpu.common import SETUP, TOY, emit_rows

    act: Callable[..., Iterable[Row] | None] = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)
    if sys.stdin.readline():
        rows = act(SETUP if device == "cuda" else TOY, *PARTS[name].arguments)
        if rows is not None:
            emit_rows(name, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder for what is found (gpu)")
    parser.add_argument("--limit", type=float, default=600, help="seconds in all (600)")
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal at toy size")
    parser.add_argument("--json", type=Path, help="file to write the table's rows to as well")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = options.out.resolve()
    if options.part:
        part(options.part, options.device)
        return
    options.machine = "a CPU"
    if options.device == "cuda":
        try:
            query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
            options.machine = subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            print(f"not run: {NO_GPU}")
            if options.json:
                options.json.write_text(json.dumps({"not_run": NO_GPU}))
            return
    call = Call(options, [name for name in PARTS if name in options.only])
    call.all()
    call.summary()


if __name__ == "__main__":
    main()
