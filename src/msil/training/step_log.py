"""Losses and speed of training steps for metrics.csv and the dashboards, at no cost to the steps."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from msil.training.callbacks import Throughput
from msil.training.later import Later
from msil.training.module import Batch, DetectionModule


@dataclass(frozen=True)
class _Row:
    step: int
    names: list[str]
    losses: Later
    known: dict[str, float]  # what the host knows already


class StepLog(Callback):
    """Logs every trainer.log_every_n_steps-th step: losses, lr, epoch, images a second.

    Lightning's own logging would read the losses at once, and wait for them: here they are written a few steps later,
    when they have come; all of them before an evaluation, a checkpoint and the end. Give it behind `throughput`.
    """

    def __init__(self, throughput: Throughput) -> None:
        self.throughput = throughput
        self.latest: dict[str, float] = {}  # the newest that were written
        self._rows: deque[_Row] = deque()
        self._lr = 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]  # at the end of the step it is the next one's

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, DetectionModule)
        if trainer.global_step % trainer.log_every_n_steps == 0:  # pyright: ignore[reportAttributeAccessIssue]
            losses = torch.stack(list(pl_module.shared_losses.values()))
            known = {
                "lr": self._lr,
                "images_per_second": self.throughput.images_per_second,
                "epoch": trainer.current_epoch,
            }
            names = ["loss", *pl_module.shared_losses]
            values = Later(torch.cat([losses.sum()[None], losses]))
            self._rows.append(_Row(trainer.global_step - 1, names, values, known))
        self._write(trainer, all_of_them=False)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._write(trainer)  # a run that continues here does not train, so not log, those steps again

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._write(trainer, all_of_them=False)  # a device that failed may never answer

    def _write(self, trainer: L.Trainer, *, all_of_them: bool = True) -> None:
        while self._rows and (all_of_them or self._rows[0].losses.here):
            row = self._rows.popleft()
            self.latest = {**dict(zip(row.names, row.losses.read(), strict=True)), **row.known}
            for logger in trainer.loggers:
                logger.log_metrics(self.latest, step=row.step)
                logger.save()
