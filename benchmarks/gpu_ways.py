"""What gpu_training.py times: our training through Lightning's Trainer, torchvision's in its plain loop."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.models.detection import FCOS

from benchmarks.host_syncs import settings
from benchmarks.nets import torchvision_fcos
from benchmarks.scenes import ground_truth
from benchmarks.wall_clock import WallClock
from msil.config import NaNPolicy
from msil.detection import Detector, Target
from msil.training.callbacks import Throughput
from msil.training.divergence import FiniteSteps
from msil.training.module import DetectionModule
from msil.training.step_log import StepLog

# Steps before the clock starts: compilers, a graph's capture and convolutions that try algorithms come first.
WARM_UP = 5
LR = 1e-4


@dataclass(frozen=True)
class Setup:
    """What is trained on what. size: (height, width) of every image. steps: of one turn on the clock."""

    device: str = "cuda"
    size: tuple[int, int] = (800, 1344)
    boxes: int = 7
    rounds: int = 7
    steps: int = 10

    def images(self, count: int) -> list[Tensor]:
        """uint8 (3, H, W), on the device."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (count, 3, *self.size), dtype=torch.uint8, generator=generator)
        return list(images.to(self.device))

    def targets(self, count: int) -> list[Target]:
        """On the host, as a run's are."""
        return ground_truth(images=count, boxes=self.boxes, size=self.size)


@dataclass
class Way:
    """One way to train. turn(): seconds of one step, of Setup.steps after WARM_UP; losses(): of the last step."""

    turn: Callable[[], float]
    losses: Callable[[], dict[str, float]]


class _Timer(Callback):
    def __init__(self, clock: WallClock, steps: int) -> None:
        self.clock, self.steps = clock, steps
        self.seconds = 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == WARM_UP:
            self.clock.start()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == WARM_UP + self.steps:
            self.seconds = self.clock.stop() / self.steps


class _Batches(L.LightningDataModule):
    """The same batch again and again; it is on the device, and its targets stay on the host, as in a run."""

    def __init__(self, images: list[Tensor], targets: list[Target], steps: int) -> None:
        super().__init__()
        self.batches = [(images, targets)] * steps

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.batches, batch_size=None, collate_fn=lambda batch: batch)  # pyright: ignore

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch


def our_training(
    setup: Setup, detector: Detector, images: int, *, precision: str, compiled: bool = False, cuda_graph: bool = False
) -> Way:
    """Every callback of a run that works in a step is there; nothing else is: no evaluation, no checkpoint."""
    folder = Path(tempfile.mkdtemp())
    schedule = replace(settings(folder, "schedule=1x").schedule, lr=LR, base_batch_size=None, warmup_steps=0)
    if compiled:
        detector.compile_parts()
    module = DetectionModule(
        detector.to(setup.device), [], schedule, steps_per_epoch=10**6, batch_size=images, describe={},
        cuda_graph=cuda_graph,
    )  # fmt: skip
    batches = _Batches(setup.images(images), setup.targets(images), WARM_UP + setup.steps)

    def turn() -> float:
        timer, throughput = _Timer(WallClock(setup.device), setup.steps), Throughput()
        callbacks = [throughput, FiniteSteps(folder, NaNPolicy.stop), StepLog(throughput), timer]
        trainer = L.Trainer(
            accelerator="gpu" if setup.device == "cuda" else "cpu", devices=1, precision=precision,  # pyright: ignore
            callbacks=callbacks, max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(module, datamodule=batches)
        return timer.seconds

    return Way(turn, lambda: {name: float(value) for name, value in module.shared_losses.items()})


def their_training(setup: Setup, net: FCOS, images: int, *, better: bool) -> Way:
    """torchvision's reference loop, float images and targets on the device. better: bf16 and channels last."""
    net = net.to(setup.device).train()
    if better:
        net = net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    floats = [image / 255 for image in setup.images(images)]
    dicts = [
        {"boxes": target.boxes.to(setup.device), "labels": target.labels.to(setup.device)}
        for target in setup.targets(images)
    ]
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=LR, momentum=0.9)
    last: dict[str, Tensor] = {}

    def step() -> None:
        with torch.autocast(setup.device, torch.bfloat16, enabled=better):
            losses: Any = net(floats, dicts)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        last.update(losses)

    def turn() -> float:
        for _ in range(WARM_UP):
            step()
        clock = WallClock(setup.device)
        clock.start()
        for _ in range(setup.steps):
            step()
        return clock.stop() / setup.steps

    return Way(turn, lambda: {name: float(value) for name, value in last.items()})


def shipped(setup: Setup) -> FCOS:
    return torchvision_fcos(setup.size)
