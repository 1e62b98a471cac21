"""Runs a sweep's jobs, each as an operating-system process of its own.

Own processes, because Lightning's DDP re-runs the command line of its parent (a whole sweep, under Hydra's own
launchers), and because a segmentation fault or an out-of-memory kill must cost one job, not the sweep.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from msil.reporting.results import write_json
from msil.sweep.jobs import Job

POLL_SECONDS = 0.1
GRACE_SECONDS = 30.0  # to finish the step and save a checkpoint after SIGTERM
TAIL_LINES = 8


@dataclass
class Outcome:
    job: Job
    state: str  # skipped (finished before), running, ok, failed, interrupted, waiting
    exit_code: int | None = None
    seconds: float = 0.0
    reason: str = ""

    @property
    def done(self) -> bool:
        return self.state in ("ok", "skipped")


@dataclass
class _Running:
    outcome: Outcome
    process: subprocess.Popen[bytes]
    log: BinaryIO
    slot: int
    log_start: int
    started: float = field(default_factory=time.monotonic)


class Stopped(Exception):
    """Ctrl-C or SIGTERM reached the sweep; its jobs have been stopped."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


def run_jobs(
    jobs: Sequence[Job],
    *,
    command: Callable[[Job], list[str]],
    environment: Callable[[int], dict[str, str]],
    is_finished: Callable[[Job], bool],
    changed: Callable[[Outcome], None],
    tick: Callable[[Sequence[Outcome]], None],
    n_jobs: int = 1,
    grace_seconds: float = GRACE_SECONDS,
) -> tuple[list[Outcome], int | None]:
    """Runs what is not finished, `n_jobs` at a time, and goes on when one fails.

    `environment(slot)`, slot in 0..n_jobs-1; `is_finished(job)`: a complete result of these very settings is there;
    `changed(outcome)` at every change of state; `tick(running)` about ten times a second.
    Returns every job's outcome in order and, if SIGINT or SIGTERM ended the sweep early, that signal.
    """
    outcomes = [Outcome(job, "skipped" if is_finished(job) else "waiting") for job in jobs]
    for outcome in outcomes:
        if outcome.state == "skipped":
            changed(outcome)
    waiting = [outcome for outcome in outcomes if outcome.state == "waiting"]
    running: list[_Running] = []
    stopped_by = None
    with _sigterm_raises():
        try:
            while waiting or running:
                while waiting and len(running) < n_jobs:
                    slot = min(set(range(n_jobs)) - {item.slot for item in running})
                    running.append(_start(waiting[0], command(waiting[0].job), environment(slot), slot))
                    changed(waiting.pop(0))
                time.sleep(POLL_SECONDS)
                for item in [item for item in running if item.process.poll() is not None]:
                    running.remove(item)
                    _finish(item, is_finished)
                    changed(item.outcome)
                tick([item.outcome for item in running])
        except (KeyboardInterrupt, Stopped) as error:
            stopped_by = error.signal_number if isinstance(error, Stopped) else int(signal.SIGINT)
            stop([item.process for item in running], grace_seconds)
            for item in running:
                _finish(item, is_finished, interrupted=True)
                changed(item.outcome)
    return outcomes, stopped_by


def stop(processes: Sequence[subprocess.Popen[bytes]], grace_seconds: float) -> None:
    """SIGTERM to each process's group, SIGKILL to what is left of it after the grace or at a second Ctrl-C."""
    for process in processes:
        _signal_group(process, signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    # A second Ctrl-C means: now.
    with contextlib.suppress(KeyboardInterrupt, Stopped):
        while time.monotonic() < deadline and any(process.poll() is None for process in processes):
            time.sleep(POLL_SECONDS)
    for process in processes:
        _signal_group(process, signal.SIGKILL)
        process.wait()


def write_status(outcome: Outcome) -> None:
    """status.json of a job, whole or not at all."""
    status = {
        "state": outcome.state,
        "job": outcome.job.number,
        "config_hash": outcome.job.config_hash,
        "overrides": list(outcome.job.overrides),
        "exit_code": outcome.exit_code,
        "seconds": round(outcome.seconds, 1),
        "reason": outcome.reason,
    }
    write_json(outcome.job.run_dir / "status.json", status)


def console_log(job: Job) -> Path:
    return job.run_dir / "console.log"


def tail(path: Path, start: int = 0, lines: int = TAIL_LINES) -> list[str]:
    """The last lines that are not blank, from byte `start` on; of a progress bar only its last state."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(start, size - 65536))
        text = file.read().decode("utf-8", errors="replace")
    shown = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]
    return [line for line in shown if line.strip()][-lines:]


def _start(outcome: Outcome, command: list[str], environment: dict[str, str], slot: int) -> _Running:
    outcome.job.run_dir.mkdir(parents=True, exist_ok=True)
    path = console_log(outcome.job)
    log_start = path.stat().st_size if path.exists() else 0
    log = path.open("ab")  # a job that is taken up again adds to its log
    # Its own session: Ctrl-C in the terminal reaches the launcher alone, which then stops the job in order.
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    outcome.state = "running"
    write_status(outcome)
    return _Running(outcome, process, log, slot, log_start)


def _finish(item: _Running, is_finished: Callable[[Job], bool], *, interrupted: bool = False) -> None:
    outcome = item.outcome
    exit_code = item.process.wait()
    outcome.exit_code = exit_code
    outcome.seconds = time.monotonic() - item.started
    item.log.close()
    if exit_code != 0:
        _signal_group(item.process, signal.SIGKILL)  # DDP's other ranks would wait for the first one for ever
    if exit_code == 0 and is_finished(outcome.job):
        outcome.state = "ok"
    elif interrupted:
        outcome.state = "interrupted"
    else:
        outcome.state = "failed"
        outcome.reason = "\n".join([_why(exit_code), *tail(console_log(outcome.job), item.log_start)])
    write_status(outcome)


def _why(exit_code: int) -> str:
    if exit_code == 0:
        return "ended with exit code 0 but without a complete result.json"
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        return f"killed by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
    if exit_code == 75:
        return "stopped by a signal (exit code 75); the same command continues it"
    return f"exit code {exit_code}"


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    # The group is gone once its last member has ended.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """A scheduler's SIGTERM stops the jobs as Ctrl-C does."""

    def raise_stopped(number: int, _frame: object) -> None:
        raise Stopped(number)

    before = signal.signal(signal.SIGTERM, raise_stopped)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
