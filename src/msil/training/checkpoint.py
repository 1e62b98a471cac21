"""Checkpoints that are whole or not there at all, and that load without running anybody's code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from msil.files import replacing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to disk, then renames: a full disk or a kill leaves the old file whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        try:
            with replacing(path) as temporary, temporary.open("xb") as file:
                torch.save(checkpoint, file)
        except BaseException as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # torch.save hides it behind an error of its own
                raise error.__context__ from None
            raise

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)


def checkpoint_callbacks(folder: Path) -> list[ModelCheckpoint]:
    """last.ckpt after every epoch (what a run resumes from) and best.ckpt by AP."""
    last = ModelCheckpoint(
        dirpath=folder, filename="last", every_n_epochs=1, save_on_train_epoch_end=True, enable_version_counter=False
    )
    best = ModelCheckpoint(
        dirpath=folder,
        filename="best",
        monitor="AP",
        mode="max",
        save_on_train_epoch_end=False,
        enable_version_counter=False,
    )
    return [last, best]
