"""Where a training step waits for the GPU, by torch.cuda.set_sync_debug_mode."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from benchmarks.gpu_setup import Setup
from benchmarks.gpu_ways import OurTraining, Step
from msil.training.module import Batch

WAIT = "called a synchronizing CUDA operation"  # torch's words


class SyncDebug(Callback):
    """torch.cuda.set_sync_debug_mode(mode) from a step's start to the fit's end, logged rows included."""

    def __init__(self, mode: str, uncounted: int) -> None:
        self.mode = mode
        self.uncounted = uncounted
        self.steps = 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if batch_idx == self.uncounted:
            torch.cuda.set_sync_debug_mode(self.mode)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.steps += torch.cuda.get_sync_debug_mode() != 0
        if trainer.is_last_batch:
            torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        torch.cuda.set_sync_debug_mode("default")  # what Lightning does at the end may wait


def waits_of_fit(way: OurTraining) -> list[str]:
    """Where the counted steps of a fit wait, as file:line; if nowhere, they are asserted to pass mode "error" too."""
    found = _watched(way, "warn")
    return found or _watched(way, "error")


def _watched(way: OurTraining, mode: str) -> list[str]:
    watch = SyncDebug(mode, way.setup.uncounted)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            way.fit(watch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert watch.steps == way.steps, f"{watch.steps} of {way.steps} steps were watched"
    return _places(caught)


def waits_of_step(step: Step, setup: Setup) -> list[str]:
    """The same of one step of theirs."""
    for _ in range(setup.uncounted):
        step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return _places(caught)


def _places(caught: list[warnings.WarningMessage]) -> list[str]:
    return [f"{Path(one.filename).name}:{one.lineno}" for one in caught if WAIT in str(one.message)]
