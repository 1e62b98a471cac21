"""What watches a run, with a clock that the tests wind."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from msil.config import Config
from msil.training import callbacks
from msil.training.callbacks import SeedSteps, Throughput
from msil.training.experiment import run
from msil.training.progress import Progress

from .cases import rows, tiny_config


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        clock = SimpleNamespace(perf_counter=lambda: self.now, monotonic=lambda: self.now)
        monkeypatch.setattr(callbacks, "time", clock)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def batch(images: int) -> Any:
    return [torch.zeros(3, 8, 8)] * images, []


# Throughput


def trained(throughput: Throughput, clock: Clock, seconds: float, images: int, world_size: int = 1) -> None:
    clock.now += seconds
    state: Any = SimpleNamespace(world_size=world_size, global_step=1, log_every_n_steps=100)
    throughput.on_train_batch_end(state, None, None, batch(images), 0)  # pyright: ignore[reportArgumentType]


def test_throughput_counts_training_alone(clock: Clock) -> None:
    throughput, nothing = Throughput(), None
    assert throughput.images_per_second == 0
    throughput.on_train_epoch_start(nothing, nothing)  # pyright: ignore[reportArgumentType]
    trained(throughput, clock, 2, 8)
    trained(throughput, clock, 1, 8)
    clock.now += 50  # an evaluation
    throughput.on_validation_end(nothing, nothing)  # pyright: ignore[reportArgumentType]
    trained(throughput, clock, 1, 4)
    clock.now += 20  # checkpoints and what else lies between epochs
    throughput.on_train_epoch_start(nothing, nothing)  # pyright: ignore[reportArgumentType]
    trained(throughput, clock, 1, 4)
    assert throughput.seconds == 2 + 1 + 1 + 1
    assert throughput.images == 8 + 8 + 4 + 4
    assert throughput.images_per_second == pytest.approx(24 / 5)


def test_throughput_is_of_all_processes_and_survives_a_resume(clock: Clock) -> None:
    first = Throughput()
    first.on_train_epoch_start(None, None)  # pyright: ignore[reportArgumentType]
    trained(first, clock, 4, 8, world_size=2)
    second = Throughput()
    second.load_state_dict(first.state_dict())
    clock.now += 1000  # until the run is taken up again
    second.on_train_epoch_start(None, None)  # pyright: ignore[reportArgumentType]
    trained(second, clock, 4, 8, world_size=2)
    assert (second.seconds, second.images, second.images_per_second) == (8, 32, 4)
    # 4 s before the resume; 1000 + 4 s since the second process began
    assert second.total_seconds == 4 + 1000 + 4


# Progress


def without_a_terminal(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], seconds: float
) -> tuple[list[str], Config]:
    config = tiny_config(tmp_path, shapes, "trainer.progress_bar=true", "schedule.epochs=3", "schedule.eval_every=2")
    monkeypatch.setattr(Progress.__init__, "__defaults__", (seconds,))
    run(config)
    captured = capfd.readouterr()
    assert captured.err == ""
    return captured.out.splitlines(), config


LINE = re.compile(
    r"epoch (\d)/3, step (\d)/6: loss \d\.\d{3}, cls \d\.\d{3}, bbox \d\.\d{3}, centerness \d\.\d{3},"
    r" lr (\d\.\de[+-]\d\d), \d+\.\d images/s, \d\d:\d\d left"
)
SCORES = re.compile(r"epoch 2: AP \d+\.\d  AP50 \d+\.\d  AP75 \d+\.\d")


def test_progress_without_a_terminal_is_plain_lines(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A line a step if they may come so fast, the AP of each evaluation, and not a word of the libraries'."""
    lines, config = without_a_terminal(shapes, tmp_path, monkeypatch, capfd, seconds=0)
    scores = [line for line in lines if SCORES.fullmatch(line)]
    steps = [line for line in lines if line not in scores]
    assert len(scores) == 1, lines
    assert lines.index(scores[0]) == 4  # after the four steps of two epochs
    found = [LINE.fullmatch(line) for line in steps]
    assert [match and match.groups()[:2] for match in found] == [
        ("1", "1"), ("1", "2"), ("2", "3"), ("2", "4"), ("3", "5"), ("3", "6"),
    ]  # fmt: skip
    # And what it says is what was logged.
    run_dir = Path(config.runs_dir) / config.run_name
    logged = [row for row in rows(run_dir) if "loss" in row]
    for line, row in zip(steps, logged, strict=True):
        assert f"loss {float(row['loss']):.3f}," in line
        assert f"lr {float(row['lr']):.1e}," in line  # the lr of this step, not of the next


@pytest.mark.slow
def test_progress_lines_are_rare(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lines, _ = without_a_terminal(shapes, tmp_path, monkeypatch, capfd, seconds=3600)
    assert len([line for line in lines if LINE.fullmatch(line)]) == 1


# SeedSteps


def drawn(seed: int, step: int, rank: int) -> Tensor:
    torch.rand(7)  # what was drawn before does not count
    place: Any = SimpleNamespace(global_step=step, global_rank=rank)
    SeedSteps(seed).on_train_batch_start(place, place, ([], []), 0)
    return torch.rand(3)


def test_what_is_random_in_a_step_depends_on_seed_step_and_process_alone() -> None:
    first = drawn(0, 5, 1)
    assert torch.equal(drawn(0, 5, 1), first)
    for other in ((1, 5, 1), (0, 6, 1), (0, 5, 0)):
        assert not torch.equal(drawn(*other), first)
