"""What a sweep would do: which of its jobs are finished, how long the others will take. Starts and makes nothing."""

from __future__ import annotations

import json
from typing import Any

from msil.reporting.formats import duration, percent
from msil.runs import is_finished, read_result
from msil.sweep.estimate import Estimate, clock, estimate, time_left, total_seconds
from msil.sweep.jobs import Job, Sweep
from msil.sweep.processes import Outcome
from msil.sweep.record import is_held


def first_outcome(job: Job) -> Outcome:
    """skipped, with the seconds that its run took, if the job is finished; else waiting."""
    result = read_result(job.run_dir)
    if result is None or not is_finished(job.run_dir, job.config_hash):
        return Outcome(job, "waiting")
    return Outcome(job, "skipped", seconds=total_seconds(result) or 0.0)


def expected_seconds(sweep: Sweep) -> dict[int, float]:
    """By their numbers, how long the jobs that are not finished will take, where finished runs tell."""
    left, guess = _estimate(sweep)
    return {job.number: seconds for job, seconds in zip(left, guess.seconds, strict=False)}


def preview_lines(sweep: Sweep, n_jobs: int) -> list[str]:
    """A line for each job, then the time that those which are left will take."""
    at_once = "one at a time" if n_jobs == 1 else f"{n_jobs} at a time"
    jobs = "1 job" if len(sweep.jobs) == 1 else f"{len(sweep.jobs)} jobs"
    lines = [f"Dry run of sweep {sweep.name}: {jobs}, {at_once}. Nothing is started."]
    if is_held(sweep.folder):
        lines.append(f"It is running now: msil status {sweep.folder}")
    states = [_state(job) for job in sweep.jobs]
    label = max(len(job.label) for job in sweep.jobs)
    state = max(map(len, states))
    digits = len(str(len(sweep.jobs)))
    lines += [
        f"[{job.number:{digits}}/{len(sweep.jobs)}] {job.label:{label}}  {words:{state}}  {job.run_dir}"
        for job, words in zip(sweep.jobs, states, strict=True)
    ]
    left, guess = _estimate(sweep)
    if not left:
        return [*lines, "All jobs are finished."]
    count = "the 1 job" if len(left) == 1 else f"the {len(left)} jobs"
    if not guess.seconds:
        return [*lines, f"Time for {count} left: no finished run to estimate from."]
    seconds = time_left(guess.seconds, [], n_jobs)
    each = sum(guess.seconds) / len(guess.seconds)
    about = f"{duration(seconds)}, {duration(each)} a job" if len(left) > 1 else duration(seconds)
    return [*lines, f"Time for {count} left: about {about}, judged by {guess.source}; ETA {clock(seconds)}"]


def _estimate(sweep: Sweep) -> tuple[list[Job], Estimate]:
    left = [job for job in sweep.jobs if not is_finished(job.run_dir, job.config_hash)]
    results = [read_result(job.run_dir) for job in sweep.jobs if job not in left]
    finished = [result for result in results if result is not None]
    return left, estimate([job.values for job in left], finished, sweep.jobs[0].run_dir.parent)


def _state(job: Job) -> str:
    result = read_result(job.run_dir)
    if result is not None and is_finished(job.run_dir, job.config_hash):
        return f"finished, AP {percent(result['metrics'].get('AP'))}"
    if is_held(job.run_dir):
        return "running now"
    status = _status(job)
    match status.get("state"):
        case "failed" if status.get("exit_code") == 75:
            return "preempted, will be continued"
        case "failed" if isinstance(status.get("exit_code"), int):
            return f"failed ({_exit(status['exit_code'])}), will run again"
        case "failed":
            return "failed, will run again"
        case "interrupted" | "running":  # running, but nobody holds its folder: killed with its launcher
            return "interrupted, will be continued"
    return "to run"


def _exit(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit {code}"


def _status(job: Job) -> dict[str, Any]:
    """status.json of the job's last run with these settings; empty if there is none that can be read."""
    try:
        status = json.loads((job.run_dir / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) and status.get("config_hash") == job.config_hash else {}
