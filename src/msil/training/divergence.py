"""A loss or gradient that is no finite number: nothing is learnt from it, and the batch is kept to be looked at."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from msil.config import NaNPolicy
from msil.files import lacks_space, replacing
from msil.training.module import Batch, DetectionModule

SKIPS_IN_A_ROW = 3


class TrainingDiverged(Exception):
    """The loss or a gradient is no longer a finite number (exit code 70)."""


class FiniteSteps(Callback):
    """Looks at the losses and gradients of every step before the optimizer takes it.

    If one is NaN or infinite on any process, all of them leave the weights, and norms' statistics, as they are.
    nan_policy=stop raises TrainingDiverged, which names the loss terms and the images, and each process writes its
    batch and the weights to run_dir/nan_batch_rank<r>.pt for `msil replay`; nan_policy=skip goes on with the next batch
    and stops at the fourth such step in a row. Under 16-mixed infinite gradients are the loss scaler's to deal with:
    only losses are looked at.
    """

    def __init__(self, run_dir: Path, policy: NaNPolicy) -> None:
        self.run_dir = run_dir
        self.policy = policy
        self.skipped = 0
        self._in_a_row = 0
        self._batch: Batch | None = None
        self._statistics: list[tuple[Tensor, Tensor]] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self._batch = batch
        # The forward pass moves the running statistics of norms that are trained; a bad one would spoil them for good.
        norms = [m for m in pl_module.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm) and m.training]
        self._statistics = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert isinstance(pl_module, DetectionModule)
        gradients = [] if trainer.precision == "16-mixed" else _gradients(pl_module)
        if _all_finite(list(pl_module.shared_losses.values()), gradients):
            self._in_a_row = 0
            return
        for buffer, before in self._statistics:
            buffer.copy_(before)
        self._in_a_row += 1
        reports = _gathered(self._report(trainer, pl_module))
        told = _told(reports, trainer.global_step + 1)
        if self.policy is NaNPolicy.skip and self._in_a_row <= SKIPS_IN_A_ROW:
            self.skipped += 1
            optimizer.zero_grad(set_to_none=True)  # an optimizer passes over parameters without a gradient
            if trainer.is_global_zero:
                print(f"{told}; skipped, {self._in_a_row} of at most {SKIPS_IN_A_ROW} in a row", file=sys.stderr)
            return
        kept = self._keep_batch(trainer, pl_module)
        again = f", the {self._in_a_row}th time in a row" if self._in_a_row > SKIPS_IN_A_ROW else ""
        raise TrainingDiverged(
            f"{told}{again}. The weights were left as they were; {kept}."
            " Lower schedule.lr, lengthen schedule.warmup_steps, set schedule.grad_clip, or pass over"
            " single batches with trainer.nan_policy=skip."
        )

    def _keep_batch(self, trainer: L.Trainer, module: DetectionModule) -> str:
        """Where the batch is, in words; a full disk must not hide what this is all about."""
        path = self.run_dir / f"nan_batch_rank{trainer.global_rank}.pt"
        try:
            with replacing(path) as temporary, temporary.open("xb") as file:
                torch.save(self._replay(trainer, module), file)
        except (OSError, RuntimeError) as error:
            if not lacks_space(error):
                raise
            return f"there is no room to keep the batch in {path}"
        return f"the batch is in {path}: msil replay shows where the numbers break"

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self._in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    def _report(self, trainer: L.Trainer, module: DetectionModule) -> dict[str, Any]:
        """This process's part of what went wrong."""
        assert self._batch is not None
        images, targets = self._batch
        return {
            "losses": {name: float(value) for name, value in module.own_losses.items()},
            "image_ids": [target.image_id for target in targets],
            "inputs": [
                target.image_id
                for image, target in zip(images, targets, strict=True)
                if not _all_finite([image.float(), target.boxes], [])
            ],
            "gradients": [
                name
                for name, parameter in module.detector.named_parameters()
                if parameter.grad is not None and not _all_finite([], [parameter.grad])
            ],
        }

    def _replay(self, trainer: L.Trainer, module: DetectionModule) -> dict[str, Any]:
        """What torch.load(weights_only=True) reads: a run's checkpoint without the optimizer, and the batch."""
        assert self._batch is not None
        images, targets = self._batch
        return {
            "msil": module.describe,
            "state_dict": {f"detector.{key}": value for key, value in module.detector.state_dict().items()},
            "step": trainer.global_step,
            "images": [image.cpu() for image in images],
            "targets": [asdict(target.to("cpu")) for target in targets],
            "losses": {name: float(value) for name, value in module.own_losses.items()},
        }


def _gradients(module: L.LightningModule) -> list[Tensor]:
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


def _all_finite(values: list[Tensor], gradients: list[Tensor]) -> bool:
    # A norm over all of them is finite only if each number is: one number to look at.
    norms = [torch.nn.utils.get_total_norm(gradients)] if gradients else []
    finite = torch.stack([torch.isfinite(value).all() for value in [*values, *norms]]).all()
    return bool(finite.cpu().numpy())  # on a CPU without waiting for anything


def _gathered(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Every process's report. All of them come here: what they looked at is the same on each."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [report]
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, report)
    return reports


def _told(reports: list[dict[str, Any]], step: int) -> str:
    """`at step 12 loss_bbox is nan (images 5, 9)`, or what else is not finite."""
    guilty = [report for report in reports if report["inputs"]]
    if guilty:
        images = [image for report in guilty for image in report["inputs"]]
        return f"at step {step} the pixels or boxes of {_listed(images, 'image')} are not finite"
    terms: dict[str, float] = {}
    images = []
    for report in reports:
        wrong = {name: value for name, value in report["losses"].items() if not abs(value) < float("inf")}
        if wrong:
            terms |= wrong
            images += report["image_ids"]
    if terms:
        named = ", ".join(f"{name} is {value}" for name, value in terms.items())
        return f"at step {step} {named} ({_listed(images, 'image')})"
    every = [image for report in reports for image in report["image_ids"]]
    parameters = reports[0]["gradients"]
    return (
        f"at step {step} the losses are finite, but the gradients of {_listed(parameters, 'parameter')} are not"
        f" ({_listed(every, 'image')})"
    )


def _listed(names: list[Any], kind: str, most: int = 8) -> str:
    """`images 5, 9 and 12 more`."""
    shown = ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
    return f"{kind}{'' if len(names) == 1 else 's'} {shown}"
