"""One optimizer step on given images, through the real LightningModule and Trainer, and what it computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from msil.config import Config
from msil.detection import Target
from msil.training.module import DetectionModule

from .cases import module_of

Batch = tuple[list[Tensor], list[Target]]


@dataclass
class Step:
    """logged: losses. gradients: before clipping. clipped: after it. weights: after the step."""

    logged: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    clipped: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


class Watch(Callback):
    def __init__(self) -> None:
        self.step = Step()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.step.gradients = gradients(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.step.clipped = gradients(pl_module)
        self.step.weights = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}
        assert isinstance(pl_module, DetectionModule)
        losses = {name: float(value) for name, value in pl_module.losses.items()}
        self.step.logged = {"loss": sum(losses.values()), **losses}


def gradients(module: L.LightningModule) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def one_step(config: Config, batch: Batch, folder: Path, callback: Callback | None = None, **settings: Any) -> Step:
    """`batch`: this process's images, in trainer.accumulate parts. settings: of the Trainer."""
    watch, parts = Watch(), config.trainer.accumulate
    size = len(batch[0]) // parts
    batches = [(batch[0][i : i + size], batch[1][i : i + size]) for i in range(0, len(batch[0]), size)]
    trainer = L.Trainer(
        **{"accelerator": "cpu", "devices": 1, **settings}, callbacks=[watch, *([callback] if callback else [])],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, log_every_n_steps=1, max_steps=1, default_root_dir=str(folder),
        gradient_clip_val=config.schedule.grad_clip, accumulate_grad_batches=parts,
    )  # fmt: skip
    trainer.fit(module_of(config), DataLoader(batches, batch_size=None, collate_fn=lambda given: given))
    return watch.step


# (height, width) of four images: no two pairs of them have one largest size.
SIZES = ((64, 96), (64, 64), (96, 64), (48, 80))


def batch_of(objects: tuple[int, int, int, int], sizes: Sequence[tuple[int, int]] = SIZES) -> Batch:
    """Four images of noise with so many objects each: boxes large enough to have positive points."""
    generator = torch.Generator().manual_seed(0)
    images, targets = [], []
    for number, ((height, width), count) in enumerate(zip(sizes, objects, strict=True)):
        images.append(torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8))
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 0.4
        side = 16 + torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 0.3
        labels = torch.randint(4, (count,), generator=generator)
        targets.append(Target(torch.cat([corner, corner + side], 1), labels, number, (height, width)))
    return images, targets


def share(batch: Batch, rank: int, world_size: int) -> Batch:
    """Every world_size-th image, as the sampler gives them out."""
    return batch[0][rank::world_size], batch[1][rank::world_size]


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """1e-6 of the whole gradient, and each element 1e-5 of the largest in its tensor (some nearly cancel to zero)."""
    assert ours.keys() == theirs.keys() and ours
    whole = torch.cat([theirs[name].flatten() for name in ours]).double()
    error = torch.cat([(ours[name] - theirs[name]).flatten() for name in ours]).double()
    assert error.norm() <= 1e-6 * whole.norm()
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max() <= 1e-5 * value.abs().max(), name
