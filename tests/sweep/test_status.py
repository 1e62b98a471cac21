"""`msil status`: what another terminal is told of sweeps that run, have ended, were killed, or cannot be read."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from msil.cli import main
from msil.errors import DataError
from msil.lock import locked
from msil.sweep.status import status_lines

NOW = datetime(2026, 3, 4, 15, 0, tzinfo=UTC)


def ago(minutes: float) -> str:
    return (NOW - timedelta(minutes=minutes)).isoformat(timespec="seconds")


def job(number: int, state: str, **fields: Any) -> dict[str, Any]:
    return {
        "number": number, "label": f"seed={number}", "overrides": [], "run_dir": f"runs/s{number}",
        "config_hash": "0" * 8, "state": state, "exit_code": None, "started": None, "seconds": 0.0,
        "expected_seconds": None,
        "log": f"runs/s{number}/console.log",
    } | fields  # fmt: skip


def sweep(runs: Path, name: str, jobs: list[Any], **fields: Any) -> Path:
    content = {
        "name": name, "table": None, "command": "python run.py -m seed=1,2,3", "started": ago(90), "updated": ago(5),
        "ended": None, "launcher": {"pid": os.getpid(), "host": platform.node()}, "n_jobs": 1, "jobs": jobs,
    } | fields  # fmt: skip
    folder = runs / "sweeps" / name
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(json.dumps(content))
    return folder


def test_a_running_sweep(tmp_path: Path) -> None:
    jobs = [
        job(1, "ok", seconds=1800.0, exit_code=0),
        job(2, "failed", seconds=60.0, exit_code=-11),
        job(3, "running", started=ago(10)),
        job(4, "waiting"),
    ]
    folder = sweep(tmp_path, "sweep-1", jobs)
    (tmp_path / "s3").mkdir()
    (tmp_path / "s3" / "metrics.csv").write_text("epoch,step,loss,AP\n6,40,1.2345,\n6,41,,0.2104\n")
    with locked(folder):
        lines = status_lines(tmp_path, now=NOW)
    assert lines[0] == f"sweep-1: running for 1h 30m (pid {os.getpid()} on {platform.node()}, n_jobs=1)"
    # As the finished one, 30 minutes each: 20 left of the running one, then the last.
    assert lines[1].startswith("job 3 of 4, ETA 00:50 (at ") and lines[1].endswith("): 1 done, 1 failed, 1 running")
    assert [line.split() for line in lines[3:8]] == [
        ["job", "settings", "state", "epoch", "loss", "AP", "time"],
        ["1", "seed=1", "finished", "-", "-", "-", "30m", "00s"],  # its result.json has been removed
        ["2", "seed=2", "failed", "(signal", "11)", "-", "-", "-", "1m", "00s"],
        ["3", "seed=3", "running", "7", "1.234", "21.0", "10m", "00s"],
        ["4", "seed=4", "waiting", "-", "-", "-", "-"],
    ]
    assert lines[-1] == "log of job 2: runs/s2/console.log"


def test_what_is_expected_counts_until_a_job_has_finished(tmp_path: Path) -> None:
    jobs = [job(1, "running", started=ago(10), expected_seconds=1200.0), job(2, "waiting", expected_seconds=600.0)]
    with locked(sweep(tmp_path, "sweep-1", jobs)):
        assert status_lines(tmp_path, now=NOW)[1].startswith("job 1 of 2, ETA 00:20 (at ")


def test_a_killed_sweep_although_its_number_is_another_processs_by_now(tmp_path: Path) -> None:
    sweep(tmp_path, "sweep-1", [job(1, "running", started=ago(10)), job(2, "waiting")])  # nobody holds its lock
    lines = status_lines(tmp_path, now=NOW)
    assert lines[:3] == [
        f"sweep-1: the sweep was killed (pid {os.getpid()} on {platform.node()} is gone), last change 5m 00s ago",
        "0 done, 1 killed, 1 not started of 2",
        "the same command continues it: python run.py -m seed=1,2,3",
    ]


def test_a_sweep_of_another_host(tmp_path: Path) -> None:
    sweep(tmp_path, "sweep-1", [job(1, "running", started=ago(10))], launcher={"pid": 7, "host": "elsewhere"})
    assert status_lines(tmp_path, now=NOW)[0] == (
        "sweep-1: last change 5m 00s ago; started on another host (pid 7 on elsewhere), "
        "which alone can tell whether it still runs"
    )


def test_only_the_newest_in_full(tmp_path: Path) -> None:
    done = [job(1, "ok", seconds=60.0, exit_code=0)]
    sweep(tmp_path, "sweep-old", done, updated=ago(600), ended=ago(600))
    sweep(tmp_path, "sweep-new", done, updated=ago(60), ended=ago(60))
    lines = status_lines(tmp_path, now=NOW)
    assert lines[0] == "sweep-new: ended 1h 00m ago"
    assert lines[-2:] == ["earlier:", "  sweep-old: ended 10h 00m ago; 1 done of 1"]
    assert len([line for line in lines if line.startswith("job  settings")]) == 1
    lines = status_lines(tmp_path, show_all=True, now=NOW)
    assert len([line for line in lines if line.startswith("job  settings")]) == 2
    assert status_lines(tmp_path / "sweeps" / "sweep-old", now=NOW)[0] == "sweep-old: ended 10h 00m ago"
    assert status_lines(tmp_path / "sweeps", now=NOW)[0] == "sweep-new: ended 1h 00m ago"


GOOD = json.dumps({"name": "x", "jobs": [], "launcher": {}})


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", GOOD.encode(), b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"jobs": 3, "started": "yesterday"}',
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_sentence(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "sweeps" / "sweep-bad"
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_bytes(content)
    assert main(["status", str(tmp_path)]) == 2
    said = f"{folder}/sweep.json is damaged, or of an older version: the sweep's command, run again, writes it anew."
    assert capsys.readouterr().err == f"error: {said}\n"
    sweep(tmp_path, "sweep-good", [job(1, "ok")], ended=ago(5))
    lines = status_lines(tmp_path, now=NOW)  # it costs the others nothing
    assert lines[0] == "sweep-good: ended 5m 00s ago"
    assert lines[-1] == f"warning: {said}"


@pytest.mark.parametrize(
    "change",
    [{"started": "2026-03-04T15:00:00"}, {"n_jobs": "two"}, {"launcher": {"pid": "7", "host": 3}}, {"jobs": [{}]},
     {"jobs": [job(1, "ok", seconds=float("nan"))]}, {"jobs": [job(1, "ok", label=["x"])]}],
)  # fmt: skip
def test_values_of_the_wrong_kind_are_damage_too(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = sweep(tmp_path, "sweep-1", [job(1, "ok")])
    content = json.loads((folder / "sweep.json").read_text())
    (folder / "sweep.json").write_text(json.dumps(content | change))
    with pytest.raises(DataError, match="is damaged, or of an older version"):
        status_lines(tmp_path, now=NOW)


def test_half_written_metrics_are_no_error(tmp_path: Path) -> None:
    folder = sweep(tmp_path, "sweep-1", [job(1, "running", started=ago(1))])
    (tmp_path / "s1").mkdir()
    for content in (b"", b"epoch,lo", b"epoch,loss\n3,1.2\n4,", b"\x00\xff\n\x00", b"epoch,loss\nx,y,z\n"):
        (tmp_path / "s1" / "metrics.csv").write_bytes(content)
        with locked(folder):
            assert any("seed=1" in line for line in status_lines(tmp_path, now=NOW))


def test_where_there_is_no_sweep_it_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err == (
        f"error: no sweep is in {tmp_path}/nowhere: `python run.py -m ...` makes one; "
        "name the runs folder, or a sweep's own, if it is elsewhere.\n"
    )


def test_it_does_not_wait_for_torch_or_hydra() -> None:
    code = "import sys, msil.cli, msil.sweep.status; sys.exit(bool({'torch', 'hydra', 'omegaconf'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
