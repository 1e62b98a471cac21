"""P4: how often the host waits for the device in a whole training step: forward, loss, backward, optimizer, logging.

    python -m benchmarks.host_syncs

Ours is a step of `python run.py` with the paper's SGD, all callbacks included, from the batch to what is logged of it
(here after every step). torchvision's is that of its reference training: losses, their sum read for the log and the
check for NaN, backward, SGD. Waits are counted on the CPU, by the operators whose result's value or shape the host has
to know; of a real GPU the same is asked by benchmarks/gpu_training.py, under set_sync_debug_mode("error"). Also
asserted: on torch's meta device, whose tensors have no values, a step of the net and its loss runs through.
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
from torchvision.models.detection import fcos_resnet50_fpn

from benchmarks.compare import Row, counted, run
from benchmarks.operators import HostSyncs
from benchmarks.scenes import ground_truth
from msil.config import Config, register, to_config
from msil.detection import build_detector
from msil.training import experiment
from msil.training.module import DetectionModule

CONF = Path(__file__).resolve().parents[1] / "conf"
SMALL = (
    "data.num_train=16", "data.num_val=4", "data.batch_size=4", "schedule.epochs=2", "schedule.eval_every=2",
    "trainer.accelerator=cpu", "trainer.progress_bar=false", "schedule.optimizer=sgd", "schedule.lr=0.001",
)  # fmt: skip


class Counting(Callback):
    """Counts from the start of each step until its last callback is through."""

    def __init__(self) -> None:
        self.syncs: list[list[str]] = []
        self._counter: HostSyncs | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._counter = HostSyncs()
        self._counter.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert self._counter is not None
        self._counter.__exit__(None, None, None)
        self.syncs.append(self._counter.found)


def settings(folder: Path, *overrides: str) -> Config:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="run"):
        return to_config(
            compose("config", [*SMALL, f"runs_dir={folder / 'runs'}", f"data.root={folder / 'shapes'}", *overrides])
        )


def ours(*overrides: str) -> list[list[str]]:
    """The waits of each of eight steps."""
    counting = Counting()
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(DetectionModule, "configure_callbacks", lambda self: [counting]),
    ):
        experiment.run(settings(Path(folder), *overrides))
    return counting.syncs


def torchvision_step() -> list[str]:
    net = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=80, min_size=64, max_size=64)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)
    images = [torch.rand(3, 64, 64) for _ in range(2)]
    targets = [{"boxes": t.boxes, "labels": t.labels} for t in ground_truth(images=2, boxes=3, size=(64, 64))]
    with HostSyncs() as counter:
        losses = net(images, targets)
        total = sum(losses.values())
        assert total.item() < float("inf")  # pyright: ignore
        optimizer.zero_grad()
        total.backward()  # pyright: ignore
        optimizer.step()
    return counter.found


def on_meta(head: str) -> None:
    """A step without values; raises where one is asked for."""
    detector = build_detector(head, "resnet10", 4, channels=64, num_convs=1).to("meta")
    images = [torch.zeros(3, 64, 64, dtype=torch.uint8, device="meta") for _ in range(2)]
    losses = detector.loss(images, ground_truth(images=2, boxes=3, classes=4, size=(64, 64)))
    torch.stack(list(losses.values())).sum().backward()


def _listed(syncs: list[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in Counter(syncs).items()) or "without any"


def measure() -> Iterator[Row]:
    theirs = torchvision_step()
    print("torchvision's:", _listed(theirs))
    for head in ("fcos", "vfnet"):
        on_meta(head)
        steps = ours(f"model/head={head}")
        anchor = len(theirs) if head == "fcos" else ""
        worst = max(steps, key=len)
        words = f"each of {len(steps)} steps of run.py {_listed(worst)}; a step ran on meta"
        yield counted(f"P4 host syncs of a {head} training step", len(worst), anchor, 0, words)


if __name__ == "__main__":
    run(measure, __doc__)
