"""Out of memory: what was being computed, and which settings make it smaller."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from msil.config import DataConfig
from msil.errors import UserError
from msil.training.module import Batch

# What PyTorch's CPU allocator, and a few kernels, say in a plain RuntimeError.
_PHRASES = ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory")


class OutOfMemory(UserError):
    """The machine or the GPU has too little memory for the settings."""


class Sizes(Callback):
    """Remembers the images that are being worked on, to name them where the memory does not suffice."""

    def __init__(self) -> None:
        self.doing = "before the first batch"
        self.evaluating = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self.evaluating = False
        self.doing = f"in training step {trainer.global_step + 1} on {described(batch[0])}"

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.evaluating = True
        self.doing = f"in evaluation step {batch_idx + 1} on {described(batch[0])}"

    @contextlib.contextmanager
    def explaining(self, data: DataConfig, device: Any) -> Iterator[None]:
        """Turns an error for want of memory inside the block into OutOfMemory. device: what is computed on."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            where = "memory" if torch.device(device).type == "cpu" else f"memory of {device}"
            if self.evaluating:
                advice = f"lower data.eval_batch_size (now {data.eval_batch_size})"
            else:
                advice = (
                    "raise trainer.accumulate, which takes a step in smaller parts, or lower data.batch_size"
                    f" (now {data.batch_size})"
                )
            raise OutOfMemory(
                f"out of {where} {self.doing}: {advice}, lower data.min_size and data.max_size (now {data.min_size} and"
                f" {data.max_size}) or set trainer.precision=bf16-mixed; the same command continues after the last"
                " checkpoint."
            ) from error


def described(images: list[Tensor]) -> str:
    """`2 images of up to 800x1333 pixels`; height x width."""
    height, width = (max(image.shape[axis] for image in images) for axis in (-2, -1))
    count = "1 image" if len(images) == 1 else f"{len(images)} images"
    return f"{count} of up to {height}x{width} pixels"


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in _PHRASES)
