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
from typing import BinaryIO

from msil.launch.lifeline import PARENT_PIPE, lifeline
from msil.launch.processes import POLL_SECONDS, PREEMPTED, ending, tail
from msil.reporting.tables import duration
from msil.runs import CONSOLE, read_result
from msil.sweep.plan import Job
from msil.sweep.show import Outcome, say, say_change

GRACE_SECONDS = 60.0  # to finish the step and save a checkpoint after SIGTERM
# How a job ends that was asked to stop.
STOPPED = (PREEMPTED, 130, 143, -signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL)


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
    n_jobs: int = 1,
    grace_seconds: float = GRACE_SECONDS,
) -> int | None:
    """Runs the waiting jobs of `outcomes`, `n_jobs` at a time, past those that fail; changes the outcomes.

    `environment(slot)`, slot in 0..n_jobs-1. Prints a line when a job starts and when it ends. Returns None or, if
    SIGINT, SIGTERM or SIGHUP ended the sweep early, that signal. Jobs do not outlive this process.
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
                    say_change(outcome, outcomes)
                time.sleep(POLL_SECONDS)
                for item in [item for item in running if item.process.poll() is not None]:
                    running.remove(item)
                    _finish(item)
                    say_change(item.outcome, outcomes)
            if running:
                jobs = "the running job" if len(running) == 1 else f"the {len(running)} running jobs"
                within = duration(grace_seconds)
                say(f"Stopping {jobs} at a checkpoint, within {within}. Ctrl-C again kills at once.")
        finally:  # whatever happened: no job is left to itself
            _stop([item.process for item in running], grace_seconds, lambda: len(signals) > 1)
            for item in running:
                _finish(item, asked_to_stop=True)
                say_change(item.outcome, outcomes)
        return signals[0] if signals else None


def _start(outcome: Outcome, command: list[str], environment: dict[str, str], slot: int, pipe: int) -> _Running | None:
    path = outcome.job.run_dir / CONSOLE
    log = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log_start = path.stat().st_size if path.exists() else 0
        log = path.open("ab")  # a job that is continued appends to its log
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


def _finish(item: _Running, *, asked_to_stop: bool = False) -> None:
    outcome, job = item.outcome, item.outcome.job
    code = outcome.exit_code = item.process.wait()
    outcome.seconds = time.monotonic() - item.started
    item.log.close()
    if code != 0:
        _kill_group(item.process)  # what it started may not have ended
    result = read_result(job.run_dir) if code == 0 else None
    if result is not None and result["config_hash"] == job.config_hash:
        outcome.state, outcome.result = "ok", result
    elif asked_to_stop and code in STOPPED:
        outcome.state = "interrupted"
    else:
        why = ending(code) if code else "exit code 0, but no complete result.json"
        outcome.state = "failed"
        outcome.reason = "\n".join([why, *tail(job.run_dir / CONSOLE, item.log_start)])


def _stop(processes: Sequence[subprocess.Popen[bytes]], grace_seconds: float, at_once: Callable[[], bool]) -> None:
    """SIGTERM to each process, SIGKILL to what is left of its group after the grace, or as soon as `at_once()`.

    SIGTERM to the process alone: it saves a checkpoint with its ranks and loader workers, and stops them itself.
    """
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + grace_seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline and not at_once():
        time.sleep(POLL_SECONDS)
    for process in processes:
        _kill_group(process)
        process.wait()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # its last member has ended
        os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """The stop signals that came inside the block: Ctrl-C, a scheduler's SIGTERM, a terminal that was closed.

    They are noted, not raised: an exception between two lines could lose a job that has just been started.
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
