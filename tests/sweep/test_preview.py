"""What a dry run says of each job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from msil.lock import locked
from msil.runs import REQUIRED_KEYS
from msil.sweep.jobs import Job, Sweep
from msil.sweep.preview import first_outcome, preview_lines

HASH = "0" * 8


def sweep_of(folder: Path, count: int) -> Sweep:
    jobs = tuple(Job(n, (), HASH, folder / f"run{n}", {}, f"seed={n}") for n in range(1, count + 1))
    return Sweep("sweep-1", folder / "sweeps" / "sweep-1", jobs, None)


def write_result(job: Job, config_hash: str = HASH, seconds: float = 90.0) -> None:
    result = dict.fromkeys(REQUIRED_KEYS, 1) | {
        "status": "finished", "config_hash": config_hash, "metrics": {"AP": 0.412}, "config": {},
        "total_seconds": seconds,
    }  # fmt: skip
    job.run_dir.mkdir(parents=True, exist_ok=True)
    (job.run_dir / "result.json").write_text(json.dumps(result))


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ({"state": "failed", "exit_code": 1}, "failed (exit 1), will run again"),
        ({"state": "failed", "exit_code": -9}, "failed (signal 9), will run again"),
        ({"state": "failed", "exit_code": 75}, "preempted, will be continued"),
        ({"state": "failed", "exit_code": None}, "failed, will run again"),  # it could not be started
        ({"state": "interrupted", "exit_code": 75}, "interrupted, will be continued"),
        ({"state": "running", "exit_code": None}, "interrupted, will be continued"),  # killed with its launcher
        ({"state": "failed", "exit_code": 1, "config_hash": "other"}, "to run"),  # a run of other settings
        ("no dictionary", "to run"),
    ],
)
def test_the_last_run_of_a_job(tmp_path: Path, status: Any, words: str) -> None:
    sweep = sweep_of(tmp_path, 1)
    (tmp_path / "run1").mkdir()
    written = {"config_hash": HASH} | status if isinstance(status, dict) else status
    (tmp_path / "run1" / "status.json").write_text(json.dumps(written))
    assert preview_lines(sweep, 1)[1] == f"[1/1] seed=1  {words}  {tmp_path}/run1"
    (tmp_path / "run1" / "status.json").write_text(json.dumps(written)[:-2])  # half written
    assert preview_lines(sweep, 1)[1] == f"[1/1] seed=1  to run  {tmp_path}/run1"


def test_what_runs_now_is_known_by_its_lock(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, 2)
    with locked(tmp_path / "run1"), locked(sweep.folder):
        lines = preview_lines(sweep, 1)
    assert lines[1] == f"It is running now: msil status {sweep.folder}"
    assert lines[2] == f"[1/2] seed=1  running now  {tmp_path}/run1"
    assert lines[3] == f"[2/2] seed=2  to run       {tmp_path}/run2"
    assert preview_lines(sweep, 1)[1] == f"[1/2] seed=1  to run  {tmp_path}/run1"  # a lock left behind is none


def test_nothing_is_left(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, 1)
    write_result(sweep.jobs[0])
    assert preview_lines(sweep, 1)[-1] == "All jobs are finished."
    assert (first_outcome(sweep.jobs[0]).state, first_outcome(sweep.jobs[0]).seconds) == ("skipped", 90.0)


def test_the_time_is_divided_by_the_jobs_at_a_time(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, 5)
    write_result(sweep.jobs[0], seconds=1800.0)
    write_result(sweep.jobs[1], config_hash="other", seconds=9.0)  # finished, but with other settings
    # Four jobs of half an hour each.
    assert preview_lines(sweep, 1)[-1].startswith(
        "Time for the 4 jobs left: about 2h 00m, 30m 00s a job, judged by 1 f"
    )
    assert preview_lines(sweep, 4)[-1].startswith(
        "Time for the 4 jobs left: about 30m 00s, 30m 00s a job, judged by 1 f"
    )
    assert preview_lines(sweep, 3)[-1].startswith(
        "Time for the 4 jobs left: about 1h 00m, 30m 00s a job, judged by 1 f"
    )
