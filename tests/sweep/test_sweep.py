"""Sweeps from the command line, with small programs in the jobs' place: real signals, locks and full disks."""

from __future__ import annotations

import csv
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.launch.faults import alive, small_disk, until

ROOT = Path(__file__).resolve().parents[2]
STANDIN = str(ROOT / "tests" / "standin_run.py")


def finished(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, STANDIN, *words],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Start]:
    """Starts a sweep as from a terminal, also where a shell has started the tests with SIGINT ignored."""
    sweeps: list[subprocess.Popen[str]] = []

    def start(*words: str) -> subprocess.Popen[str]:
        sweep = subprocess.Popen(
            [sys.executable, STANDIN, "-m", *words],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        sweeps.append(sweep)
        return sweep

    yield start
    for sweep in sweeps:  # after a test that has failed; their jobs end with them
        sweep.kill()
        sweep.wait()


def run_of(folder: Path, seed: int) -> Path:
    (found,) = (folder / "runs").glob(f"*_s{seed}_*")
    return found


def everything(folder: Path) -> dict[Path, int | None]:
    """All paths, the files with the time of their last change."""
    return {path: path.stat().st_mtime_ns if path.is_file() else None for path in folder.rglob("*")}


def test_a_sweep_from_end_to_end(tmp_path: Path) -> None:
    leaked = {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1", "PL_GLOBAL_SEED": "7"}
    words = ("-m", "seed=0,1", "runs_dir=my runs")
    done = finished(tmp_path, *words, **leaked)
    assert done.returncode == 1, done.stderr
    assert "[2/2] seed=1  FAILED" in done.stdout
    assert "      | FileNotFoundError: no such image" in done.stdout
    assert "1 ok, 1 failed of 2." in done.stdout.splitlines()[-2]
    assert done.stdout.splitlines()[-1].endswith("msil report 'my runs'")

    (folder,) = (tmp_path / "my runs" / "sweeps").iterdir()
    assert {file.name for file in folder.iterdir()} - {".lock"} == {"table.md", "table.csv"}
    rows = list(csv.DictReader((folder / "table.csv").open(newline="")))
    assert [(row["seed"], row["AP"], row["state"]) for row in rows] == [
        ("0", "0.412", "ok"),
        ("1", "", "failed (exit 1)"),
    ]
    (run_dir,) = (tmp_path / "my runs").glob("*_s0_*")
    job = json.loads((run_dir / "started.json").read_text())
    assert not leaked.keys() & job["environment"].keys()
    assert job["words"] == ["seed=0", "runs_dir=my\\ runs", "hydra.mode=RUN"]
    assert (run_dir / "console.log").read_text() == "the job's own words\n"

    before = (run_dir / "result.json").stat().st_mtime_ns
    (tmp_path / "mended").touch()
    again = finished(tmp_path, *words)
    assert again.returncode == 0, again.stderr
    assert "[1/2] seed=0  finished before, AP 41.2" in again.stdout
    assert (run_dir / "result.json").stat().st_mtime_ns == before
    rows = list(csv.DictReader((folder / "table.csv").open(newline="")))
    assert [row["state"] for row in rows] == ["skipped", "ok"]


def test_a_sweep_shows_its_own_results_of_runs_that_went_on(tmp_path: Path) -> None:
    """For more epochs: one that has finished them, with another AP, and one that has not."""
    words = ("-m", "seed=0,9")
    assert finished(tmp_path, *words).returncode == 0
    for seed in (0, 9):
        file = run_of(tmp_path, seed) / "result.json"
        result = json.loads(file.read_text())
        file.rename(file.with_name(f"result-{result['config']['schedule']['epochs']}-epochs.json"))
        if seed == 0:
            file.write_text(json.dumps({**result, "config_hash": "longer", "metrics": {"AP": 0.9}}))
    done = finished(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished before, AP 41.2") == 2
    (table,) = tmp_path.glob("runs/sweeps/*/table.csv")
    rows = list(csv.DictReader(table.open(newline="")))
    assert [(row["AP"], row["state"]) for row in rows] == [("0.412", "skipped")] * 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("seed=0,1", "run_name=mine"), "error: jobs 1 (seed=0) and 2 (seed=1) would both write to runs/mine"),
        (("model.msil.kernel_size=1,5",), "error: model.msil.kernel_size=5 must be one of 1, 3"),
    ],
)
def test_a_refused_sweep_leaves_nothing_and_exits_with_2(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    done = finished(tmp_path, "-m", *words)
    assert done.returncode == 2
    assert done.stderr.startswith(said)
    assert not list(tmp_path.iterdir())


def test_a_killed_launcher_leaves_no_orphan_and_its_sweep_is_continued(tmp_path: Path, started: Start) -> None:
    first = started("seed=4,0")
    until(lambda: list(tmp_path.glob("runs/*_s4_*/waiting")), "the job did not start")
    job = int((run_of(tmp_path, 4) / "waiting").read_text())

    second = finished(tmp_path, "-m", "seed=4,0")
    assert second.returncode == 73
    assert str(first.pid) in second.stderr and platform.node() in second.stderr
    assert second.stderr.startswith("error: ") and len(second.stderr.splitlines()) == 1
    assert alive(first.pid) and alive(job)

    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    (tmp_path / "may_save").touch()
    until(lambda: not alive(job))
    assert (run_of(tmp_path, 4) / "saved").exists()

    (tmp_path / "mended").touch()
    third = finished(tmp_path, "-m", "seed=4,0")
    assert third.returncode == 0, third.stderr
    assert "2 ok, 0 failed of 2." in third.stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_stopped_sweep_lets_its_job_save(tmp_path: Path, started: Start, number: signal.Signals, code: int) -> None:
    (tmp_path / "may_save").touch()
    sweep = started("seed=4,0")
    until(lambda: list(tmp_path.glob("runs/*_s4_*/waiting")), "the job did not start")
    os.kill(sweep.pid, number)
    said, _ = sweep.communicate(timeout=60)
    assert sweep.returncode == code
    assert "the same command continues it" in said.partition("Stopping the running job")[2]
    assert "0 ok, 0 failed, 1 stopped, 1 not started of 2." in said
    assert (run_of(tmp_path, 4) / "saved").exists()


def test_the_nets_of_an_experiment_depend_on_its_schedule(tmp_path: Path) -> None:
    done = finished(tmp_path, "experiment=table4", "data=shapes", "schedule=quick", "hydra.launcher.dry_run=true")
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["backbone=resnet10", "backbone=resnet18_scratch"]


def test_a_dry_run_lists_the_jobs_and_makes_nothing(tmp_path: Path) -> None:
    dry = ("-m", "seed=0,9", "hydra.launcher.dry_run=true")
    done = finished(tmp_path, *dry)
    assert done.returncode == 0, done.stderr
    assert [line.partition("  runs/")[0] for line in done.stdout.splitlines()] == [
        "[1/2] seed=0  to run",
        "[2/2] seed=9  to run",
    ]
    assert not list(tmp_path.iterdir())

    assert finished(tmp_path, "seed=0").returncode == 0
    before = everything(tmp_path)
    done = finished(tmp_path, *dry)
    assert done.stdout.startswith("[1/2] seed=0  finished, AP 41.2  runs/")
    assert everything(tmp_path) == before

    single = finished(tmp_path, *dry[1:])
    assert (single.returncode != 0, single.stdout) == (True, "")


def test_a_folder_that_cannot_be_written_to_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    done = finished(tmp_path, "-m", "seed=0,1")
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: runs/sweeps cannot be used (") and len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_disk_that_a_job_fills_costs_the_table_alone(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 400 << 10) as disk:
        done = finished(disk, "-m", "seed=0,11")
        assert done.returncode == 2, done.stdout + done.stderr
        assert "2 ok, 0 failed of 2.\n" in done.stdout  # the table itself is shown
        (folder,) = (disk / "runs" / "sweeps").iterdir()
        assert done.stderr.startswith(f"error: the table cannot be written to {folder.relative_to(disk)} (No space")
        assert not list(disk.rglob("*.tmp"))

        (disk / "filler").unlink()
        again = finished(disk, "-m", "seed=0,11")
        assert again.returncode == 0, again.stdout + again.stderr
        assert again.stdout.count("finished before, AP 41.2") == 2
        assert (folder / "table.md").exists()
