"""The launcher of sweeps: what its jobs get, that one failing job costs one job, and what is left at the end."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher

from msil.config import Config, register, to_config
from msil.errors import ConfigError
from msil.sweep.jobs import (
    LEAKED,
    Job,
    Sweep,
    gpu_shares,
    job_arguments,
    job_environment,
    labels_of,
    passed_on,
    plan,
    quoted,
    varied,
)
from msil.sweep.processes import Outcome, run_jobs, tail
from msil.sweep.screen import Screen

ROOT = Path(__file__).resolve().parents[1]
SIX = [[f"model.msil.align={align}", f"model.msil.apply={apply}", "seed=3"]
       for align in ("true", "false") for apply in ("cls", "reg", "both")]  # fmt: skip


def configs(jobs: list[list[str]]) -> list[Config]:
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return [to_config(compose("config", job)) for job in jobs]


# What the jobs are and get


def test_hydra_finds_the_launcher() -> None:
    assert "ProcessLauncher" in {plugin.__name__ for plugin in Plugins.instance().discover(Launcher)}


def test_labels_name_what_varies() -> None:
    assert varied(SIX) == ["model.msil.align", "model.msil.apply"]
    assert labels_of(SIX)[1] == "align=true apply=reg"
    assert labels_of([["model/msil=full"], ["model/msil=no_align"]]) == ["msil=full", "msil=no_align"]
    # Two settings of one short name keep their full names.
    assert labels_of([["data.seed=1", "seed=1"], ["data.seed=2", "seed=2"]])[0] == "data.seed=1 seed=1"


def test_a_plan_is_stable_and_has_a_folder_for_each_job() -> None:
    first = plan(configs(SIX[:2]), SIX[:2])
    assert plan(configs(SIX[:2]), SIX[:2]).name == first.name
    assert plan(configs(SIX[1:3]), SIX[1:3]).name != first.name
    assert first.name.startswith("sweep-")
    assert len(first.name) == len("sweep-") + 8
    assert first.folder == Path("runs/sweeps") / first.name
    assert [job.run_dir.name for job in first.jobs] == [
        f"shapes_fcos_resnet10_msil-{apply}_quick_s3_{job.config_hash}"
        for apply, job in zip(("cls", "reg"), first.jobs, strict=True)
    ]
    assert plan(configs([["experiment=table2"]]), [["experiment=table2"]]).name.startswith("table2-")


def test_two_jobs_with_one_folder_are_refused() -> None:
    jobs = [["seed=1", "run_name=mine"], ["seed=2", "run_name=mine"]]
    with pytest.raises(ConfigError, match=r"jobs 1 \(seed=1\) and 2 \(seed=2\) would both write to runs/mine"):
        plan(configs(jobs), jobs)


def test_a_value_that_cannot_work_stops_the_sweep_before_it_starts() -> None:
    jobs = [["model.msil.kernel_size=1"], ["model.msil.kernel_size=5"]]
    with pytest.raises(ConfigError, match=r"model\.msil\.kernel_size=5 must be one of 1, 3"):
        plan(configs(jobs), jobs)


def test_an_empty_sweep_is_refused() -> None:
    with pytest.raises(ConfigError, match="the sweep has no job"):
        plan([], [])


def test_wandb_runs_are_grouped_unless_the_user_did() -> None:
    sweep = plan(configs([["logger=wandb"]]), [["logger=wandb"]])
    assert sweep.jobs[0].overrides == ("logger=wandb", f"logger.group={sweep.name}")
    for own in (["logger=wandb", "logger.group=mine"], ["logger=csv"]):
        assert plan(configs([own]), [own]).jobs[0].overrides == tuple(own)


def test_a_job_gets_what_was_typed_but_not_the_sweeps_arrangements() -> None:
    typed = ["hydra.mode=MULTIRUN", "hydra/launcher=msil_process", "hydra.launcher.n_jobs=2", "hydra.verbose=true"]
    typed += ["hydra.sweeper.max_batch_size=3", "hydra.sweep.dir=x", "hydra.run.dir=y", "hydra/sweeper=basic"]
    assert passed_on([*typed, "+hydra.job.env_set.A=b", "hydra.runtime.cwd=z"]) == [
        "hydra.verbose=true",
        "+hydra.job.env_set.A=b",
        "hydra.runtime.cwd=z",
    ]
    job = Job(1, ("seed=1", "data.root='a b'"), "0" * 8, Path("my runs/x"), {}, "")
    assert job_arguments(job, typed) == [
        "seed=1",
        "data.root='a b'",
        "hydra.verbose=true",
        "hydra.run.dir='my runs/x'",
        "hydra.mode=RUN",
    ]


@pytest.mark.parametrize("text", ["plain", "a b", "it's", "a=b,c", "back\\slash", "end\\", "both\\'", "[x]", "'"])
def test_quoted_text_is_read_back_by_hydra(text: str) -> None:
    assert OverridesParser.create().parse_override(f"hydra.run.dir={quoted(text)}").value() == text


def test_what_lightning_leaks_does_not_reach_a_job() -> None:
    dirty = dict.fromkeys(LEAKED, "1") | {"HOME": "/h", "OMP_NUM_THREADS": "2"}
    assert {"LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "WORLD_SIZE", "PL_GLOBAL_SEED"} <= set(LEAKED)
    assert job_environment(dirty, None, 1) == {"HOME": "/h", "OMP_NUM_THREADS": "2", "PYTHONUNBUFFERED": "1"}
    assert job_environment({}, "2,3", 4) == {
        "CUDA_VISIBLE_DEVICES": "2,3",
        "OMP_NUM_THREADS": "4",
        "PYTHONUNBUFFERED": "1",
    }


@pytest.mark.parametrize(
    ("gpus", "n_jobs", "shares"),
    [
        ("01234567", 1, [None]),  # one job sees all
        ("", 3, [None, None, None]),
        ("0123", 2, ["0,1", "2,3"]),
        ("01234", 2, ["0,1", "2,3"]),  # equal shares; the fifth stays free
        ("01", 3, ["0", "1", "0"]),
    ],
)
def test_jobs_at_a_time_share_the_gpus(gpus: str, n_jobs: int, shares: list[str | None]) -> None:
    assert gpu_shares(list(gpus), n_jobs) == shares


# How they run

FINISH = "import pathlib, sys; pathlib.Path(sys.argv[1], 'done').touch()"
SAY_AND_FAIL = "print('\\r10%\\r20%'); print('no such image'); raise SystemExit(2)"
CRASH = "import os; os.kill(os.getpid(), 11)"
WAIT = "import time; print('waiting', flush=True); time.sleep(60)"
# As DDP's rank 0 does when it dies: its other rank waits on.
LEAVE_A_CHILD = (
    "import pathlib, subprocess, sys\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    "pathlib.Path(sys.argv[1], 'pid').write_text(str(child.pid)); sys.exit(1)"
)


def jobs_of(folder: Path, programs: list[str]) -> list[Job]:
    return [
        Job(number, (program,), "0" * 8, folder / str(number), {}, f"job={number}")
        for number, program in enumerate(programs, 1)
    ]


def run(
    jobs: list[Job], changed: Callable[[Outcome], None] = lambda _: None, n_jobs: int = 1
) -> tuple[list[Outcome], int | None]:
    return run_jobs(
        jobs,
        command=lambda job: [sys.executable, "-S", "-c", job.overrides[0], str(job.run_dir)],
        environment=lambda slot: {**os.environ, "SLOT": str(slot)},
        is_finished=lambda job: (job.run_dir / "done").exists(),
        changed=changed,
        tick=lambda _: None,
        n_jobs=n_jobs,
        grace_seconds=5.0,
    )


def status(job: Job) -> dict[str, object]:
    return json.loads((job.run_dir / "status.json").read_text())


def test_a_failing_job_costs_one_job(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, [SAY_AND_FAIL, CRASH, "pass", FINISH])
    outcomes, stopped_by = run(jobs)
    assert stopped_by is None
    assert [outcome.state for outcome in outcomes] == ["failed", "failed", "failed", "ok"]
    assert [outcome.exit_code for outcome in outcomes] == [2, -signal.SIGSEGV, 0, 0]
    assert outcomes[0].reason.splitlines() == ["exit code 2", "20%", "no such image"]
    assert outcomes[1].reason == "killed by SIGSEGV"
    assert "exit code 0 but without a complete result.json" in outcomes[2].reason
    assert [status(job)["state"] for job in jobs] == ["failed", "failed", "failed", "ok"]

    seen: list[str] = []
    again, _ = run(jobs[2:], lambda outcome: seen.append(f"{outcome.job.number} {outcome.state}"))
    assert [outcome.state for outcome in again] == ["failed", "skipped"]
    assert seen == ["4 skipped", "3 running", "3 failed"]  # the finished one did not start again


def test_jobs_at_a_time_have_slots_of_their_own(tmp_path: Path) -> None:
    meet = (
        "import os, pathlib, sys, time\n"
        "here = pathlib.Path(sys.argv[1]); (here.parent / ('slot' + os.environ['SLOT'])).touch()\n"
        "end = time.time() + 30\n"
        "while not (here.parent / 'slot1').exists() and time.time() < end: time.sleep(0.02)\n"
        "(here / 'done').touch()"
    )
    outcomes, _ = run(jobs_of(tmp_path, [meet, meet, FINISH]), n_jobs=2)  # the first waits for the second
    assert [outcome.state for outcome in outcomes] == ["ok", "ok", "ok"]
    assert sorted(path.name for path in tmp_path.glob("slot*")) == ["slot0", "slot1"]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1].startswith("Z")
    except (ProcessLookupError, FileNotFoundError):
        return True


def test_the_ranks_of_a_dead_job_are_not_left_behind(tmp_path: Path) -> None:
    run(jobs_of(tmp_path, [LEAVE_A_CHILD]))
    pid = int((tmp_path / "1" / "pid").read_text())
    deadline = time.monotonic() + 10
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert gone(pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_running_job_and_starts_no_other(tmp_path: Path, number: signal.Signals) -> None:
    jobs = jobs_of(tmp_path, [FINISH, WAIT, FINISH])

    def interrupt(outcome: Outcome) -> None:
        if outcome.job.number == 2 and outcome.state == "running":
            threading.Timer(0.3, os.kill, (os.getpid(), number)).start()

    # A shell that starts the tests in the background has them ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        outcomes, stopped_by = run(jobs, interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [outcome.state for outcome in outcomes] == ["ok", "interrupted", "waiting"]
    assert stopped_by == number
    assert outcomes[1].exit_code == -signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_log_is_continued_and_its_tail_is_that_of_the_last_run(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, ["print('first')"])
    run(jobs)
    outcomes, _ = run([replace(jobs[0], overrides=("print('second')",))])
    assert (tmp_path / "1" / "console.log").read_text() == "first\nsecond\n"
    assert outcomes[0].reason.splitlines()[1:] == ["second"]
    assert tail(tmp_path / "1" / "console.log") == ["first", "second"]


def test_the_screen_has_a_line_for_each_change(tmp_path: Path) -> None:
    job = jobs_of(tmp_path, [""])[0]
    stream = io.StringIO()
    screen = Screen(Sweep("sweep-1", tmp_path, (job,), None), 1, stream)
    screen.changed(Outcome(job, "running"))
    screen.tick([Outcome(job, "running")])  # no terminal, no live line
    screen.changed(Outcome(job, "failed", 2, 200.0, "exit code 2\nno such image"))
    assert stream.getvalue().splitlines()[1:] == [
        f"[1/1] job=1  started, log in {tmp_path}/1/console.log",
        "[1/1] job=1  FAILED after 3m 20s: exit code 2. Its log ends:",
        "      | no such image",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_how_far_the_running_job_is(tmp_path: Path) -> None:
    job = jobs_of(tmp_path, [""])[0]
    stream = Terminal()
    screen = Screen(Sweep("sweep-1", tmp_path, (job,), None), 1, stream)
    screen.changed(Outcome(job, "running"))
    job.run_dir.mkdir()
    # As metrics.csv is written: a row of a training step, a row of an evaluation, empty cells; epochs count from 0.
    (job.run_dir / "metrics.csv").write_text("epoch,step,loss,AP\n3,40,1.2345,\n3,41,,0.2104\n")
    screen.tick([Outcome(job, "running")])
    assert stream.getvalue().endswith("\r\x1b[2Kjob=1: epoch 4, loss 1.234, AP 21.0, 0s")
    (job.run_dir / "metrics.csv").write_text("epoch,step,loss,AP\n3,40,1.2345,\n4,4")  # a row half written
    screen.changed(Outcome(job, "failed", 1, 1.0, "exit code 1"))
    assert stream.getvalue().endswith("\r\x1b[2K[1/1] job=1  FAILED after 1s: exit code 1. Its log ends:\n")


# From the command line to the table


def test_a_sweep_from_end_to_end(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests" / "standin_run.py"), "-m", "seed=0,1", "runs_dir=my runs"]
    leaky = {**os.environ, "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1", "PL_GLOBAL_SEED": "7"}

    def sweep() -> tuple[subprocess.CompletedProcess[str], list[dict[str, str]]]:
        done = subprocess.run(command, cwd=tmp_path, env=leaky, capture_output=True, text=True, check=False)
        (folder,) = (tmp_path / "my runs" / "sweeps").iterdir()
        assert {file.name for file in folder.iterdir()} == {"table.md", "table.csv", "sweep.json", "multirun.yaml"}
        return done, list(csv.DictReader((folder / "table.csv").open(newline="")))

    done, rows = sweep()
    assert done.returncode == 1, done.stderr
    assert "[2/2] seed=1  FAILED" in done.stdout
    assert "      | error: no such image" in done.stdout
    assert "1 ok, 1 failed of 2." in done.stdout.splitlines()[-2]
    assert done.stdout.splitlines()[-1].endswith("msil report 'my runs'")
    assert [(row["seed"], row["AP"], row["state"]) for row in rows] == [
        ("0", "0.412", "ok"),
        ("1", "", "failed (exit 1)"),
    ]
    (finished,) = (tmp_path / "my runs").glob("*_s0_*")
    environment = json.loads((finished / "environment.json").read_text())
    assert not {"LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "PL_GLOBAL_SEED"} & set(environment)
    arguments = json.loads((finished / "arguments.json").read_text())
    assert arguments == ["seed=0", "runs_dir=my\\ runs", f"hydra.run.dir='my runs/{finished.name}'", "hydra.mode=RUN"]
    assert (finished / "console.log").read_text() == "the job's own words\n"

    before = (finished / "result.json").stat().st_mtime_ns
    done, rows = sweep()
    assert "[1/2] seed=0  finished before, AP 41.2" in done.stdout
    assert (finished / "result.json").stat().st_mtime_ns == before
    assert [row["state"] for row in rows] == ["skipped", "failed (exit 1)"]


def test_a_refused_sweep_leaves_nothing_and_exits_with_2(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests" / "standin_run.py"), "-m", "seed=0,1", "run_name=mine"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: jobs 1 (seed=0) and 2 (seed=1) would both write to runs/mine")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
