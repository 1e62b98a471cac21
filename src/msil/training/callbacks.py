"""Callbacks of a training: randomness of steps, averaged weights, throughput, progress, pictures of detections."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar, WeightAveraging
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from torch import Tensor, nn

from msil.detection import Detections, Target
from msil.reporting.figures.pictures import draw_predictions
from msil.reporting.tables import percent
from msil.training.loggers import MetricsFile, has_dashboard, log_picture
from msil.training.module import Batch, DetectionModule

SCORES = ("AP", "AP50", "AP75", "VOC_AP")
PICTURES = 8  # images
SECONDS_BETWEEN_LINES = 15.0


class SeedSteps(Callback):
    """Makes whatever is random in a step (the data is not: see data/sampler.py) a function of seed, batch and rank, so
    that a resumed run goes on as if it had not been interrupted."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        part = batch_idx % trainer.accumulate_grad_batches
        words = (self.seed, trainer.global_step, trainer.global_rank, *([part] if part else []))
        torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))


class AveragedWeights(WeightAveraging):
    """An exponential moving average of the weights, which is evaluated, and saved as a checkpoint's state_dict.

    average = d * average + (1 - d) * weights after every step, d = min(decay, (1 + n) / (10 + n)) after n averaged
    steps, as TensorFlow's ExponentialMovingAverage with num_updates: with Lightning's EMAWeightAveraging, whose d is
    constant, the weights of the first step stay in the average for some 1 / (1 - decay) steps.
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._device = trainer.strategy.root_device  # the module itself is still on the CPU
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            # In the place of torch's, which reads the number of steps from the device twice.
            self._average_model.update_parameters = self.update

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Average the weights and buffers of `model` in, without a wait for the device."""
        assert self._average_model is not None
        steps, net = self._average_model.n_averaged, self._average_model.module
        # The first step's weights are the average.
        decay = ((1 + steps) / (10 + steps)).clamp(max=self.decay) * (steps > 0)
        averages = chain(net.parameters(), net.buffers())
        for average, weight in zip(averages, chain(model.parameters(), model.buffers()), strict=True):
            if average.is_floating_point():
                average.lerp_(weight, (1 - decay).to(average))
            else:
                average.copy_(weight)  # the counts of BatchNorm
        steps += 1


class Throughput(Callback):
    """Images a second over all devices and seconds spent in training steps, evaluation left out.

    Both survive a resume: they are part of the checkpoint.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.images = 0
        self._since = 0.0
        self._began = time.monotonic()
        self._earlier = 0.0

    def on_train_start(self, *_: Any) -> None:  # a run that resumes inside an epoch does not start it
        self._since = time.perf_counter()

    def on_train_epoch_start(self, *_: Any) -> None:
        self._since = time.perf_counter()

    def on_validation_end(self, *_: Any) -> None:
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self.seconds += now - self._since
        self.images += len(batch[0]) * trainer.world_size
        self._since = now
        assert isinstance(pl_module, DetectionModule)
        if pl_module.is_logged(trainer.global_step):
            pl_module.log("images_per_second", self.images_per_second)

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


class Progress(TQDMProgressBar):
    """On a terminal Lightning's bar, elsewhere a line every few seconds; and a line for every evaluation of a training.

    rows: its newest numbers are shown; nothing is read from the device for it. None: nothing is trained.
    """

    def __init__(self, rows: MetricsFile | None, *, bar: bool) -> None:
        super().__init__()
        self.rows = rows
        self._printed_at = time.monotonic()
        if not bar:
            self.disable()

    def init_train_tqdm(self) -> Tqdm:
        bar = super().init_train_tqdm()
        bar.bar_format = "{desc}{bar:8}{n_fmt}/{total_fmt} [{remaining}{postfix}]"  # 80 columns
        return bar

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, int | str | float | dict]:
        numbers = {} if self.rows is None else self.rows.newest
        forms = {"loss": "{:.3f}", "lr": "{:.1e}", "images_per_second": "{:.1f}"}
        found: dict[str, int | str | float | dict] = {
            name.replace("images_per_second", "images/s"): form.format(numbers[name])
            for name, form in forms.items()
            if name in numbers
        }
        return found | ({"AP": percent(numbers["AP"])} if "AP" in numbers else {})

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *arguments)
        now = time.monotonic()
        if trainer.is_global_zero and self.is_disabled and now - self._printed_at > SECONDS_BETWEEN_LINES:
            self._printed_at = now
            assert isinstance(pl_module, DetectionModule)
            numbers = "".join(f", {name} {text}" for name, text in self.get_metrics(trainer, pl_module).items())
            print(f"step {trainer.global_step}/{pl_module.total_steps}{numbers}", flush=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.is_global_zero and trainer.state.fn == TrainerFn.FITTING:
            found = trainer.callback_metrics
            scores = "  ".join(f"{name} {100 * float(found[name]):.1f}" for name in SCORES if name in found)
            Tqdm.write(f"epoch {trainer.current_epoch + 1}: {scores}", file=sys.stdout)
            sys.stdout.flush()


class PredictionPictures(Callback):
    """Draws detections on the first of the images to evaluate: at the end, and for a dashboard at every evaluation.

    image_ids: of those images, in the order of the data set.
    """

    def __init__(self, path: Path, classes: tuple[str, ...], image_ids: Sequence[int]) -> None:
        self.path = path
        self.classes = classes
        self.image_ids = image_ids
        self._shown: dict[int, tuple[Tensor, Target, Detections] | None] = {}

    def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._shown = dict.fromkeys(self.image_ids[:: trainer.world_size][:PICTURES])  # rank 0's

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        for image, target, found in zip(*batch, outputs["detections"], strict=True):
            if trainer.is_global_zero and target.image_id in self._shown:
                self._shown[target.image_id] = image.cpu(), target.to("cpu"), found.to("cpu")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, DetectionModule)
        shown = has_dashboard(trainer.loggers)
        if not trainer.is_global_zero or not (pl_module.final_evaluation or shown):
            return
        images, targets, detections = zip(*filter(None, self._shown.values()), strict=True)
        draw_predictions(images, targets, detections, self.classes, self.path, max_images=PICTURES)
        if shown:
            picture = np.asarray(Image.open(self.path).convert("RGB"))
            # Under the last step's number, as Lightning logs an evaluation.
            log_picture(trainer.loggers, "predictions", picture, max(trainer.global_step - 1, 0))
