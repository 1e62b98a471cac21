"""How far a training run is, on the terminal."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from tqdm import tqdm

from msil.training.module import Batch, DetectionModule
from msil.training.step_log import StepLog


class Progress(Callback):
    """One bar over all steps with losses, lr, images/s and time left; plain lines where there is no terminal."""

    def __init__(self, step_log: StepLog, seconds_between_lines: float = 15.0) -> None:
        """step_log: where the numbers come from."""
        self.step_log = step_log
        self.seconds_between_lines = seconds_between_lines
        self._bar: tqdm | None = None
        self._last_line = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and sys.stderr.isatty():
            total = _total_steps(pl_module)
            self._bar = tqdm(
                total=total,
                initial=trainer.global_step,
                dynamic_ncols=True,
                unit="step",
                bar_format="{desc} |{bar:16}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero:
            return
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_description_str(f"epoch {trainer.current_epoch + 1}/{_epochs(pl_module)}", refresh=False)
            if trainer.global_step % trainer.log_every_n_steps == 0:  # pyright: ignore[reportAttributeAccessIssue]
                self._bar.set_postfix_str(self._numbers(), refresh=False)
            self._bar.update(trainer.global_step - self._bar.n)
        elif now - self._last_line >= self.seconds_between_lines:
            self._last_line = now
            total = _total_steps(pl_module)
            left = (total - trainer.global_step) * len(batch[0]) * trainer.world_size
            remaining = tqdm.format_interval(left / max(self.step_log.throughput.images_per_second, 1e-9))
            print(
                f"epoch {trainer.current_epoch + 1}/{_epochs(pl_module)}, step {trainer.global_step}/{total}:"
                f" {self._numbers()}, {remaining} left",
                flush=True,
            )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero or trainer.state.fn != TrainerFn.FITTING:
            return
        names = ("AP", "AP50", "AP75", "VOC_AP")
        metrics = trainer.callback_metrics
        scores = "  ".join(f"{name} {100 * float(metrics[name]):.1f}" for name in names if name in metrics)
        tqdm.write(f"epoch {trainer.current_epoch + 1}: {scores}", file=sys.stdout)
        sys.stdout.flush()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _numbers(self) -> str:
        """Of the last step that was logged; images a second of all so far."""
        latest = self.step_log.latest
        parts = [f"{name.removeprefix('loss_')} {latest[name]:.3f}" for name in latest if name.startswith("loss")]
        if latest:
            parts.append(f"lr {latest['lr']:.1e}")
        return ", ".join([*parts, f"{self.step_log.throughput.images_per_second:.1f} images/s"])


class EvaluationProgress(Callback):
    """One bar over the images of an evaluation without training; nothing where there is no terminal."""

    def __init__(self, images: int) -> None:
        self.images = images
        self._bar: tqdm | None = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and sys.stderr.isatty():
            self._bar = tqdm(total=self.images, dynamic_ncols=True, unit="image", desc="evaluating")

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        if self._bar is not None:
            self._bar.update(min(len(batch[0]) * trainer.world_size, self.images - self._bar.n))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _epochs(module: L.LightningModule) -> int:
    assert isinstance(module, DetectionModule)
    return module.schedule.epochs


def _total_steps(module: L.LightningModule) -> int:
    assert isinstance(module, DetectionModule)
    return module.total_steps
