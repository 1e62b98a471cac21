"""How long what is left of a sweep will take, judged by what finished runs took. Standard library alone."""

from __future__ import annotations

import heapq
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from msil.runs import RESULT, read_result

# What a run's time depends on most, beside the machine.
DECISIVE = (
    ("mode",),
    ("model", "head", "name"),
    ("model", "backbone", "name"),
    ("model", "channels"),
    *(("data", key) for key in ("name", "root", "train_split", "num_train", "image_size", "min_size", "max_size")),
    *(("schedule", key) for key in ("name", "epochs", "max_steps", "eval_every")),
)


@dataclass(frozen=True)
class Estimate:
    """seconds: for each job, in their order; source: the runs they are taken from, in words. Both empty if none."""

    seconds: tuple[float, ...] = ()
    source: str = ""


def estimate(values: Sequence[Mapping[str, Any]], finished: Sequence[Mapping[str, Any]], runs_dir: Path) -> Estimate:
    """How long jobs of these settings take: as the sweep's own finished ones, else as others of the same settings.

    values: of the jobs to estimate; finished: results of the sweep's finished jobs. A job unlike any finished run is
    taken for the mean of the other jobs.
    """
    own = [seconds for result in finished if (seconds := total_seconds(result)) is not None]
    if own:
        return Estimate((statistics.fmean(own),) * len(values), f"{_counted(len(own), 'finished job')} of this sweep")
    others: dict[tuple[Any, ...], list[float]] = {}
    for folder in sorted(path.parent for path in runs_dir.glob(f"*/{RESULT}")):
        result = read_result(folder)
        seconds = None if result is None else total_seconds(result)
        if result is not None and seconds is not None:
            others.setdefault(_decisive(result["config"]), []).append(seconds)
    alike = [others.get(_decisive(job)) for job in values]
    known = [statistics.fmean(seconds) for seconds in alike if seconds]
    if not known:
        return Estimate()
    mean = statistics.fmean(known)
    used = sum(len(others[key]) for key in {_decisive(job) for job in values} if key in others)
    source = f"{_counted(used, 'finished run')} of the same data, head, backbone and schedule"
    return Estimate(tuple(statistics.fmean(seconds) if seconds else mean for seconds in alike), source)


def time_left(waiting: Iterable[float], running: Iterable[float], n_jobs: int) -> float:
    """Seconds until the last job ends, if each takes the next free of `n_jobs` places.

    waiting: seconds that each job not yet started will take, in order; running: seconds left of each running one.
    """
    places = [max(left, 0.0) for left in running]
    places += [0.0] * (n_jobs - len(places))
    heapq.heapify(places)
    for seconds in waiting:
        heapq.heapreplace(places, places[0] + seconds)
    return max(places)


def seconds_left(
    finished: Sequence[float],
    waiting: Sequence[float | None],
    running: Sequence[tuple[float | None, float]],
    n_jobs: int,
) -> float | None:
    """Seconds until a sweep's last job ends; None where nothing is left to run, or nothing tells.

    finished: seconds that jobs of this sweep took, whose mean all others are thought to take; where there is none,
    waiting: each one's own expected seconds, and running: (expected, spent so far).
    """
    mean = statistics.fmean(finished) if finished else None
    to_come = [expected if mean is None else mean for expected in waiting]
    at_work = [(expected if mean is None else mean, spent) for expected, spent in running]
    known = [seconds for seconds in to_come if seconds is not None]
    remaining = [seconds - spent for seconds, spent in at_work if seconds is not None]
    if not (to_come or at_work) or len(known) + len(remaining) < len(to_come) + len(at_work):
        return None
    return time_left(known, remaining, n_jobs)


def clock(seconds: float, now: datetime | None = None) -> str:
    """`01:40 (at 17:35)`: hours and minutes left, rounded up, and when that is; the day too if it is not today."""
    now = now or datetime.now()
    end = now + timedelta(seconds=seconds)
    minutes = math.ceil(seconds / 60)
    at = f"{end:%H:%M}" if end.date() == now.date() else f"{end:%a %d %b %H:%M}"
    return f"{minutes // 60:02d}:{minutes % 60:02d} (at {at})"


def total_seconds(result: Mapping[str, Any]) -> float | None:
    seconds = result.get("total_seconds")
    return float(seconds) if isinstance(seconds, int | float) and 0 < seconds < math.inf else None


def _counted(count: int, noun: str) -> str:
    return f"1 {noun}" if count == 1 else f"{count} {noun}s"


def _decisive(values: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(_value(values, path) for path in DECISIVE)


def _value(values: Any, path: Sequence[str]) -> Any:
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values if isinstance(values, str | int | float | None) else str(values)
