"""What a sweep shows while it runs."""

from __future__ import annotations

import io
import re
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import pytest

from msil.sweep import estimate
from msil.sweep.jobs import Job, Sweep
from msil.sweep.processes import Outcome
from msil.sweep.screen import Screen


def screen_of(folder: Path, states: list[str], stream: TextIO, seconds: float = 0.0) -> tuple[Screen, list[Outcome]]:
    """A screen for jobs of these states; those that have ended took `seconds`."""
    jobs = tuple(Job(n, (), "0" * 8, folder / str(n), {}, f"job={n}") for n in range(1, len(states) + 1))
    outcomes = [
        Outcome(job, state, seconds=seconds if state == "ok" else 0.0) for job, state in zip(jobs, states, strict=True)
    ]
    return Screen(Sweep("sweep-1", folder, jobs, None), outcomes, 1, expected={}, stream=stream), outcomes


def test_a_failure_has_its_logs_path_and_end(tmp_path: Path) -> None:
    stream = io.StringIO()
    screen, (outcome,) = screen_of(tmp_path, ["running"], stream)
    screen.changed(outcome)
    screen.tick()  # no terminal, no live line
    screen.changed(Outcome(outcome.job, "failed", 2, 200.0, "exit code 2\nno such image"))
    assert stream.getvalue().splitlines()[1:4] == [
        f"[1/1] job=1  started, log in {tmp_path}/1/console.log",
        "[1/1] job=1  FAILED after 3m 20s: exit code 2",
        f"      log: {tmp_path}/1/console.log, which ends:",
    ]
    assert stream.getvalue().splitlines()[4] == "      | no such image"


def test_a_log_has_a_plain_line_whenever_a_job_ends(tmp_path: Path) -> None:
    stream = io.StringIO()
    screen, outcomes = screen_of(tmp_path, ["ok", "failed", "waiting", "waiting"], stream, seconds=3600.0)
    for _ in range(50):
        screen.tick()
    screen.changed(outcomes[0])
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3  # its head, the job's, and this one:
    # Two jobs to come, one after the other, of an hour each as the finished one.
    assert re.fullmatch(r"      job 2 of 4, ETA 02:00 \(at .*\d\d:\d\d\): 1 done, 1 failed", lines[2])


def test_nothing_is_left_to_say_after_the_last_job(tmp_path: Path) -> None:
    stream = io.StringIO()
    screen, outcomes = screen_of(tmp_path, ["ok", "ok"], stream, seconds=60.0)
    screen.changed(outcomes[1])
    assert stream.getvalue().splitlines()[1:] == ["[2/2] job=2  finished in 1m 00s, AP -"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Noon(datetime):
    """The line has room for a time; towards midnight the day is named too, and its end is cut."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return datetime(2026, 1, 1, 12, 0)


def test_a_terminal_shows_how_far_the_running_job_and_the_sweep_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "datetime", Noon)
    stream = Terminal()
    screen, outcomes = screen_of(tmp_path, ["ok", "running", "waiting"], stream, seconds=1800.0)
    screen.changed(outcomes[1])
    (tmp_path / "2").mkdir()
    # As metrics.csv is written: a row of a training step, a row of an evaluation, empty cells; epochs count from 0.
    (tmp_path / "2" / "metrics.csv").write_text("epoch,step,loss,AP\n3,40,1.2345,\n3,41,,0.2104\n")
    screen.tick()
    # Of the running job and the one to come, half an hour each: 60 minutes less what has just been spent.
    live = stream.getvalue().rpartition("\r\x1b[2K")[2]
    shown = r"job 2 of 3, ETA 01:00 \(at .*\)   job=2: epoch 4, loss 1\.234, AP 21\.0, 0s"
    assert re.fullmatch(shown, live), live
    (tmp_path / "2" / "metrics.csv").write_text("epoch,step,loss,AP\n3,40,1.2345,\n4,4")  # a row half written
    screen.changed(Outcome(outcomes[1].job, "failed", 1, 1.0, "exit code 1"))
    assert "\r\x1b[2K[2/3] job=2  FAILED after 1s: exit code 1\n" in stream.getvalue()


def test_a_warning_is_said_once(tmp_path: Path) -> None:
    stream = io.StringIO()
    screen, _ = screen_of(tmp_path, ["waiting"], stream)
    screen.trouble("no room.")
    screen.trouble("no room.")
    assert stream.getvalue().splitlines()[1:] == ["warning: no room."]


def test_a_stream_that_is_gone_costs_no_job(tmp_path: Path) -> None:
    stream = open("/dev/full", "w", buffering=1)  # noqa: SIM115  every write: no space left on device
    screen, (outcome,) = screen_of(tmp_path, ["running"], stream)
    screen.changed(outcome)
    with pytest.raises(OSError, match="No space left"):  # so it is full indeed
        stream.close()
