"""A loss or gradient that is no finite number: nothing is learnt from it, and the batch is kept to be looked at."""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from msil.config import NaNPolicy
from msil.errors import RunError
from msil.runs import lacks_space, replacing
from msil.training.later import Later
from msil.training.module import Batch, DetectionModule

SKIPS_IN_A_ROW = 3
LATE = 2  # steps that the host may be ahead of the device


class TrainingDiverged(RunError):
    """The loss or a gradient is no longer a finite number."""

    exit_code = 70


@dataclass(frozen=True)
class _Step:
    """A step whose numbers were looked at. bad: 1 where one is not finite, else 0."""

    number: int
    batch: Batch
    losses: dict[str, Tensor]
    bad: Later


class FiniteSteps(Callback):
    """Looks at the losses and gradients of every step before the optimizer takes it.

    If one is NaN or infinite on any process, all of them leave the weights, and norms' statistics, as they are.
    nan_policy=stop raises TrainingDiverged, which names the loss terms and the images, and each process writes its
    batch and the weights to run_dir/nan_batch_rank<r>.pt for `msil replay`; nan_policy=skip goes on with the next batch
    and stops at the fourth such step in a row. Under 16-mixed infinite gradients are the loss scaler's to deal with:
    only losses are looked at.

    With a fused optimizer (a GPU's) the device itself passes over the step, and over all that come after one that the
    run has to stop for; the host, which must not wait, learns of it LATE steps later, and of the gradients only that
    they broke.
    """

    def __init__(self, run_dir: Path, policy: NaNPolicy) -> None:
        self.run_dir = run_dir
        self.policy = policy
        self.skipped = 0
        self._in_a_row = 0
        self._batch: Batch | None = None
        self._statistics: list[tuple[Tensor, Tensor]] = []
        self._most_in_a_row = SKIPS_IN_A_ROW if policy is NaNPolicy.skip else 0
        self._bad_in_a_row: Tensor | None = None  # on the device, which is ahead of the host
        self._waiting: deque[_Step] = deque()

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
        assert isinstance(pl_module, DetectionModule) and self._batch is not None
        gradients = [] if trainer.precision == "16-mixed" else _gradients(pl_module)
        bad = _bad(list(pl_module.shared_losses.values()), gradients)
        later = trainer.precision != "16-mixed" and optimizer.defaults.get("fused", False)
        if later:
            passed_over = self._passed_over(bad)
            optimizer.found_inf = passed_over  # pyright: ignore[reportAttributeAccessIssue]
            for buffer, before in self._statistics:
                buffer.copy_(torch.where(passed_over > 0, before, buffer))
        self._waiting.append(_Step(trainer.global_step + 1, self._batch, pl_module.own_losses, Later(bad[None])))
        self._look(trainer, pl_module, optimizer, waiting=LATE if later else 0)

    def _passed_over(self, bad: Tensor) -> Tensor:
        """1 where the device leaves this step out: it is bad, or one before it was that the host will stop for."""
        before = self._bad_in_a_row
        if before is None:  # a run that was continued with nan_policy=stop may come with some that were skipped
            before = torch.full_like(bad, min(self._in_a_row, self._most_in_a_row))
        self._bad_in_a_row = torch.where(before > self._most_in_a_row, before, (before + 1) * bad)
        return torch.maximum(bad, (self._bad_in_a_row > self._most_in_a_row).float())

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._look(trainer, pl_module, None)
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._look(trainer, pl_module, None)

    def _look(
        self, trainer: L.Trainer, module: L.LightningModule, optimizer: torch.optim.Optimizer | None, waiting: int = 0
    ) -> None:
        """At all steps but the last `waiting`. optimizer: the one that is about to take the last of them, if it would
        take a bad one too."""
        assert isinstance(module, DetectionModule)
        while len(self._waiting) > waiting:
            step = self._waiting.popleft()
            if step.bad.read()[0] == 0:
                self._in_a_row = 0
            else:
                self._pass_over(trainer, module, step, optimizer if waiting == 0 else None)

    def _pass_over(
        self, trainer: L.Trainer, module: DetectionModule, step: _Step, optimizer: torch.optim.Optimizer | None
    ) -> None:
        """Skip a bad step, or stop. optimizer: None where the device has passed over it already."""
        self._in_a_row += 1
        gradients = [] if optimizer is None else _broken_gradients(module)
        told = _told(_gathered(_report(step, gradients)), step.number)
        if optimizer is not None:
            for buffer, before in self._statistics:
                buffer.copy_(before)
        if self._in_a_row <= self._most_in_a_row:
            self.skipped += 1
            if optimizer is not None:
                optimizer.zero_grad(set_to_none=True)  # an optimizer passes over parameters without a gradient
            if trainer.is_global_zero:
                print(f"{told}; skipped, {self._in_a_row} of at most {self._most_in_a_row} in a row", file=sys.stderr)
            return
        kept = self._keep_batch(trainer, module, step)
        again = f", the {self._in_a_row}th time in a row" if self._in_a_row > SKIPS_IN_A_ROW else ""
        raise TrainingDiverged(
            f"{told}{again}. The weights were left as they were; {kept}."
            " Lower schedule.lr, lengthen schedule.warmup_steps, set schedule.grad_clip, or pass over"
            " single batches with trainer.nan_policy=skip."
        )

    def _keep_batch(self, trainer: L.Trainer, module: DetectionModule, step: _Step) -> str:
        """Where the batch is, in words; a full disk must not hide what this is all about."""
        path = self.run_dir / f"nan_batch_rank{trainer.global_rank}.pt"
        try:
            with replacing(path) as temporary, temporary.open("xb") as file:
                torch.save(_replay(module, step), file)
        except (OSError, RuntimeError) as error:
            if not lacks_space(error):
                raise
            return f"there is no room to keep the batch in {path}"
        return f"the batch is in {path}: msil replay shows where the numbers break"

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self._in_a_row = state_dict["skipped"], state_dict["in_a_row"]


def _report(step: _Step, gradients: list[str]) -> dict[str, Any]:
    """This process's part of what went wrong. gradients: names of the parameters whose gradients are not finite."""
    images, targets = step.batch
    return {
        "losses": {name: float(value) for name, value in step.losses.items()},
        "image_ids": [target.image_id for target in targets],
        "inputs": [
            target.image_id
            for image, target in zip(images, targets, strict=True)
            if not (torch.isfinite(image).all() and torch.isfinite(target.boxes).all())
        ],
        "gradients": gradients,
    }


def _replay(module: DetectionModule, step: _Step) -> dict[str, Any]:
    """What torch.load(weights_only=True) reads: a run's checkpoint without the optimizer, and the batch."""
    images, targets = step.batch
    return {
        "msil": module.describe,
        "state_dict": {f"detector.{key}": value for key, value in module.detector.state_dict().items()},
        "step": step.number - 1,
        "images": [image.cpu() for image in images],
        "targets": [asdict(target.to("cpu")) for target in targets],
        "losses": {name: float(value) for name, value in step.losses.items()},
    }


def _broken_gradients(module: DetectionModule) -> list[str]:
    return [
        name
        for name, parameter in module.detector.named_parameters()
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
    ]


def _gradients(module: L.LightningModule) -> list[Tensor]:
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


def _bad(values: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """1 if one of the numbers is not finite, else 0: a float32 scalar on their device."""
    # A norm over all of them is finite only if each number is: one number to look at.
    norms = [torch.nn.utils.get_total_norm(gradients)] if gradients else []
    return 1 - torch.isfinite(torch.stack([*values, *norms])).all().float()


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
    named = f"the gradients of {_listed(parameters, 'parameter')}" if parameters else "some gradients"
    return f"at step {step} the losses are finite, but {named} are not ({_listed(every, 'image')})"


def _listed(names: list[Any], kind: str, most: int = 8) -> str:
    """`images 5, 9 and 12 more`."""
    shown = ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
    return f"{kind}{'' if len(names) == 1 else 's'} {shown}"
