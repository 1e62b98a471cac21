"""What a sweep shows while it runs: a line for each change of a job, and on a terminal one live line below them."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TextIO

from msil.reporting.formats import duration, percent
from msil.runs import read_result
from msil.sweep.estimate import seconds_left
from msil.sweep.jobs import Job, Sweep
from msil.sweep.processes import Outcome, console_log
from msil.sweep.progress import brief_position, position, progress

REFRESH_SECONDS = 1.0


class Screen:
    """Prints to `stream`; the live line appears only if that is a terminal.

    A stream that cannot be written to any more (a closed terminal, a log on a full disk) costs its lines, no job.
    """

    def __init__(
        self,
        sweep: Sweep,
        outcomes: Sequence[Outcome],
        n_jobs: int,
        *,
        expected: Mapping[int, float],
        stream: TextIO | None = None,
    ) -> None:
        """expected: seconds that a job of that number is thought to take, until one of this sweep has finished."""
        self._stream = stream or sys.stdout
        self._outcomes = outcomes
        self._n_jobs = n_jobs
        self._expected = expected
        self._total = len(sweep.jobs)
        self._width = max(len(job.label) for job in sweep.jobs)
        self._live = self._stream.isatty()
        self._started: dict[int, float] = {}
        self._refreshed = 0.0
        self._said: set[str] = set()
        jobs = "1 job" if self._total == 1 else f"{self._total} jobs"
        at_once = "one at a time" if n_jobs == 1 else f"{n_jobs} at a time"
        self._print(f"Sweep {sweep.name}: {jobs}, {at_once}. Ctrl-C stops; the same command continues.")

    def changed(self, outcome: Outcome) -> None:
        """One line: the job's number, what sets it apart, its state; in a log, a second one when a job has ended."""
        job = outcome.job
        match outcome.state:
            case "running":
                self._started[job.number] = time.monotonic()
                self._say(job, f"started, log in {console_log(job)}")
            case "skipped":
                self._say(job, f"finished before, {_score(job)}")
            case "ok":
                self._say(job, f"finished in {duration(outcome.seconds)}, {_score(job)}")
            case "interrupted":
                self._say(job, f"stopped after {duration(outcome.seconds)}; the same command continues it")
            case "failed":
                first, *log = outcome.reason.splitlines()
                self._say(job, f"FAILED after {duration(outcome.seconds)}: {first}")
                self._print(f"      log: {console_log(job)}{', which ends:' if log else ''}")
                for line in log:
                    self._print(f"      | {line}")
        if outcome.state in ("ok", "failed") and not self._live and self._is_anything_left():
            states = [outcome.state for outcome in self._outcomes]
            self._print(f"      {position(states, self._seconds_left())}")

    def tick(self) -> None:
        now = time.monotonic()
        if not self._live or now - self._refreshed < REFRESH_SECONDS:
            return
        self._refreshed = now
        running = [outcome for outcome in self._outcomes if outcome.state == "running"]
        states = [outcome.state for outcome in self._outcomes]
        parts = [brief_position(states, self._seconds_left()), *(self._progress(outcome, now) for outcome in running)]
        line = "   ".join(parts)[: shutil.get_terminal_size().columns - 1]
        with contextlib.suppress(OSError):
            self._stream.write(f"\r\x1b[2K{line}")
            self._stream.flush()

    def stopping(self, count: int, grace_seconds: float) -> None:
        jobs = "the running job; it saves" if count == 1 else f"the {count} running jobs; they save"
        self._print(
            f"Stopping {jobs} a checkpoint first, in at most {duration(grace_seconds)}. Ctrl-C again kills at once."
        )

    def trouble(self, sentence: str) -> None:
        """Said once."""
        if sentence not in self._said:
            self._said.add(sentence)
            self._print(f"warning: {sentence}")

    def say(self, sentence: str) -> None:
        self._print(sentence)

    def _seconds_left(self) -> float | None:
        now = time.monotonic()
        return seconds_left(
            [outcome.seconds for outcome in self._outcomes if outcome.done],
            [self._expected.get(outcome.job.number) for outcome in self._outcomes if outcome.state == "waiting"],
            [
                (self._expected.get(number), now - self._started[number])
                for number in (outcome.job.number for outcome in self._outcomes if outcome.state == "running")
            ],
            self._n_jobs,
        )

    def _progress(self, outcome: Outcome, now: float) -> str:
        words = [progress(outcome.job.run_dir).text(), duration(now - self._started[outcome.job.number])]
        return f"{outcome.job.label}: {', '.join(word for word in words if word)}"

    def _is_anything_left(self) -> bool:
        return any(outcome.state in ("waiting", "running") for outcome in self._outcomes)

    def _say(self, job: Job, text: str) -> None:
        self._print(f"[{job.number:{len(str(self._total))}}/{self._total}] {job.label:{self._width}}  {text}")

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError):
            if self._live:
                self._stream.write("\r\x1b[2K")
            self._stream.write(text + "\n")
            self._stream.flush()


def _score(job: Job) -> str:
    result = read_result(job.run_dir)
    return f"AP {percent(None if result is None else result['metrics'].get('AP'))}"
