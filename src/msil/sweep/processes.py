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
from typing import BinaryIO, Protocol

from msil.runs import write_json
from msil.sweep.jobs import Job
from msil.sweep.orphans import PARENT_PIPE, lifeline

POLL_SECONDS = 0.1
GRACE_SECONDS = 60.0  # to finish the step and save a checkpoint after SIGTERM
TAIL_LINES = 8
LOCKED = 73
PREEMPTED = 75
# How a job ends that was asked to stop, besides by its exit code for that.
STOPPED = (PREEMPTED, 130, 143, -signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL)


@dataclass
class Outcome:
    job: Job
    state: str  # skipped (finished before), waiting, running, ok, failed, interrupted
    exit_code: int | None = None
    seconds: float = 0.0
    reason: str = ""

    @property
    def done(self) -> bool:
        return self.state in ("ok", "skipped")


class Watcher(Protocol):
    """Is told what happens while the jobs run."""

    def changed(self, outcome: Outcome) -> None:
        """At every change of a job's state."""
        ...

    def tick(self) -> None:
        """About ten times a second."""
        ...

    def stopping(self, count: int, grace_seconds: float) -> None:
        """A signal came; so many running jobs are asked to stop."""
        ...

    def trouble(self, sentence: str) -> None:
        """Something went wrong that costs no job."""
        ...


@dataclass
class _Running:
    outcome: Outcome
    process: subprocess.Popen[bytes]
    log: BinaryIO
    slot: int
    log_start: int
    started: float = field(default_factory=time.monotonic)


def run_jobs(
    outcomes: Sequence[Outcome],
    *,
    command: Callable[[Job], list[str]],
    environment: Callable[[int], dict[str, str]],
    is_finished: Callable[[Job], bool],
    watcher: Watcher,
    n_jobs: int = 1,
    grace_seconds: float = GRACE_SECONDS,
) -> int | None:
    """Runs the waiting jobs of `outcomes`, `n_jobs` at a time, and goes on when one fails; changes the outcomes.

    `environment(slot)`, slot in 0..n_jobs-1; `is_finished(job)`: a complete result of these very settings is there.
    Returns None or, if SIGINT, SIGTERM or SIGHUP ended the sweep early, that signal. Jobs do not outlive this process.
    """
    waiting = [outcome for outcome in outcomes if outcome.state == "waiting"]
    running: list[_Running] = []
    with lifeline() as pipe, _caught_signals() as signals:
        try:
            while (waiting or running) and not signals:
                while waiting and len(running) < n_jobs and not signals:
                    outcome = waiting.pop(0)
                    slot = min(set(range(n_jobs)) - {item.slot for item in running})
                    started = _start(outcome, command(outcome.job), environment(slot), slot, pipe)
                    running += [] if started is None else [started]
                    _tell(outcome, watcher)
                time.sleep(POLL_SECONDS)
                for item in [item for item in running if item.process.poll() is not None]:
                    running.remove(item)
                    _finish(item, is_finished, watcher)
                watcher.tick()
            if running:
                watcher.stopping(len(running), grace_seconds)
        finally:  # whatever happened: no job is left to itself
            stop([item.process for item in running], grace_seconds, lambda: len(signals) > 1)
            for item in running:
                _finish(item, is_finished, watcher, asked_to_stop=True)
        return signals[0] if signals else None


def stop(processes: Sequence[subprocess.Popen[bytes]], grace_seconds: float, at_once: Callable[[], bool]) -> None:
    """SIGTERM to each process, SIGKILL to what is left of its group after the grace, or as soon as `at_once()`.

    SIGTERM to the process alone: it saves a checkpoint and stops its own ranks and loader workers in order, which it
    could not do if they were dead.
    """
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + grace_seconds
    while time.monotonic() < deadline and not at_once() and any(process.poll() is None for process in processes):
        time.sleep(POLL_SECONDS)
    for process in processes:
        _kill_group(process)
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
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - 65536))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:  # somebody has removed it
        return []
    shown = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]
    return [line for line in shown if line.strip()][-lines:]


def _start(outcome: Outcome, command: list[str], environment: dict[str, str], slot: int, pipe: int) -> _Running | None:
    path = console_log(outcome.job)
    log = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log_start = path.stat().st_size if path.exists() else 0
        log = path.open("ab")  # a job that is taken up again adds to its log
        process = subprocess.Popen(
            command,
            env={**environment, PARENT_PIPE: str(pipe)},
            pass_fds=(pipe,),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Its own session: Ctrl-C in the terminal reaches the launcher alone, which then stops the job in order.
            start_new_session=True,
        )
    except OSError as error:  # no space for a folder, no memory for a process
        if log is not None:
            log.close()
        outcome.state, outcome.reason = "failed", f"could not be started: {error}"
        return None
    outcome.state = "running"
    return _Running(outcome, process, log, slot, log_start)


def _finish(
    item: _Running, is_finished: Callable[[Job], bool], watcher: Watcher, *, asked_to_stop: bool = False
) -> None:
    outcome = item.outcome
    exit_code = item.process.wait()
    outcome.exit_code = exit_code
    outcome.seconds = time.monotonic() - item.started
    item.log.close()
    if exit_code != 0:
        _kill_group(item.process)  # DDP's other ranks would wait for the first one for ever
    if exit_code == 0 and is_finished(outcome.job):
        outcome.state = "ok"
    elif asked_to_stop and exit_code in STOPPED:
        outcome.state = "interrupted"
    else:
        outcome.state = "failed"
        outcome.reason = "\n".join([_why(exit_code), *tail(console_log(outcome.job), item.log_start)])
    _tell(outcome, watcher)


def _tell(outcome: Outcome, watcher: Watcher) -> None:
    try:
        write_status(outcome)
    except OSError as error:  # a full disk must not cost the jobs that run
        watcher.trouble(unwritten(outcome.job.run_dir.parent, error))
    watcher.changed(outcome)


def unwritten(folder: Path, error: OSError) -> str:
    return f"the state of the jobs cannot be written to {folder} ({error.strerror}): the jobs go on; make room there."


def _why(exit_code: int) -> str:
    if exit_code == 0:
        return "ended with exit code 0 but without a complete result.json"
    if exit_code == -signal.SIGKILL:
        return (
            "killed by SIGKILL, most often by the system for want of memory: "
            "lower data.batch_size, data.workers or hydra.launcher.n_jobs"
        )
    if exit_code < 0:
        return f"killed by {_signal_name(-exit_code)}"
    if exit_code == PREEMPTED:
        return "preempted (exit code 75); run again to resume"
    if exit_code == LOCKED:
        return "its folder is in use by another run (exit code 73); run again when that has ended"
    return f"exit code {exit_code}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    # The group is gone once its last member has ended.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """The stop signals that came inside the block: Ctrl-C, a scheduler's SIGTERM, a terminal that was closed.

    They are noted, not raised, since an exception between two lines could lose a job that has just been started.
    """
    caught: list[int] = []
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and a shell's & leave them
            before[number] = signal.signal(number, lambda number, _: caught.append(number))
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
