"""How long what is left of a sweep will take."""

from __future__ import annotations

import copy
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from msil.runs import REQUIRED_KEYS
from msil.sweep.estimate import clock, estimate, seconds_left, time_left

SETTINGS: dict[str, Any] = {
    "mode": "train",
    "seed": 0,
    "model": {"head": {"name": "fcos"}, "backbone": {"name": "resnet10"}, "channels": 64},
    "data": {"name": "shapes", "root": "data/shapes", "num_train": 385},
    "schedule": {"name": "quick", "epochs": 12, "max_steps": None},
}


def changed(section: str, key: str, value: Any) -> dict[str, Any]:
    settings = copy.deepcopy(SETTINGS)
    settings[section][key] = value
    return settings


def result(settings: dict[str, Any], seconds: float | None) -> dict[str, Any]:
    return dict.fromkeys(REQUIRED_KEYS, 1) | {
        "status": "finished", "metrics": {}, "config": settings, "total_seconds": seconds,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("waiting", "running", "n_jobs", "seconds"),
    [
        ([10.0, 10.0, 10.0], [], 1, 30.0),
        ([10.0, 10.0, 10.0], [], 2, 20.0),  # two at once, then the third
        ([10.0, 10.0], [4.0], 2, 14.0),  # one starts now, one after the running job's 4 s
        ([], [3.0, 5.0], 2, 5.0),
        ([10.0], [-7.0], 1, 10.0),  # it takes longer than expected: it may end at any moment
        ([], [], 3, 0.0),
    ],
)
def test_jobs_take_the_next_free_place(waiting: list[float], running: list[float], n_jobs: int, seconds: float) -> None:
    assert time_left(waiting, running, n_jobs) == seconds


def test_the_sweeps_own_jobs_tell_before_what_was_expected() -> None:
    # The mean of 20 and 40 is 30: 30 for the one to come after the 30 - 12 that the running one has left.
    assert seconds_left([20.0, 40.0], [999.0], [(999.0, 12.0)], 1) == 48.0
    assert seconds_left([], [10.0], [(10.0, 4.0)], 1) == 16.0
    assert seconds_left([], [None], [], 1) is None  # nothing tells
    assert seconds_left([20.0], [], [], 1) is None  # nothing is left


def test_finished_jobs_of_the_sweep_are_the_measure(tmp_path: Path) -> None:
    guess = estimate([SETTINGS] * 3, [result(SETTINGS, 100.0), result(SETTINGS, 300.0)], tmp_path)
    assert guess.seconds == (200.0, 200.0, 200.0)
    assert guess.source == "2 finished jobs of this sweep"


def test_else_runs_of_the_same_data_head_backbone_and_schedule(tmp_path: Path) -> None:
    runs = {
        "same": (changed("model", "msil", {"apply": "cls"}), 60.0),  # what does not decide may differ
        "also": (SETTINGS, 100.0),
        "vfnet": (changed("model", "head", {"name": "vfnet"}), 7000.0),
        "deeper": (changed("model", "backbone", {"name": "resnet101"}), 7000.0),
        "longer": (changed("schedule", "epochs", 24), 7000.0),
        "smoke": (changed("schedule", "max_steps", 2), 7000.0),
        "more": (changed("data", "num_train", 118287), 7000.0),
        "untimed": (SETTINGS, None),
    }
    for name, (settings, seconds) in runs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(result(settings, seconds)))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "result.json").write_text('{"status": "fini')
    guess = estimate([SETTINGS], [], tmp_path)
    assert guess.seconds == (80.0,)
    assert guess.source == "2 finished runs of the same data, head, backbone and schedule"
    unlike = changed("schedule", "epochs", 36)
    assert estimate([SETTINGS, unlike], [], tmp_path).seconds == (80.0, 80.0)  # the mean of those that are known
    assert estimate([unlike], [], tmp_path).seconds == ()
    assert estimate([SETTINGS], [], tmp_path / "nowhere").seconds == ()


def test_clock() -> None:
    now = datetime(2026, 3, 4, 15, 0)
    assert clock(0, now) == "00:00 (at 15:00)"
    assert clock(1, now) == "00:01 (at 15:00)"
    assert clock(6000, now) == "01:40 (at 16:40)"
    assert clock(30 * 3600, now) == "30:00 (at Thu 05 Mar 21:00)"
