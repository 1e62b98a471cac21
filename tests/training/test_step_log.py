"""What is logged of the steps, and that it is logged late but in time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from msil.training.experiment import run
from msil.training.later import Later
from msil.training.module import DetectionModule

from .cases import rows, tiny_config


class Watch(Callback):
    """The losses and the lr of each step, read at once."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        losses = {name: float(value) for name, value in pl_module.shared_losses.items()}
        self.seen.append({"loss": sum(losses.values()), **losses, "lr": optimizer.param_groups[0]["lr"]})


def watched(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch = Watch()
    monkeypatch.setattr(DetectionModule, "configure_callbacks", lambda self: [watch])
    return watch


class Slow(Later):
    """Numbers that do not come before somebody waits for them."""

    here = property(lambda self: False)  # pyright: ignore[reportAssignmentType]


@pytest.mark.parametrize("slow", [False, True], ids=["at once", "late"])
def test_each_row_is_its_own_step(tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch, slow: bool) -> None:
    """Four steps, an evaluation after every two, whose rows must not come before those of the steps."""
    watch = watched(monkeypatch)
    if slow:
        monkeypatch.setattr("msil.training.step_log.Later", Slow)
    config = tiny_config(tmp_path, shapes)
    run(config)
    written = rows(tmp_path / config.run_name)
    assert [(row["step"], "AP" in row) for row in written] == [
        ("0", False), ("1", False), ("1", True), ("2", False), ("3", False), ("3", True),
    ]  # fmt: skip
    assert [row["epoch"] for row in written] == ["0"] * 3 + ["1"] * 3
    steps = [row for row in written if "AP" not in row]
    assert all(float(row["images_per_second"]) > 0 for row in steps)
    for row, seen in zip(steps, watch.seen, strict=True):
        assert {name: float(row[name]) for name in seen} == pytest.approx(seen, rel=1e-6)
    assert len({row["lr"] for row in steps}) == 4  # the cosine moves at every step


def test_numbers_that_have_come_are_read() -> None:
    values = torch.tensor([1.5, float("inf"), -2.0])
    later = Later(values)
    values.zero_()  # what the device does next does not change them
    assert later.here and later.read() == [1.5, float("inf"), -2.0]
