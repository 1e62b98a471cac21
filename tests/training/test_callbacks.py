"""Throughput with a clock that the tests wind, progress with and without a terminal, randomness of steps."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from msil.detection import Detections, Target
from msil.training import callbacks
from msil.training.callbacks import PredictionPictures, SeedSteps, Throughput
from msil.training.experiment import run

from .cases import folder, module_of, rows, tiny_config


def test_throughput_counts_training_alone_of_all_processes_over_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    now = lambda: clock.now  # noqa: E731
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(perf_counter=now, monotonic=now))
    module = module_of(tiny_config("runs", "data"))
    module.is_logged = lambda step: False
    trainer: Any = SimpleNamespace(world_size=2, global_step=1)

    def trained(throughput: Throughput, seconds: float, images: int) -> None:
        clock.now += seconds
        throughput.on_train_batch_end(trainer, module, None, ([torch.zeros(3, 8, 8)] * images, []), 0)

    first = Throughput()
    assert first.images_per_second == 0
    first.on_train_epoch_start()
    trained(first, 2, 4)
    trained(first, 1, 4)
    clock.now += 50  # an evaluation
    first.on_validation_end()
    trained(first, 1, 2)
    assert (first.seconds, first.images, first.images_per_second) == (4, 20, 5)
    second = Throughput()
    second.load_state_dict(first.state_dict())
    clock.now += 1000  # until the run is taken up again
    second.on_train_start()
    trained(second, 1, 2)
    assert (second.seconds, second.images) == (5, 24)
    assert second.total_seconds == 54 + 1000 + 1  # 54 s before the resume, 1001 since the second process began


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_shows_what_was_logged(
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    terminal: bool,
) -> None:
    """Lines without a terminal; on one of 80 columns a bar with all numbers. And not a word of the libraries'."""
    monkeypatch.setattr(callbacks, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setenv("COLUMNS", "80")
    config = tiny_config(tmp_path, shapes, "trainer.progress_bar=true")
    screen = Terminal()
    with monkeypatch.context() as patch:
        if terminal:
            patch.setattr("sys.stdout", screen)
        run(config)
    out, err = capsys.readouterr()
    assert err == ""
    logged = [row for row in rows(folder(config)) if "loss" in row]
    lines = re.split("[\r\n]+", screen.getvalue()) if terminal else out.splitlines()
    assert max(map(len, lines[4:])) <= 80 or not terminal  # the first four name the run
    scores = [
        line for line in lines if re.fullmatch(r"epoch [12]: AP \d+\.\d  AP50 \d+\.\d  AP75 \d+\.\d", line.strip())
    ]
    assert len(scores) == 2
    for row in logged[:-1]:
        loss, lr = float(row["loss"]), float(row["lr"])
        text = f"loss{'= '[not terminal]}{loss:.3f}, lr{'= '[not terminal]}{lr:.1e}, images/s"
        assert any(text in line for line in lines), (text, lines)


def drawn(seed: int, step: int, rank: int, batch: int = 0) -> Tensor:
    torch.rand(7)  # what was drawn before does not count
    place: Any = SimpleNamespace(global_step=step, global_rank=rank, accumulate_grad_batches=2)
    SeedSteps(seed).on_train_batch_start(place, place, ([], []), batch)
    return torch.rand(3)


def test_what_is_random_in_a_step_depends_on_seed_step_rank_and_part_alone() -> None:
    first = drawn(0, 5, 1)
    assert torch.equal(drawn(0, 5, 1, batch=2), first)
    for other in ((1, 5, 1), (0, 6, 1), (0, 5, 0), (0, 5, 1, 1)):
        assert not torch.equal(drawn(*other), first)


def test_the_first_images_are_drawn_in_whatever_order_they_are_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first of two processes, which has every other one."""
    drawn: list[int] = []
    monkeypatch.setattr(callbacks, "draw_predictions", lambda _, targets, *a, **o: drawn.extend(map(id_of, targets)))
    trainer: Any = SimpleNamespace(world_size=2, is_global_zero=True, loggers=[])
    module = module_of(tiny_config("runs", "data"))
    module.final_evaluation = True
    pictures = PredictionPictures(Path(), (), range(100, 140))
    pictures.on_validation_start(trainer)
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    for image_id in range(138, 99, -2):
        found = Detections(nothing[0], nothing[0][:, 0], nothing[1])
        batch = [torch.zeros(3, 8, 8)], [Target(*nothing, image_id)]
        pictures.on_validation_batch_end(trainer, module, {"detections": [found]}, batch)
    pictures.on_validation_end(trainer, module)
    assert drawn == [100, 102, 104, 106, 108, 110, 112, 114]


def id_of(target: Target) -> int:
    return target.image_id
