"""P4: how often the host waits for the device in a whole training step: forward, loss, backward, optimizer, logging.

    python -m benchmarks.host_syncs

Ours is a step of `python run.py` with the paper's SGD, all callbacks included, from the batch to what is logged of it
(here after every step). torchvision's is that of its reference training: losses, their sum read for the log and the
check for NaN, backward, SGD. MMDetection's (extra `benchmarks`) is its VFNet head's loss alone, forward and backward.

Waits are counted on the CPU, by the operators whose result's value or shape the host has to know. The step takes the
way that it takes on a GPU: with a fused optimizer, and with numbers that arrive a step later (msil.training.later); a
look at one in its own step counts as a wait. Of a real GPU the same is asked by benchmarks/gpu_training.py, under
set_sync_debug_mode("error"). Also asserted: on torch's meta device, whose tensors have no values, a step of the net and
its loss runs through.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torchvision.models.detection import fcos_resnet50_fpn

from benchmarks.compare import NotRun, Row, counted, run
from benchmarks.mmdetection import instances, vfnet_head
from benchmarks.operators import HostSyncs
from benchmarks.scenes import IMAGE, ground_truth
from benchmarks.vfnet_loss import IMAGES, outputs, theirs_of
from msil.compose import register, to_config
from msil.config import Config
from msil.detection import build_detector
from msil.detection.heads import HEADS
from msil.training import divergence, experiment, step_log
from msil.training.later import Later
from msil.training.module import DetectionModule

SGD = torch.optim.SGD
CONF = Path(__file__).resolve().parents[1] / "conf"
SMALL = (
    "data.num_train=16", "data.num_val=4", "data.batch_size=4", "schedule.epochs=2", "schedule.eval_every=2",
    "trainer.accelerator=cpu", "trainer.progress_bar=false", "schedule.optimizer=sgd", "schedule.lr=0.001",
)  # fmt: skip


class Counting(Callback):
    """Counts from the start of each step until its last callback is through."""

    def __init__(self) -> None:
        self.syncs: list[list[str]] = []
        self.step: HostSyncs | None = None  # of the step that is under way

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.step = HostSyncs()
        self.step.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert self.step is not None
        self.step.__exit__(None, None, None)
        self.syncs.append(self.step.found)
        self.step = None


def underway(counting: Counting) -> type[Later]:
    """Numbers that arrive when the step is over in which they were made."""

    class Underway(Later):
        def __init__(self, values: Tensor) -> None:
            super().__init__(values)
            self.made_in = counting.step

        @property
        def here(self) -> bool:
            return self.made_in is not counting.step

        def read(self) -> list[float]:
            if self.made_in is not None and not self.here:
                self.made_in.found.append("Later.read")
            return super().read()

    return Underway


def settings(folder: Path, *overrides: str) -> Config:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="run"):
        return to_config(
            compose("config", [*SMALL, f"runs_dir={folder / 'runs'}", f"data.root={folder / 'shapes'}", *overrides])
        )


def fused_sgd(*arguments: Any, **options: Any) -> torch.optim.SGD:
    return SGD(*arguments, **{**options, "fused": True})


def ours(*overrides: str) -> list[list[str]]:
    """The waits of each of eight steps."""
    counting = Counting()
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(DetectionModule, "configure_callbacks", lambda self: [counting]),
        mock.patch.object(divergence, "Later", underway(counting)),
        mock.patch.object(step_log, "Later", underway(counting)),
        mock.patch.object(torch.optim, "SGD", fused_sgd),
    ):
        experiment.run(settings(Path(folder), *overrides))
    return counting.syncs


def torchvision_step() -> list[str]:
    net = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=80, min_size=64, max_size=64)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)
    images = [torch.rand(3, 64, 64) for _ in range(2)]
    targets = [{"boxes": t.boxes, "labels": t.labels} for t in ground_truth(images=2, boxes=3, size=(64, 64))]
    net.transform.torch_choice = lambda k: k[0]  # drawn on the host, where nobody waits for a GPU
    with HostSyncs() as counter:
        losses = net(images, targets)
        total = sum(losses.values())
        assert total.item() < float("inf")  # pyright: ignore
        optimizer.zero_grad()
        total.backward()  # pyright: ignore
        optimizer.step()
    return counter.found


def mmdetection_loss() -> list[str] | None:
    """None without MMDetection."""
    try:
        head = vfnet_head(80)
    except NotRun:
        return None
    tensors, truth = outputs(), instances(ground_truth(IMAGES, 7), IMAGE)
    with HostSyncs() as counter:
        losses = theirs_of(head, tensors, truth)
        torch.stack(list(losses.values())).sum().backward()
    return counter.found


def on_meta(head: str) -> None:
    """A step without values; raises where one is asked for."""
    detector = build_detector(HEADS[head].Options(num_convs=1), "resnet10", 4, channels=64).to("meta")
    images = [torch.zeros(3, 64, 64, dtype=torch.uint8, device="meta") for _ in range(2)]
    losses = detector.loss(images, ground_truth(images=2, boxes=3, classes=4, size=(64, 64)))
    torch.stack(list(losses.values())).sum().backward()


def _listed(syncs: list[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in Counter(syncs).items()) or "without any"


def measure() -> Iterator[Row]:
    anchors = {"fcos": torchvision_step(), "vfnet": mmdetection_loss()}
    for head, theirs in anchors.items():
        if theirs is not None:
            print(f"the anchor's of {head}: {_listed(theirs)}")
        on_meta(head)
        steps = ours(f"model/head={head}")
        worst = max(steps, key=len)
        words = f"each of {len(steps)} steps of run.py {_listed(worst)}; a step ran on meta"
        anchor = "" if theirs is None else len(theirs)
        yield counted(f"P4 host syncs of a {head} training step", len(worst), anchor, 0, words)


if __name__ == "__main__":
    run(measure, __doc__)
