"""How a sweep's jobs are run, with small programs in their place: a failing job costs one job, none is left behind."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from tests.launch.faults import alive, until

from hydra_plugins.msil_launcher.process_launcher import _job_return
from msil.runs import REQUIRED_KEYS, is_finished
from msil.sweep.plan import Job
from msil.sweep.run import run_jobs
from msil.sweep.show import Outcome, say

HASH = "0" * 8
RESULT = dict.fromkeys(REQUIRED_KEYS, 1) | {
    "status": "finished", "config_hash": HASH, "metrics": {"AP": 0.412}, "config": {},
}  # fmt: skip
START = "import json, os, pathlib, signal, subprocess, sys, time; here = pathlib.Path(sys.argv[1])\n"
FINISH = f"(here / 'result.json').write_text({json.dumps(RESULT)!r})"
WAIT = "(here / 'ready').touch(); time.sleep(60)"


def jobs_of(folder: Path, *programs: str) -> list[Job]:
    return [
        Job(number, (program,), HASH, folder / str(number), {}, f"job={number}")
        for number, program in enumerate(programs, 1)
    ]


def run(jobs: list[Job], n_jobs: int = 1, grace_seconds: float = 20.0) -> tuple[list[Outcome], int | None]:
    outcomes = [Outcome(job, "skipped" if is_finished(job.run_dir, job.config_hash) else "waiting") for job in jobs]
    # A shell that starts the tests in the background has them ignore SIGINT, nohup SIGHUP.
    ours = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in ours.items()}
    try:
        stopped_by = run_jobs(
            outcomes,
            command=lambda job: [sys.executable, "-S", "-c", START + job.overrides[0], str(job.run_dir)],
            environment=lambda slot: {**os.environ, "SLOT": str(slot)},
            n_jobs=n_jobs,
            grace_seconds=grace_seconds,
        )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return outcomes, stopped_by


# program, exit code, the first and the last line of the reason
FAULTS = [
    ("raise ValueError('no such image')", 1, "exit code 1", "ValueError: no such image"),
    ("os.kill(os.getpid(), 11)", -11, "Segmentation fault, signal 11", "signal 11"),
    ("import resource; resource.setrlimit(resource.RLIMIT_AS, (2**28, 2**28)); bytearray(2**30)", 1, "", "MemoryError"),
    # As the system does when memory runs out
    ("os.kill(os.getpid(), 9)", -9, "Killed, signal 9, usually because memory ran out", "data.workers"),
    ("os.kill(os.getpid(), signal.SIGRTMIN + 1)", -35, "Real-time signal 1, signal 35", "signal 35"),
    ("print('\\r10%\\r20%'); raise SystemExit(3)", 3, "exit code 3", "20%"),
    ("os._exit(0)", 0, "exit code 0, but no complete result.json", "result.json"),
    # A scheduler's signal to the job alone
    ("signal.signal(15, lambda *_: sys.exit(75)); os.kill(os.getpid(), 15)", 75, "exit code 75", "75"),
]


def test_however_a_job_fails_the_others_run_and_only_it_runs_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = jobs_of(tmp_path, *(fault[0] for fault in FAULTS), FINISH)
    outcomes, stopped_by = run(jobs)
    assert stopped_by is None
    assert [outcome.state for outcome in outcomes] == ["failed"] * len(FAULTS) + ["ok"]
    lines = capsys.readouterr().out.splitlines()
    for outcome, (_, code, first, last) in zip(outcomes, FAULTS, strict=False):
        assert outcome.exit_code == code
        reason = outcome.reason.splitlines()
        assert reason[0].startswith(first) and reason[-1].endswith(last)
        at = next(at for at, line in enumerate(lines) if f"[{outcome.job.number}/9]" in line and "FAILED" in line)
        assert lines[at + 1] == f"      log: {outcome.job.run_dir}/console.log"
        after = at + 1 + len(reason)  # printed at once: the next job starts after it
        assert f"[{outcome.job.number + 1}/9] job={outcome.job.number + 1}  started" in lines[after]
    assert lines[-1].endswith("AP 41.2")

    again, _ = run([replace(job, overrides=(FINISH,)) for job in jobs])
    assert [outcome.state for outcome in again] == ["ok"] * len(FAULTS) + ["skipped"]
    assert "job=9" not in capsys.readouterr().out


def test_jobs_at_a_time_have_slots_of_their_own(tmp_path: Path) -> None:
    meet = (
        "(here.parent / ('slot' + os.environ['SLOT'])).touch(); end = time.time() + 30\n"
        f"while not (here.parent / 'slot1').exists() and time.time() < end: time.sleep(0.02)\n{FINISH}"
    )
    outcomes, _ = run(jobs_of(tmp_path, meet, meet, FINISH), n_jobs=2)  # the first waits for the second
    assert [outcome.state for outcome in outcomes] == ["ok", "ok", "ok"]
    assert sorted(path.name for path in tmp_path.glob("slot*")) == ["slot0", "slot1"]


# As a rank or a loader's worker
CHILD = (
    "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])\n"
    "(here / 'pid').write_text(str(child.pid))\n"
)
# As a training run: it needs its child to save, and then ends with 75.
SAVE = (
    f"got = []; signal.signal(signal.SIGTERM, lambda number, _: got.append(number))\n{CHILD}(here / 'ready').touch()\n"
    "while not got: time.sleep(0.02)\n"
    "time.sleep(0.3); (here / ('saved' if child.poll() is None else 'child died')).touch(); sys.exit(75)"
)


def test_the_children_of_a_dead_job_are_not_left_behind(tmp_path: Path) -> None:
    run(jobs_of(tmp_path, f"{CHILD}sys.exit(1)"))
    until(lambda: not alive(int((tmp_path / "1" / "pid").read_text())))


def send_when_there(path: Path, *numbers: signal.Signals) -> None:
    """Sends this process the signals, one after the other, once `path` is there."""

    def send() -> None:
        until(path.exists)
        for number in numbers:
            os.kill(os.getpid(), number)
            threading.Event().wait(0.3)  # two signals at one moment would be one

    threading.Thread(target=send, daemon=True).start()


def test_a_signal_lets_the_running_job_save_and_starts_no_other(tmp_path: Path) -> None:
    send_when_there(tmp_path / "2" / "ready", signal.SIGHUP)  # a terminal that is closed
    outcomes, stopped_by = run(jobs_of(tmp_path, FINISH, SAVE, FINISH))
    assert [outcome.state for outcome in outcomes] == ["ok", "interrupted", "waiting"]
    assert stopped_by == signal.SIGHUP
    assert (tmp_path / "2" / "saved").exists()  # its child lived until then,
    until(lambda: not alive(int((tmp_path / "2" / "pid").read_text())))  # and no longer


@pytest.mark.parametrize(("signals", "grace_seconds"), [((signal.SIGTERM,), 0.2), ((signal.SIGINT,) * 2, 3600)])
def test_a_deaf_job_is_killed_after_the_grace_or_by_a_second_ctrl_c(
    tmp_path: Path, signals: tuple[signal.Signals, ...], grace_seconds: float
) -> None:
    send_when_there(tmp_path / "1" / "ready", *signals)
    jobs = jobs_of(tmp_path, f"signal.signal(signal.SIGTERM, signal.SIG_IGN); {WAIT}")
    outcomes, stopped_by = run(jobs, grace_seconds=grace_seconds)
    assert (outcomes[0].state, outcomes[0].exit_code) == ("interrupted", -signal.SIGKILL)
    assert stopped_by == signals[0]


def test_a_job_that_cannot_be_started_costs_one_job(tmp_path: Path) -> None:
    (tmp_path / "1").write_text("a file where its folder should be")
    outcomes, _ = run(jobs_of(tmp_path, FINISH, FINISH))
    assert [outcome.state for outcome in outcomes] == ["failed", "ok"]
    assert outcomes[0].reason.startswith("could not be started: [Errno 17] File exists")


def test_a_continued_log_is_appended_to(tmp_path: Path) -> None:
    for word in ("first", "second"):
        outcomes, _ = run(jobs_of(tmp_path, f"print('{word}')"))
        assert outcomes[0].reason.splitlines()[1:] == [word]
    assert (tmp_path / "1" / "console.log").read_text() == "first\nsecond\n"


def test_a_job_returns_its_own_ap(tmp_path: Path) -> None:
    (outcome,), _ = run(jobs_of(tmp_path, FINISH))
    (tmp_path / "1" / "result.json").unlink()  # its run has gone on for more epochs since
    assert _job_return(outcome).return_value == 0.412


def test_output_to_a_full_disk_costs_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    full = open("/dev/full", "w")  # noqa: SIM115  every write: no space left on device
    monkeypatch.setattr(sys, "stdout", full)
    say("lost")
    with pytest.raises(OSError, match="No space left"):  # so it is full indeed
        full.close()
