"""What a sweep prints: a line when a job starts and when it ends, and its table."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msil.reporting.sweep_table import sweep_table
from msil.reporting.tables import duration, percent, to_text, write_table
from msil.runs import CONSOLE
from msil.sweep.plan import Job, Sweep, varied


@dataclass
class Outcome:
    job: Job
    state: str  # skipped (finished before), waiting, running, ok, failed, interrupted
    exit_code: int | None = None
    seconds: float = 0.0
    reason: str = ""  # of a failure: a line that says how, then the end of the job's log
    result: Mapping[str, Any] | None = None  # of these settings: its folder may hold that of a longer run by now

    @property
    def done(self) -> bool:
        return self.state in ("ok", "skipped")


def say(text: str) -> None:
    """Print, except to a terminal that is closed or a log on a full disk."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def dry_run(outcomes: Sequence[Outcome]) -> None:
    for outcome in outcomes:
        state = f"finished, {_ap(outcome)}" if outcome.done else "to run"
        _say_of(outcome.job, outcomes, f"{state}  {outcome.job.run_dir}")


def say_change(outcome: Outcome, outcomes: Sequence[Outcome]) -> None:
    """One line: the job's number, its label, its state; of a failure also the log's path and end."""
    job, time = outcome.job, duration(outcome.seconds)
    first, *log = outcome.reason.splitlines() or [""]
    text = {
        "skipped": f"finished before, {_ap(outcome)}",
        "running": f"started, log: {job.run_dir / CONSOLE}",
        "ok": f"finished in {time}, {_ap(outcome)}",
        "interrupted": f"stopped after {time}; the same command continues it",
        "failed": f"FAILED after {time}: {first}",
    }
    _say_of(job, outcomes, text[outcome.state])
    if outcome.state == "failed":
        say("\n".join([f"      log: {job.run_dir / CONSOLE}", *(f"      | {line}" for line in log)]))


def _say_of(job: Job, outcomes: Sequence[Outcome], text: str) -> None:
    count, width = len(outcomes), max(len(other.job.label) for other in outcomes)
    say(f"[{job.number:{len(str(count))}}/{count}] {job.label:{width}}  {text}")


def report(sweep: Sweep, outcomes: Sequence[Outcome]) -> bool:
    """Writes and prints the sweep's table, then counts; returns whether the files could be written."""
    table = sweep_table([_row(outcome) for outcome in outcomes], varied([job.overrides for job in sweep.jobs]))
    unwritten = None
    try:
        write_table(sweep.folder, table)
    except OSError as error:
        unwritten = error.strerror
    files = "" if unwritten else f" Table: {sweep.folder}/table.md, table.csv"
    say(f"\n{to_text(table)}\n{count(outcomes)}{files}")
    if any(outcome.done for outcome in outcomes):
        runs_dir = shlex.quote(str(sweep.jobs[0].run_dir.parent))
        say(f"With intervals, curves, errors and pictures: msil report {runs_dir}")
    if unwritten:
        print(
            f"error: the table cannot be written to {sweep.folder} ({unwritten}): make room and run the same command "
            "again; finished jobs are not repeated.",
            file=sys.stderr,
        )
    return unwritten is None


def count(outcomes: Sequence[Outcome]) -> str:
    """`5 ok, 1 failed of 6.`"""
    states = [outcome.state for outcome in outcomes]
    numbers = {
        "ok": sum(outcome.done for outcome in outcomes),
        "failed": states.count("failed"),
        "stopped": states.count("interrupted"),
        "not started": states.count("waiting"),
    }
    words = ", ".join(f"{number} {word}" for word, number in numbers.items() if number or word in ("ok", "failed"))
    return f"{words} of {len(outcomes)}."


def _ap(outcome: Outcome) -> str:
    return f"AP {percent(None if outcome.result is None else outcome.result['metrics'].get('AP'))}"


def _row(outcome: Outcome) -> dict[str, Any]:
    """What the table needs of a job: its result, or how it ended."""
    if outcome.result is not None:
        return {**outcome.result, "skipped": outcome.state == "skipped"}
    status = {"waiting": "waiting", "interrupted": "stopped"}.get(outcome.state, "failed")
    return {
        "run_name": outcome.job.run_dir.name,
        "status": status,
        "exit_code": outcome.exit_code,
        "config": dict(outcome.job.values),
    }
