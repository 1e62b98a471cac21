"""What watches a training run: throughput, pictures of detections; and what makes its steps random."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor

from msil.detection import Detections, Target
from msil.reporting.pictures import draw_predictions
from msil.training.loggers import has_dashboard, log_pictures
from msil.training.module import Batch, DetectionModule


class Throughput(Callback):
    """Images a second over all devices and seconds spent in training steps, evaluation left out.

    Both live through a resume: they are part of the checkpoint.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.images = 0
        self._since = 0.0
        self._began = time.monotonic()
        self._earlier = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = time.perf_counter()  # a run that resumes inside an epoch does not start it

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self.seconds += now - self._since
        self.images += len(batch[0]) * trainer.world_size
        self._since = now

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = time.perf_counter()

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "images": self.images, "total_seconds": self.total_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds, self.images = state_dict["seconds"], state_dict["images"]
        self._earlier = state_dict["total_seconds"]

    @property
    def total_seconds(self) -> float:
        """Wall clock of the whole run, what came before a resume included."""
        return self._earlier + time.monotonic() - self._began


class PredictionPictures(Callback):
    """Draws detections on the first evaluated images: at the end, and for a dashboard at every evaluation."""

    def __init__(self, path: Path, classes: tuple[str, ...], count: int = 8) -> None:
        self.path = path
        self.classes = classes
        self.count = count
        self._images: list[Tensor] = []
        self._targets: list[Target] = []

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        if trainer.is_global_zero and len(self._images) < self.count:
            room = self.count - len(self._images)
            self._images += [image.cpu() for image in batch[0][:room]]
            self._targets += [target.to("cpu") for target in batch[1][:room]]

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, DetectionModule)
        shown = has_dashboard(trainer.loggers)
        if not pl_module.final_evaluation and not shown:
            return
        detections = self._predict(pl_module)
        draw_predictions(self._images, self._targets, detections, self.classes, self.path, max_images=self.count)
        if shown:
            picture = np.asarray(Image.open(self.path).convert("RGB"))
            # Under the last step's number, as Lightning logs an evaluation.
            log_pictures(trainer.loggers, {"predictions": picture}, max(trainer.global_step - 1, 0))

    def _predict(self, module: DetectionModule) -> list[Detections]:
        with torch.no_grad():
            found = module.detector.predict([image.to(module.device) for image in self._images])
        return [detections.to("cpu") for detections in found]


class SeedSteps(Callback):
    """Whatever is random in a step (the data is not: see data/sampler.py) is a function of seed, step and process, so
    that a resumed run goes on as if it had not been interrupted."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        words = (self.seed, trainer.global_step, trainer.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))
