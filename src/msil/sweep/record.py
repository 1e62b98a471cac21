"""sweep.json: what a sweep is doing, for another terminal to read while it runs. Standard library alone."""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from msil.errors import DataError
from msil.runs import write_json

if TYPE_CHECKING:
    from msil.sweep.jobs import Job, Sweep
    from msil.sweep.processes import Outcome

SWEEP_FILE = "sweep.json"
T = TypeVar("T")


class Record:
    """Writes sweep.json, whole or not at all, each time it is asked to. Raises OSError, as for a full disk."""

    def __init__(
        self,
        sweep: Sweep,
        outcomes: Sequence[Outcome],
        n_jobs: int,
        *,
        expected: Mapping[int, float],
        command: str,
    ) -> None:
        """expected: seconds that a job of that number is thought to take; command: what the user typed."""
        self._sweep = sweep
        self._outcomes = outcomes
        self._n_jobs = n_jobs
        self._expected = expected
        self._command = command
        self._started = _now()
        self._job_started: dict[int, str] = {}

    def started(self, job: Job) -> None:
        self._job_started[job.number] = _now()

    def write(self, *, ended: bool = False) -> None:
        now = _now()
        content = {
            "name": self._sweep.name,
            "table": self._sweep.table,
            "command": self._command,
            "started": self._started,
            "updated": now,
            "ended": now if ended else None,
            "launcher": {"pid": os.getpid(), "host": platform.node()},
            "n_jobs": self._n_jobs,
            "jobs": [self._job(outcome) for outcome in self._outcomes],
        }
        write_json(self._sweep.folder / SWEEP_FILE, content)

    def _job(self, outcome: Outcome) -> dict[str, Any]:
        job = outcome.job
        return {
            "number": job.number,
            "label": job.label,
            "overrides": list(job.overrides),
            "run_dir": str(job.run_dir),
            "config_hash": job.config_hash,
            "state": outcome.state,
            "exit_code": outcome.exit_code,
            "started": self._job_started.get(job.number),
            "seconds": round(outcome.seconds, 1),
            "expected_seconds": self._expected.get(job.number),
            "log": str(job.run_dir / "console.log"),
        }


@dataclass(frozen=True)
class JobState:
    number: int
    label: str
    state: str
    exit_code: int | None
    seconds: float
    expected: float | None  # seconds
    started: datetime | None
    run_dir: Path  # where it is now, seen from here
    log: Path


@dataclass(frozen=True)
class SweepState:
    folder: Path
    name: str
    command: str
    started: datetime
    updated: datetime
    ended: datetime | None  # None: still at work, or killed
    pid: int
    host: str
    n_jobs: int
    jobs: tuple[JobState, ...]


def read_sweep(folder: Path) -> SweepState:
    """What sweep.json in `folder` says. Raises DataError if it cannot be read or is not as `Record` writes it."""
    path = folder / SWEEP_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return SweepState(
            folder=folder,
            name=_typed(content["name"], str),
            command=_typed(content["command"], str),
            started=_time(content["started"]),
            updated=_time(content["updated"]),
            ended=None if content["ended"] is None else _time(content["ended"]),
            pid=_typed(content["launcher"]["pid"], int),
            host=_typed(content["launcher"]["host"], str),
            n_jobs=max(1, _typed(content["n_jobs"], int)),
            jobs=tuple(_job_state(job, folder) for job in content["jobs"]),
        )
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path} is damaged, or of an older version: the sweep's command, run again, writes it anew."
        ) from error


def is_running(state: SweepState) -> bool | None:
    """Whether the sweep's launcher lives; None if it is on another host, where only that host can tell."""
    if state.ended is not None:
        return False
    if state.host != platform.node():
        return None
    # The number alone may by now be another process's.
    return _is_alive(state.pid) and is_held(state.folder)


def is_held(folder: Path) -> bool:
    """Whether a live process holds the folder's lock (msil.lock), without taking it or making a file."""
    try:
        with (folder / ".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or a file system without locks
        return False
    return False


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:  # another user's
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _job_state(job: Any, folder: Path) -> JobState:
    # The launcher wrote the path as seen from its working folder.
    here = folder.parent.parent / Path(job["run_dir"]).name
    run_dir = here if here.is_dir() else Path(job["run_dir"])
    return JobState(
        number=_typed(job["number"], int),
        label=_typed(job["label"], str),
        state=_typed(job["state"], str),
        exit_code=None if job["exit_code"] is None else _typed(job["exit_code"], int),
        seconds=_seconds(job["seconds"]),
        expected=None if job["expected_seconds"] is None else _seconds(job["expected_seconds"]),
        started=None if job["started"] is None else _time(job["started"]),
        run_dir=run_dir,
        log=run_dir / Path(job["log"]).name,
    )


def _typed(value: Any, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not math.isfinite(seconds):
        raise ValueError(f"{seconds} is no time")
    return seconds


def _time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise ValueError(f"{text} names no time zone")
    return time


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
