"""How a sweep's jobs are run: one failing job costs one job, signals, a full disk, nothing left behind."""

from __future__ import annotations

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

from msil.sweep.jobs import Job
from msil.sweep.processes import Outcome, run_jobs, tail

ROOT = Path(__file__).resolve().parents[2]
FINISH = "import pathlib, sys; pathlib.Path(sys.argv[1], 'done').touch()"
SAY_AND_FAIL = "print('\\r10%\\r20%'); print('no such image'); raise SystemExit(2)"
CRASH = "import os; os.kill(os.getpid(), 11)"
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


class Watched:
    """A watcher that notes what it is told."""

    def __init__(self, changed: Callable[[Outcome], None] = lambda _: None) -> None:
        self.told: list[str] = []
        self._changed = changed

    def changed(self, outcome: Outcome) -> None:
        self.told.append(f"{outcome.job.number} {outcome.state}")
        self._changed(outcome)

    def tick(self) -> None: ...

    def stopping(self, count: int, grace_seconds: float) -> None:
        self.told.append(f"stopping {count}")

    def trouble(self, sentence: str) -> None:
        self.told.append(sentence)


def run(
    jobs: list[Job], watched: Watched | None = None, n_jobs: int = 1, grace_seconds: float = 20.0
) -> tuple[list[Outcome], int | None]:
    finished = [(job.run_dir / "done").exists() for job in jobs]
    outcomes = [Outcome(job, "skipped" if done else "waiting") for job, done in zip(jobs, finished, strict=True)]
    # A shell that starts the tests in the background has them ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        stopped_by = run_jobs(
            outcomes,
            command=lambda job: [sys.executable, "-S", "-c", job.overrides[0], str(job.run_dir)],
            environment=lambda slot: {**os.environ, "SLOT": str(slot)},
            is_finished=lambda job: (job.run_dir / "done").exists(),
            watcher=watched or Watched(),
            n_jobs=n_jobs,
            grace_seconds=grace_seconds,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    return outcomes, stopped_by


def until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def status(job: Job) -> dict[str, object]:
    return json.loads((job.run_dir / "status.json").read_text())


NO_MEMORY = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**28, 2**28)); bytearray(2**30)"
KILLED = "import os; os.kill(os.getpid(), 9)"  # as the system does when memory runs out


@pytest.mark.parametrize(
    ("program", "exit_code", "first", "last"),
    [
        ("raise ValueError('no such image')", 1, "exit code 1", "ValueError: no such image"),
        (CRASH, -11, "killed by SIGSEGV", "killed by SIGSEGV"),
        (NO_MEMORY, 1, "exit code 1", "MemoryError"),
        (KILLED, -9, "killed by SIGKILL, most often by the system for want of memory", "n_jobs"),
        ("raise SystemExit(3)", 3, "exit code 3", "exit code 3"),
    ],
)
def test_however_a_job_fails_the_others_run_and_only_it_runs_again(
    tmp_path: Path, program: str, exit_code: int, first: str, last: str
) -> None:
    jobs = jobs_of(tmp_path, [FINISH, program, FINISH])
    outcomes, _ = run(jobs)
    assert [(outcome.state, outcome.exit_code) for outcome in outcomes] == [("ok", 0), ("failed", exit_code), ("ok", 0)]
    reason = outcomes[1].reason.splitlines()
    assert reason[0].startswith(first) and reason[-1].endswith(last)
    watched = Watched()
    again, _ = run([replace(job, overrides=(FINISH,)) for job in jobs], watched)
    assert watched.told == ["2 running", "2 ok"]
    assert [outcome.state for outcome in again] == ["skipped", "ok", "skipped"]


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

    watched = Watched()
    again, _ = run(jobs[2:], watched)
    assert [outcome.state for outcome in again] == ["failed", "skipped"]
    assert watched.told == ["3 running", "3 failed"]  # the finished one did not start again


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
    assert until(lambda: gone(pid))


def signal_when(path: Path, *numbers: signal.Signals) -> Callable[[Outcome], None]:
    """Sends this process the signals, one after the other, once `path` is there."""

    def send() -> None:
        if until(path.exists):
            for number in numbers:
                os.kill(os.getpid(), number)
                time.sleep(0.3)  # two signals at one moment would be one

    def changed(outcome: Outcome) -> None:
        if outcome.job.run_dir == path.parent and outcome.state == "running":
            threading.Thread(target=send, daemon=True).start()

    return changed


# As a training run: it has a child (a loader's worker), needs it to save, and then ends with 75.
SAVE = (
    "import pathlib, signal, subprocess, sys, time\n"
    "here = pathlib.Path(sys.argv[1]); got = []\n"
    "signal.signal(signal.SIGTERM, lambda number, _: got.append(number))\n"
    "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])\n"
    "(here / 'pid').write_text(str(child.pid)); (here / 'ready').touch()\n"
    "while not got: time.sleep(0.02)\n"
    "time.sleep(0.3)\n"
    "(here / ('saved' if child.poll() is None else 'worker died')).touch()\n"
    "sys.exit(75)"
)
STUBBORN = (
    "import pathlib, signal, sys, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN); pathlib.Path(sys.argv[1], 'ready').touch(); time.sleep(60)"
)
PREEMPTED = (
    "import os, signal, sys\n"
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); os.kill(os.getpid(), signal.SIGTERM)"
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_the_running_job_save_and_starts_no_other(tmp_path: Path, number: signal.Signals) -> None:
    jobs = jobs_of(tmp_path, [FINISH, SAVE, FINISH])
    watched = Watched(signal_when(tmp_path / "2" / "ready", number))
    outcomes, stopped_by = run(jobs, watched)
    assert [outcome.state for outcome in outcomes] == ["ok", "interrupted", "waiting"]
    assert stopped_by == number
    assert outcomes[1].exit_code == 75
    assert (tmp_path / "2" / "saved").exists()  # its worker lived until then,
    assert until(lambda: gone(int((tmp_path / "2" / "pid").read_text())))  # and no longer
    assert watched.told[-2:] == ["stopping 1", "2 interrupted"]
    assert status(jobs[1])["state"] == "interrupted"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_job_that_does_not_stop_is_killed_after_the_grace(tmp_path: Path) -> None:
    watched = Watched(signal_when(tmp_path / "1" / "ready", signal.SIGTERM))
    outcomes, _ = run(jobs_of(tmp_path, [STUBBORN]), watched, grace_seconds=0.2)
    assert (outcomes[0].state, outcomes[0].exit_code) == ("interrupted", -signal.SIGKILL)


def test_a_second_ctrl_c_kills_at_once(tmp_path: Path) -> None:
    watched = Watched(signal_when(tmp_path / "1" / "ready", signal.SIGINT, signal.SIGINT))
    outcomes, stopped_by = run(jobs_of(tmp_path, [STUBBORN]), watched, grace_seconds=3600)  # else it would never end
    assert (outcomes[0].exit_code, stopped_by) == (-signal.SIGKILL, signal.SIGINT)


def test_a_job_preempted_by_a_signal_to_itself_is_to_run_again(tmp_path: Path) -> None:
    outcomes, stopped_by = run(jobs_of(tmp_path, [PREEMPTED, FINISH]))
    assert stopped_by is None
    assert [outcome.state for outcome in outcomes] == ["failed", "ok"]
    assert outcomes[0].reason == "preempted (exit code 75); run again to resume"


def test_a_job_that_cannot_be_started_costs_one_job(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, [FINISH, FINISH])
    (tmp_path / "1").write_text("a file where its folder should be")
    outcomes, _ = run(jobs)
    assert [outcome.state for outcome in outcomes] == ["failed", "ok"]
    assert outcomes[0].reason.startswith("could not be started: [Errno 17] File exists")


def test_jobs_do_not_stay_behind_when_the_launcher_itself_breaks(tmp_path: Path) -> None:
    def fail(_: Outcome) -> None:
        raise ZeroDivisionError

    def wait_and_fail(outcome: Outcome) -> None:
        if outcome.state == "running" and until((outcome.job.run_dir / "ready").exists):
            fail(outcome)

    with pytest.raises(ZeroDivisionError):
        run(jobs_of(tmp_path, [SAVE]), Watched(wait_and_fail))
    assert until(lambda: gone(int((tmp_path / "1" / "pid").read_text())))


FULL_DISK = """
import resource, sys
from pathlib import Path
from tests.sweep.test_processes import FINISH, Watched, jobs_of, run
jobs = jobs_of(Path(sys.argv[1]), [FINISH, FINISH])
resource.setrlimit(resource.RLIMIT_FSIZE, (0, -1))  # no byte more into any file
watched = Watched()
outcomes, _ = run(jobs, watched)
print([outcome.state for outcome in outcomes], *watched.told, sep="\\n")
"""


def test_a_full_disk_costs_the_notes_and_no_job(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = f"the state of the jobs cannot be written to {tmp_path} (File too large): the jobs go on; make room there."
    assert done.stdout.splitlines() == [
        "['ok', 'ok']", said, "1 running", said, "1 ok", said, "2 running", said, "2 ok",
    ]  # fmt: skip
    assert not list(tmp_path.rglob("*.tmp")) + list(tmp_path.rglob("status.json"))


def test_a_log_is_continued_and_its_tail_is_that_of_the_last_run(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, ["print('first')"])
    run(jobs)
    outcomes, _ = run([replace(jobs[0], overrides=("print('second')",))])
    assert (tmp_path / "1" / "console.log").read_text() == "first\nsecond\n"
    assert outcomes[0].reason.splitlines()[1:] == ["second"]
    assert tail(tmp_path / "1" / "console.log") == ["first", "second"]
    assert tail(tmp_path / "removed") == []
