"""Steps of both sides, each a Way: ours as short fits of a run's own module, callbacks and trainer."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torchvision.models.detection import FCOS

from benchmarks.gpu_setup import Clock, Scene, Setup, Way
from msil.compose import register, to_config
from msil.config import Config
from msil.data.module import EvaluationDataModule
from msil.detection import Detections, Detector
from msil.training.build import make_trainer
from msil.training.callbacks import SeedSteps, Throughput
from msil.training.faults import FiniteSteps
from msil.training.loggers import MetricsFile
from msil.training.module import Batch, DetectionModule

CONF = Path(__file__).resolve().parents[1] / "conf"
LEARNING_RATE = 1e-3  # for 16 images a step, before the warm-up: the nets hold random weights


class Repeated:
    """The same batch, `times` times over."""

    def __init__(self, batch: Batch, times: int) -> None:
        self.batch = batch
        self.times = times

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[Batch]:
        return itertools.repeat(self.batch, self.times)


class RepeatedData(L.LightningDataModule):
    """Brings its batch to the device as a run's data module does."""

    transfer_batch_to_device = EvaluationDataModule.transfer_batch_to_device  # pyright: ignore

    def __init__(self, batch: Batch, times: int) -> None:
        super().__init__()
        self.batches = Repeated(batch, times)

    def train_dataloader(self) -> Repeated:
        return self.batches


class Stopwatch(Callback):
    """Times `steps` steps behind `uncounted` ones, and keeps the losses of the first and the last. Give it last."""

    def __init__(self, clock: Clock, uncounted: int, steps: int) -> None:
        self.clock = clock
        self.uncounted = uncounted
        self.steps = steps
        self.seconds = 0.0
        self.losses: list[dict[str, Tensor]] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if batch_idx == self.uncounted:
            self.seconds = -self.clock.now()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, DetectionModule)
        if batch_idx == self.uncounted + self.steps - 1:
            self.seconds = (self.seconds + self.clock.now()) / self.steps
            self.losses.append(pl_module.losses)
        elif batch_idx == 0:
            self.losses.append(pl_module.losses)


class OurTraining:
    """Each call is a fit of a few steps with a run's module, callbacks, metrics.csv and trainer.

    overrides: settings, such as trainer.compile=default. The weights go on from call to call.
    losses: of the first call's first and last step.
    """

    def __init__(self, detector: Detector, scene: Scene, setup: Setup, *overrides: str) -> None:
        self.setup = setup
        self.scene = scene
        self.clock = Clock(torch.device(setup.device))
        self.config = settings(setup, len(scene.images), *overrides)
        self.steps = setup.steps_of(len(scene.images))
        detector.lay_out(channels_last=self.config.trainer.channels_last)
        detector.compile_parts(self.config.trainer.compile)
        self.module = DetectionModule(
            detector,
            [],
            self.config.schedule,
            steps_per_epoch=1000,
            batch_size=len(scene.images),
            describe={},
        )
        self.losses: list[dict[str, float]] = []

    def __call__(self) -> float:
        watch = Stopwatch(self.clock, self.setup.uncounted, self.steps)
        self.fit(watch)
        if not self.losses:
            self.losses = [{name: float(value) for name, value in step.items()} for step in watch.losses]
        return watch.seconds

    def fit(self, watch: Callback) -> None:
        self.clock.settle()
        batches = RepeatedData((self.scene.images, self.scene.targets), self.setup.uncounted + self.steps)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            trainer = make_trainer(
                self.config,
                folder,
                logger=[MetricsFile(folder, None)],
                callbacks=[SeedSteps(0), Throughput(), FiniteSteps(), watch],
                enable_progress_bar=False,
                enable_checkpointing=False,
                log_every_n_steps=50,
            )
            trainer.fit(self.module, datamodule=batches)


Step = Callable[[], Any]


def turns_of(step: Step, setup: Setup, batch: int) -> Way:
    """Turns of a plain function that takes `batch` images."""
    clock = Clock(torch.device(setup.device))
    return partial(clock.seconds_of, step, uncounted=setup.uncounted, steps=setup.steps_of(batch))


def their_training(net: FCOS, scene: Scene, setup: Setup, *, mixed: bool) -> Step:
    """A step of torchvision's reference training, without its reading the loss for the log.

    mixed: under bf16 autocast and in channels_last, else as it comes.
    """
    net = laid_out(net, setup, mixed=mixed).train()
    weights = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=1e-6, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        with autocast(setup, mixed):
            losses: Any = net(scene.floats, scene.dicts)
            total: Any = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()

    return step


def their_inference(net: FCOS, scene: Scene, setup: Setup, *, mixed: bool) -> Step:
    net = laid_out(net, setup, mixed=mixed).eval()

    def step() -> Any:
        with torch.inference_mode(), autocast(setup, mixed):
            return net(scene.floats)

    return step


def our_inference(detector: Detector, scene: Scene, setup: Setup, *overrides: str) -> Step:
    """Detector.predict as an evaluation calls it: mode=test, trainer.precision=bf16-mixed and `overrides`."""
    detector = detector.to(setup.device).eval()
    trainer = settings(setup, len(scene.images), *overrides).trainer
    detector.lay_out(channels_last=trainer.channels_last)
    detector.compile_parts(trainer.compile, frozen=True)

    def step() -> list[Detections]:
        with torch.inference_mode(), autocast(setup, True):
            return detector.predict(scene.images)

    return step


def autocast(setup: Setup, mixed: bool) -> torch.autocast:
    return torch.autocast(torch.device(setup.device).type, torch.bfloat16, enabled=mixed)


def laid_out(net: FCOS, setup: Setup, *, mixed: bool) -> FCOS:
    net.to(setup.device)
    return net.to(memory_format=torch.channels_last) if mixed else net  # pyright: ignore[reportCallIssue]


def settings(setup: Setup, batch: int, *overrides: str) -> Config:
    """The paper's schedule with ResNet-50 at this batch size and precision."""
    register()
    given = [
        "schedule=1x", "schedule.epochs=1", f"schedule.lr={LEARNING_RATE}", f"data.batch_size={batch}",
        f"trainer.accelerator={'gpu' if setup.on_gpu else 'cpu'}", f"trainer.precision={setup.precision}",
    ]  # fmt: skip
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="run"):
        return to_config(compose("config", [*given, *overrides]))
