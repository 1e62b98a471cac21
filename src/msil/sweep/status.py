"""`msil status`: what the sweeps of a folder are doing, as text. Standard library alone, so that it answers at once."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from msil.errors import DataError
from msil.reporting.formats import MISSING, duration, percent
from msil.runs import read_result
from msil.sweep.estimate import seconds_left
from msil.sweep.progress import position, progress
from msil.sweep.record import SWEEP_FILE, JobState, SweepState, is_running, read_sweep

PREEMPTED = 75  # the exit code of a run that a signal to itself has stopped
STATES = {"ok": "finished", "skipped": "finished", "interrupted": "stopped"}
HEAD = ("job", "settings", "state", "epoch", "loss", "AP", "time")
NUMBERS = ("job", "epoch", "loss", "AP", "time")  # flush right


def status_lines(place: Path, *, show_all: bool = False, now: datetime | None = None) -> list[str]:
    """The sweeps in `place`, newest first: the first in full, the others a line each, or all in full.

    place: a folder of runs, or one sweep's own folder. A damaged sweep.json costs one sentence.
    Raises DataError if there is no sweep, or none that can be read.
    """
    now = now or datetime.now(UTC)
    folders = _sweeps_in(place)
    found: list[SweepState] = []
    damaged: list[str] = []
    for folder in folders:
        try:
            found.append(read_sweep(folder))
        except DataError as error:
            damaged.append(str(error))
    if not found:
        raise DataError(damaged[0])
    found.sort(key=lambda state: state.updated, reverse=True)
    lines: list[str] = []
    for number, state in enumerate(found):
        if number == 0 or show_all:
            lines += [*([""] if lines else []), *_in_full(state, now)]
        else:
            lines += ["", "earlier:"] if number == 1 else []
            lines.append(f"  {_heading(state, now)}; {_position(state, now)}")
    return [*lines, *(f"warning: {sentence}" for sentence in damaged)]


def _sweeps_in(place: Path) -> list[Path]:
    if (place / SWEEP_FILE).exists():
        return [place]
    found = sorted(path.parent for path in [*place.glob(f"sweeps/*/{SWEEP_FILE}"), *place.glob(f"*/{SWEEP_FILE}")])
    if not found:
        raise DataError(
            f"no sweep is in {place}: `python run.py -m ...` makes one; "
            "name the runs folder, or a sweep's own, if it is elsewhere."
        )
    return found


def _in_full(state: SweepState, now: datetime) -> list[str]:
    alive = is_running(state)
    lines = [_heading(state, now), _position(state, now)]
    if alive is False and any(job.state not in ("ok", "skipped") for job in state.jobs):
        lines.append(f"the same command continues it: {_printable(state.command)}")
    rows = [HEAD, *(_row(job, alive, now) for job in state.jobs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    lines.append("")
    for row in rows:
        cells = [
            cell.rjust(width) if name in NUMBERS else cell.ljust(width)
            for name, cell, width in zip(HEAD, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    failed = [f"log of job {job.number}: {job.log}" for job in state.jobs if job.state == "failed"]
    return [*lines, *([""] if failed else []), *failed]


def _heading(state: SweepState, now: datetime) -> str:
    by = f"pid {state.pid} on {state.host}"
    match is_running(state):
        case True:
            return f"{state.name}: running for {_since(state.started, now)} ({by}, n_jobs={state.n_jobs})"
        case None:
            return (
                f"{state.name}: last change {_since(state.updated, now)} ago; started on another host ({by}), "
                "which alone can tell whether it still runs"
            )
        case False if state.ended is not None:
            word = "stopped" if _any(state, "waiting", "interrupted") else "ended"
            return f"{state.name}: {word} {_since(state.ended, now)} ago"
    return f"{state.name}: the sweep was killed ({by} is gone), last change {_since(state.updated, now)} ago"


def _position(state: SweepState, now: datetime) -> str:
    alive = is_running(state)
    states = [_state(job, alive) for job in state.jobs]
    return position(states, _seconds_left(state, now), live=alive is not False)


def _seconds_left(state: SweepState, now: datetime) -> float | None:
    return seconds_left(
        [job.seconds for job in state.jobs if job.state in ("ok", "skipped")],
        [job.expected for job in state.jobs if job.state == "waiting"],
        [
            (job.expected, 0.0 if job.started is None else (now - job.started).total_seconds())
            for job in state.jobs
            if job.state == "running"
        ],
        state.n_jobs,
    )


def _row(job: JobState, alive: bool | None, now: datetime) -> Sequence[str]:
    state = _state(job, alive)
    seconds: float | None = job.seconds or None
    epoch, loss, ap = MISSING, MISSING, MISSING
    if state in ("ok", "skipped"):
        result = read_result(job.run_dir)
        ap = percent(None if result is None else result["metrics"].get("AP"))
    elif state != "waiting":
        latest = progress(job.run_dir)
        epoch = MISSING if latest.epoch is None else str(latest.epoch)
        loss = MISSING if latest.loss is None else f"{latest.loss:.3f}"
        ap = percent(latest.ap)
    if state == "running" and job.started is not None:
        seconds = (now - job.started).total_seconds()
    words = STATES.get(state, state)
    if state == "failed" and job.exit_code is not None:
        words = "preempted" if job.exit_code == PREEMPTED else f"failed ({_exit(job.exit_code)})"
    return (str(job.number), _printable(job.label), words, epoch, loss, ap, duration(seconds))


def _printable(text: str) -> str:
    """Without what a terminal would take for commands."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _state(job: JobState, alive: bool | None) -> str:
    return "killed" if job.state == "running" and alive is False else job.state


def _exit(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit {code}"


def _any(state: SweepState, *names: str) -> bool:
    return any(job.state in names for job in state.jobs)


def _since(earlier: datetime, now: datetime) -> str:
    return duration(max(0.0, (now - earlier).total_seconds()))
