"""What a sweep shows while it runs: a line for each change of a job, and on a terminal one live line below them."""

from __future__ import annotations

import csv
import shutil
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from msil.reporting.formats import duration, percent
from msil.reporting.results import read_result
from msil.sweep.jobs import Job, Sweep
from msil.sweep.processes import Outcome, console_log

REFRESH_SECONDS = 1.0


class Screen:
    """Prints to `stream`; the live line appears only if that is a terminal."""

    def __init__(self, sweep: Sweep, n_jobs: int, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._total = len(sweep.jobs)
        self._width = max(len(job.label) for job in sweep.jobs)
        self._live = self._stream.isatty()
        self._started: dict[int, float] = {}
        self._refreshed = 0.0
        jobs = "1 job" if self._total == 1 else f"{self._total} jobs"
        at_once = "one at a time" if n_jobs == 1 else f"{n_jobs} at a time"
        self._print(f"Sweep {sweep.name}: {jobs}, {at_once}. Ctrl-C stops; the same command continues.")

    def changed(self, outcome: Outcome) -> None:
        """One line: the job's number, what sets it apart, its state."""
        job = outcome.job
        if outcome.state == "running":
            self._started[job.number] = time.monotonic()
            self._say(job, f"started, log in {console_log(job)}")
        elif outcome.done:
            earlier = "finished before" if outcome.state == "skipped" else f"finished in {duration(outcome.seconds)}"
            self._say(job, f"{earlier}, {_score(job)}")
        elif outcome.state == "interrupted":
            self._say(job, f"stopped after {duration(outcome.seconds)}")
        else:
            first, *log = outcome.reason.splitlines()
            self._say(job, f"FAILED after {duration(outcome.seconds)}: {first}. Its log ends:")
            for line in log:
                self._print(f"      | {line}")

    def tick(self, running: Sequence[Outcome]) -> None:
        now = time.monotonic()
        if not self._live or now - self._refreshed < REFRESH_SECONDS:
            return
        self._refreshed = now
        parts = [
            f"{outcome.job.label}: {_progress(outcome.job)}{duration(now - self._started[outcome.job.number])}"
            for outcome in running
        ]
        line = "   ".join(parts)[: shutil.get_terminal_size().columns - 1]
        self._stream.write(f"\r\x1b[2K{line}")
        self._stream.flush()

    def _say(self, job: Job, text: str) -> None:
        self._print(f"[{job.number:{len(str(self._total))}}/{self._total}] {job.label:{self._width}}  {text}")

    def _print(self, text: str) -> None:
        if self._live:
            self._stream.write("\r\x1b[2K")
        self._stream.write(text + "\n")
        self._stream.flush()


def _score(job: Job) -> str:
    result = read_result(job.run_dir)
    return f"AP {percent(None if result is None else result['metrics'].get('AP'))}"


def _progress(job: Job) -> str:
    """`epoch 4, loss 1.234, AP 21.0, ` from the last rows of metrics.csv; empty before the first."""
    try:
        with (job.run_dir / "metrics.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError:  # not there yet
        return ""
    latest = {name: value for row in rows for name, value in row.items() if value}
    words = []
    try:
        if "epoch" in latest:
            words.append(f"epoch {int(float(latest['epoch'])) + 1}, ")
        if "loss" in latest:
            words.append(f"loss {float(latest['loss']):.3f}, ")
        if "AP" in latest:
            words.append(f"AP {percent(float(latest['AP']))}, ")
    except ValueError:  # a row half written
        return ""
    return "".join(words)
