"""Sweeps that go wrong, from the command line: real signals, real crashes, real process ids."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STANDIN = str(ROOT / "tests" / "standin_run.py")


def command(*words: str) -> list[str]:
    return [sys.executable, STANDIN, "-m", *words]


def finished(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), cwd=folder, capture_output=True, text=True, check=False, timeout=300)


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Start]:
    """Starts a sweep as from a terminal, also where a shell has started the tests with SIGINT ignored."""
    sweeps: list[subprocess.Popen[str]] = []

    def start(*words: str) -> subprocess.Popen[str]:
        sweep = subprocess.Popen(
            command(*words),
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


def status(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "msil.cli", "status", *words], cwd=folder, capture_output=True, text=True, check=False
    )


def until(condition: Callable[[], object], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(condition())


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1].startswith("Z")
    except FileNotFoundError:
        return True


def run_of(folder: Path, seed: int) -> Path:
    (found,) = (folder / "runs").glob(f"*_s{seed}_*")
    return found


def record(folder: Path) -> dict:
    (found,) = (folder / "runs" / "sweeps").glob("*/sweep.json")
    return json.loads(found.read_text())


def everything(folder: Path) -> dict[Path, int | None]:
    """All paths, the files with the time of their last change."""
    return {path: path.stat().st_mtime_ns if path.is_file() else None for path in folder.rglob("*")}


# seed of tests/standin_run.py: its job's exit code, what is said of it
FAULTS = {
    1: (1, "exit code 1"),  # raises
    2: (-11, "killed by SIGSEGV"),
    5: (1, "exit code 1"),  # MemoryError
    6: (-9, "killed by SIGKILL, most often by the system for want of memory"),
    7: (3, "exit code 3"),  # sys.exit(3)
    8: (75, "preempted (exit code 75); run again to resume"),
}


@pytest.mark.parametrize("faults", [(5, 6), pytest.param((1, 2, 5, 6, 7, 8), marks=pytest.mark.slow)])
def test_jobs_that_fail_in_any_way_cost_themselves_alone(
    tmp_path: Path, started: Start, faults: tuple[int, ...]
) -> None:
    seeds, jobs = f"seed={','.join(map(str, faults))},0", len(faults) + 1
    sweep = started(seeds)
    lines: list[str] = []
    assert sweep.stdout is not None
    for line in sweep.stdout:
        lines.append(line.rstrip("\n"))
        if line.startswith("[1/") and "FAILED" in line:
            assert not list((tmp_path / "runs").glob("*_s0_*"))  # said at once: the last job has not even begun
    assert sweep.wait() == 1
    for number, seed in enumerate(faults, 1):
        (at,) = [at for at, line in enumerate(lines) if f"[{number}/{jobs}] seed={seed}  FAILED" in line]
        assert FAULTS[seed][1] in lines[at]
        assert lines[at + 1].startswith(f"      log: runs/{run_of(tmp_path, seed).name}/console.log")
    assert "MemoryError" in (run_of(tmp_path, 5) / "console.log").read_text()
    assert any(line.startswith(f"[{jobs}/{jobs}] seed=0  finished in") for line in lines)
    assert any(line.startswith(f"1 ok, {len(faults)} failed of {jobs}.") for line in lines)
    assert [job["state"] for job in record(tmp_path)["jobs"]] == ["failed"] * len(faults) + ["ok"]
    assert [job["exit_code"] for job in record(tmp_path)["jobs"]] == [*(FAULTS[seed][0] for seed in faults), 0]

    before = (run_of(tmp_path, 0) / "result.json").stat().st_mtime_ns
    (tmp_path / "mended").touch()
    again = finished(tmp_path, seeds)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("  started, log in") == len(faults)
    assert f"[{jobs}/{jobs}] seed=0  finished before, AP 41.2" in again.stdout
    assert (run_of(tmp_path, 0) / "result.json").stat().st_mtime_ns == before


def test_a_killed_launcher_leaves_no_orphan_and_its_sweep_is_continued(tmp_path: Path, started: Start) -> None:
    first = started("seed=4,0")
    assert until(lambda: list(tmp_path.glob("runs/*_s4_*/waiting"))), "the job did not start"
    job = int((run_of(tmp_path, 4) / "waiting").read_text())
    shown = status(tmp_path).stdout
    assert re.match(rf"sweep-\w{{8}}: running for \d+s \(pid {first.pid} on {platform.node()}, n_jobs=1\)\n", shown)
    assert "job 1 of 2: 0 done, 1 running" in shown
    # epochs count from 0 in metrics.csv
    assert any(line.split()[:6] == ["1", "seed=4", "running", "2", "0.988", "21.0"] for line in shown.splitlines())

    second = finished(tmp_path, "seed=4,0")
    assert second.returncode == 73
    assert str(first.pid) in second.stderr and platform.node() in second.stderr
    assert second.stderr.startswith("error: ") and len(second.stderr.splitlines()) == 1
    assert not gone(first.pid) and not gone(job)

    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    shown = status(tmp_path).stdout
    assert f"the sweep was killed (pid {first.pid} on {platform.node()} is gone)" in shown
    assert "the same command continues it: python " in shown
    assert any(line.split()[:3] == ["1", "seed=4", "killed"] for line in shown.splitlines())

    # Its job is still saving when the same command comes again.
    (tmp_path / "mended").touch()
    third = started("seed=4,0")
    assert third.stdout is not None
    assert f"the process before (pid {first.pid} on host" in third.stdout.readline()
    assert third.stdout.readline().startswith("The sweep was killed; waiting until what it left running has saved")
    (tmp_path / "may_save").touch()
    said = third.stdout.read()
    assert third.wait() == 0, said
    assert "2 ok, 0 failed of 2." in said
    assert until(lambda: gone(job))
    assert (run_of(tmp_path, 4) / "saved").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_stopped_sweep_lets_its_job_save_and_says_how_to_go_on(
    tmp_path: Path, started: Start, number: signal.Signals, code: int
) -> None:
    (tmp_path / "may_save").touch()
    sweep = started("seed=4,0")
    assert until(lambda: list(tmp_path.glob("runs/*_s4_*/waiting"))), "the job did not start"
    os.kill(sweep.pid, number)
    said, _ = sweep.communicate(timeout=60)
    assert sweep.returncode == code
    assert (
        "Stopping the running job; it saves a checkpoint first, in at most 1m 00s. Ctrl-C again kills at once." in said
    )
    assert "the same command continues it" in said.partition("Stopping")[2]
    assert "0 ok, 0 failed, 1 stopped, 1 not started of 2." in said
    assert (run_of(tmp_path, 4) / "saved").exists()
    assert [job["state"] for job in record(tmp_path)["jobs"]] == ["interrupted", "waiting"]
    shown = status(tmp_path).stdout
    assert ": stopped " in shown and "0 done, 1 stopped, 1 not started of 2" in shown


def test_a_dry_run_lists_and_estimates_and_makes_nothing(tmp_path: Path) -> None:
    dry = ("seed=0,1,9", "hydra.launcher.dry_run=true")
    done = finished(tmp_path, *dry)
    assert done.returncode == 0, done.stderr
    assert [line.split()[1:4] for line in done.stdout.splitlines()[1:4]] == [
        [f"seed={seed}", "to", "run"] for seed in (0, 1, 9)
    ]
    assert done.stdout.splitlines()[-1] == "Time for the 3 jobs left: no finished run to estimate from."
    assert not list(tmp_path.iterdir())

    assert finished(tmp_path, "seed=0,1").returncode == 1  # another sweep, of which this one finds the runs
    before = everything(tmp_path)
    done = finished(tmp_path, *dry, "hydra.launcher.n_jobs=2")
    assert done.returncode == 0, done.stderr
    first, second, third, last = done.stdout.splitlines()[1:]
    assert first.startswith("[1/3] seed=0  finished, AP 41.2") and first.endswith(f"runs/{run_of(tmp_path, 0).name}")
    assert second.startswith("[2/3] seed=1  failed (exit 1), will run again")
    assert third.startswith("[3/3] seed=9  to run")
    # The finished one says that it took 120 seconds; the two others run at the same time.
    assert last.startswith(
        "Time for the 2 jobs left: about 2m 00s, 2m 00s a job, judged by 1 finished job of this sweep; ETA 00:02 (at "
    )
    assert everything(tmp_path) == before


def test_dry_run_without_a_sweep_does_not_train(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, STANDIN, "hydra.launcher.dry_run=true"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert done.stderr == (
        "error: hydra.launcher.dry_run=true is for a sweep: add -m, or leave it out for a single run.\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    done = finished(tmp_path, "seed=0,1")
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: runs/sweeps cannot be used (") and len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own of 400 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_a_job_fills_costs_the_notes_and_the_table(small_disk: Path) -> None:
    done = finished(small_disk, "seed=0,11")
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout.count("warning: ") == 1
    assert (
        "warning: the state of the jobs cannot be written to runs (No space left on device): the jobs go on; make room "
        "there." in done.stdout
    )
    assert "2 ok, 0 failed of 2.\n" in done.stdout  # the table itself is shown
    (folder,) = (small_disk / "runs" / "sweeps").iterdir()
    assert done.stderr == (
        f"error: the table cannot be written to {folder.relative_to(small_disk)} (No space left on device): make room "
        "and run the same command again; finished jobs are not repeated.\n"
    )
    assert not list(small_disk.rglob("*.tmp"))
    assert record(small_disk)["jobs"][0]["state"] == "ok"  # the last that could be written, whole

    (small_disk / "filler").unlink()
    again = finished(small_disk, "seed=0,11")
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("finished before, AP 41.2") == 2
    assert (folder / "table.md").exists()
