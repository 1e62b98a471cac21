"""One run as several processes: how they end together, with small programs in their place, and with real ones."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from msil.launch.processes import count_devices, run_ranks, started_from_outside, tail

from .faults import alive, until

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_SECONDS = 60.0  # the promise: a run whose process has died ends within a minute

RANK = "import os, pathlib, signal, sys, time; rank = int(os.environ['LOCAL_RANK']); "
WAIT = "time.sleep(300)"
# In a program of its own, for a signal or a kill of the process above the ranks.
SUPERVISOR = """
import sys
from pathlib import Path
from msil.launch.processes import run_ranks
sys.exit(run_ranks([sys.executable, "-c", sys.argv[2], sys.argv[1]], 2, Path(sys.argv[1])))
"""


def ranks(program: str, folder: Path) -> int:
    return run_ranks([sys.executable, "-S", "-c", RANK + program, str(folder)], 2, folder)


# With small programs


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msil.launch.processes.GRACE_SECONDS", 1.0)


def test_all_end_well(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert ranks("print('rank', rank, os.environ['MASTER_PORT'].isdecimal())", tmp_path) == 0
    assert capfd.readouterr().out == "rank 0 True\n"  # rank 0 alone has the terminal
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dying", [0, 1])
@pytest.mark.usefixtures("short_grace")
def test_the_death_of_one_ends_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str], dying: int) -> None:
    program = (
        f"pathlib.Path(sys.argv[1], str(rank)).write_text(str(os.getpid())); print('working', flush=True)\n"
        f"while len(list(pathlib.Path(sys.argv[1]).glob('[01]'))) < 2: time.sleep(0.01)\n"
        f"os.kill(os.getpid(), 9) if rank == {dying} else os.kill(os.getppid(), 0)\n{WAIT}"
    )
    assert ranks(program, tmp_path) == 1
    assert not any(alive(int((tmp_path / str(rank)).read_text())) for rank in (0, 1))
    said = capfd.readouterr().err
    assert f"error: process {dying} of this run failed (Killed, signal 9" in said
    assert "the same command continues after the last checkpoint" in said
    assert ("rank_1.log\n      | working" in said) == (dying == 1)


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        # Rank 0 has printed what was wrong; rank 1 too, in its log.
        ("print('error: no such image', file=sys.stderr); sys.exit(2)", 2, "error: no such image\n"),
        # Rank 1 alone has the reason, and rank 0 only lost its peer.
        ("rank and (print('error: a bad image'), sys.exit(2)); sys.exit(1)", 2, "      | error: a bad image\n"),
        ("rank and sys.exit(70); time.sleep(300)", 70, "rank_1.log\n"),
        ("sys.exit(73)", 73, ""),
        ("rank and sys.exit(75); time.sleep(0.5); sys.exit(75)", 75, ""),
        # A signal before the processes can handle it is a preemption too.
        (f"os.kill(os.getppid(), signal.SIGTERM) if rank == 0 else None; {WAIT}", 75, "run again to resume\n"),
    ],
)
@pytest.mark.usefixtures("short_grace")
def test_the_exit_code_with_a_reason_is_the_runs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], program: str, code: int, said: str
) -> None:
    assert ranks(program, tmp_path) == code
    assert capfd.readouterr().err.endswith(said)


def supervised(folder: Path, program: str) -> tuple[subprocess.Popen[bytes], list[int]]:
    """The process above two ranks, once both have begun, and their pids."""
    begun = "pathlib.Path(sys.argv[1], f'pid{rank}').write_text(str(os.getpid())); "
    supervisor = subprocess.Popen([sys.executable, "-c", SUPERVISOR, str(folder), RANK + program + begun + WAIT])
    files = [folder / "pid0", folder / "pid1"]
    until(lambda: all(file.exists() and file.read_text() for file in files), "both began")
    return supervisor, [int(file.read_text()) for file in files]


def test_a_signal_is_passed_on(tmp_path: Path) -> None:
    supervisor, _ = supervised(tmp_path, "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75)); ")
    supervisor.send_signal(signal.SIGUSR1)
    assert supervisor.wait(DEADLINE_SECONDS) == 75


def test_they_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    supervisor, pids = supervised(tmp_path, "from msil.launch.lifeline import end_with_parent; end_with_parent(1.0); ")
    supervisor.kill()
    supervisor.wait()
    until(lambda: not any(alive(pid) for pid in pids), "they live on")


def test_the_tail_of_a_log(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"before\n\r10%\r20%\n\n\xff no such image\n")
    assert tail(tmp_path / "log", start=7) == ["20%", "\N{REPLACEMENT CHARACTER} no such image"]
    assert tail(tmp_path / "removed") == []


def test_a_process_a_device() -> None:
    assert [count_devices(devices, cpu=False) for devices in (1, 2, "0,2,3", "1,")] == [1, 2, 3, 1]
    gpus = max(1, torch.cuda.device_count())
    assert [count_devices(devices, cpu=False) for devices in ("auto", -1, "-1")] == [gpus] * 3
    assert [count_devices(devices, cpu=True) for devices in ("auto", -1, 2)] == [1, 1, 2]


def test_processes_started_from_outside() -> None:
    assert not started_from_outside({"HOME": "/"})
    assert started_from_outside({"LOCAL_RANK": "0"})  # torchrun, or run_ranks
    assert started_from_outside({"SLURM_NTASKS": "4"}) and not started_from_outside({"SLURM_NTASKS": "1"})


# With real trainings on two processes

WORDS = (
    "data.num_train=44", "data.num_val=8", "data.image_size=64", "data.batch_size=4", "data.eval_batch_size=4",
    "data.workers=0", "model.channels=16", "model.head.num_convs=1", "model.head.norm_groups=4",
    "model.msil.reduction=4", "model.score_thresh=0.001", "schedule.epochs=8", "schedule.eval_every=4",
    "schedule.warmup_steps=0", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2",
    "trainer.progress_bar=false", "trainer.save_every=1", "run_name=it",
)  # fmt: skip


def begun(folder: Path) -> subprocess.Popen[str]:
    words = [*WORDS, f"data.root={folder.parent}/shapes", f"runs_dir={folder}"]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def after_saves(process: subprocess.Popen[str], folder: Path, count: int) -> list[int]:
    """Wait for so many new checkpoints; the pids of its two processes."""
    last = folder / "it" / "checkpoints" / "last.ckpt"

    def saved() -> int:
        return last.stat().st_mtime_ns if last.exists() else 0

    for _ in range(count):
        before = saved()
        until(lambda before=before: saved() != before or process.poll() is not None, "nothing was saved", 240)
        assert process.poll() is None, process.communicate()[1]
    return children(process.pid)


def killed(folder: Path, victim: int, number: signal.Signals, dice: random.Random) -> tuple[int, str, float]:
    """Starts the run, sends rank `victim` (2: the process above them) a signal: its exit code, words and seconds."""
    process = begun(folder)
    pids = after_saves(process, folder, dice.randint(1, 3))
    time.sleep(dice.uniform(0, 0.1))
    at = time.monotonic()
    os.kill([*pids, process.pid][victim], number)
    _, said = process.communicate(timeout=DEADLINE_SECONDS)
    until(lambda: not any(alive(pid) for pid in pids), f"processes {pids} live on")
    return process.returncode, said, time.monotonic() - at


def finished(folder: Path) -> tuple[dict, ...]:
    """Its numbers, weights and optimizer states."""
    process = begun(folder)
    _, said = process.communicate()
    assert process.returncode == 0, said
    result = json.loads((folder / "it" / "result.json").read_text())
    last = torch.load(folder / "it" / "checkpoints" / "last.ckpt", weights_only=True)
    return {**result["metrics"], "steps": result["steps"]}, last["state_dict"], last["optimizer_states"][0]["state"]


@pytest.mark.slow
def test_two_processes_killed_and_signalled_go_on_to_the_same_bits(tmp_path: Path) -> None:
    """6 times kill -9, to either rank or to the process above them, and SIGTERM and SIGUSR1 to either rank."""
    whole = finished(tmp_path / "whole")
    dice = random.Random(0)
    seconds = []
    for count in range(6):
        code, said, took = killed(tmp_path / "killed", count % 3, signal.SIGKILL, dice)
        assert code == (1 if count % 3 < 2 else -signal.SIGKILL), said
        seconds.append(took)
        if count % 3 < 2:
            assert f"process {count % 3} of this run failed (Killed, signal 9" in said
            assert "Traceback" not in said
    for victim, number in ((0, signal.SIGTERM), (1, signal.SIGTERM), (0, signal.SIGUSR1), (1, signal.SIGUSR1)):
        code, said, took = killed(tmp_path / "killed", victim, number, dice)
        assert code == 75, said
        assert "the same command continues there" in said
    print(f"6 kills: ended {max(seconds):.1f} s after the kill at most")
    ours = finished(tmp_path / "killed")
    assert ours[0] == whole[0] and ours[0]["steps"] == 88
    torch.testing.assert_close(ours[1:], whole[1:], rtol=0, atol=0)


# Runs run.py as it is, but for one loss of rank 1.
ONE_BAD_LOSS = """
import os, runpy, sys
from msil.detection import Detector

real, steps = Detector.loss, []

def loss(self, *arguments):
    found = real(self, *arguments)
    steps.append(found)
    if len(steps) == 3 and os.environ["LOCAL_RANK"] == "1":
        found["loss_bbox"] = found["loss_bbox"] * float("nan")
    return found

Detector.loss = loss
script = sys.argv.pop(1)
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.slow
def test_a_loss_that_is_no_number_on_one_process_stops_all_before_the_step(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run_dir = tmp_path / "runs" / "it"
    words = [*WORDS, f"data.root={tmp_path}/shapes", f"runs_dir={tmp_path}/runs"]
    assert run_ranks([sys.executable, "-c", ONE_BAD_LOSS, str(ROOT / "run.py"), *words], 2, run_dir) == 70
    assert re.search(r"error: .*loss_bbox is nan", capfd.readouterr().err)
    last = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2  # saved after every step: none has taken the third
    assert all(tensor.isfinite().all() for tensor in last["state_dict"].values())
