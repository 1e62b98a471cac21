"""The LightningModule around a detector: steps, optimizer, evaluation. No detection in here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from msil.config import Decay, OptimizerName, ScheduleConfig, Warmup
from msil.detection import Detections, Target
from msil.detection.losses import mean_across_ranks
from msil.detection.torchvision_detector import AnyDetector
from msil.metrics.detections import DetectionMetric
from msil.metrics.record import EvaluationRecord
from msil.training.optim import parameter_groups

Batch = tuple[list[Tensor], list[Target]]


class DetectionModule(L.LightningModule):
    """Trains `detector` by `schedule` and scores it with `metrics`.

    steps_per_epoch: optimizer steps an epoch. batch_size: images a step over all devices (scales the lr).
    describe: plain values saved into every checkpoint under "msil" (settings, classes), enough to rebuild the net.
    """

    def __init__(
        self,
        detector: AnyDetector,
        metrics: Sequence[DetectionMetric],
        schedule: ScheduleConfig,
        *,
        steps_per_epoch: int,
        batch_size: int,
        describe: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.detector = detector
        self.metrics = nn.ModuleList(metrics)
        self.schedule = schedule
        self.steps_per_epoch = steps_per_epoch
        self.batch_size = batch_size
        self.describe = dict(describe)
        self.final_evaluation = False  # the reported numbers come from pycocotools itself
        self.final_metrics: dict[str, float] = {}
        self.record: EvaluationRecord | None = None  # all ranks' detections beside the truth, of the final evaluation
        self.evaluated_at_step: int | None = None
        # Of the current step, without gradient: this rank's loss terms, and their means over the ranks.
        self.own_losses: dict[str, Tensor] = {}
        self.losses: dict[str, Tensor] = {}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = batch
        parts = self.trainer.accumulate_grad_batches
        self.detector.set_epoch(self.current_epoch)
        terms = self.detector.loss(images, targets)
        values = torch.stack(list(terms.values()))
        own = values.detach() / parts
        if batch_idx % parts:
            own = own + torch.stack(list(self.own_losses.values()))
        self.own_losses = dict(zip(terms, own, strict=True))
        if (batch_idx + 1) % parts == 0:  # the optimizer's step follows
            # A rank's terms are its share of a sum divided by the mean over ranks: only their mean is the step's loss.
            means = mean_across_ranks(own)
            self.losses = dict(zip(terms, means, strict=True))
            if self.is_logged(self.trainer.global_step + 1):
                lr = torch.tensor(self.trainer.optimizers[0].param_groups[0]["lr"], dtype=torch.float64)
                self.log_dict({"loss": means.sum(), **self.losses, "lr": lr})
        return values.sum()

    def is_logged(self, step: int) -> bool:
        """Whether training step `step` (from 1) has a row in metrics.csv; others do not wait for the device."""
        return step % self.trainer.log_every_n_steps == 0  # pyright: ignore[reportAttributeAccessIssue]

    def on_validation_epoch_start(self) -> None:
        for metric in self.metrics:
            metric.reset()  # pyright: ignore

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, list[Detections]]:
        images, targets = batch
        detections = self.detector.predict(images)
        for metric in self.metrics:
            metric.update(detections, [target.image_id for target in targets])  # pyright: ignore
        return {"detections": detections}

    def on_validation_epoch_end(self) -> None:
        values: dict[str, float] = {}
        for metric in self.metrics:
            values |= metric.compute_final() if self.final_evaluation else metric.compute()  # pyright: ignore
        if self.final_evaluation:
            self.final_metrics = values
            # Now: afterwards Lightning takes everything to the CPU, whose tensors NCCL does not gather.
            self.record = self.metrics[0].gathered() if len(self.metrics) else None  # pyright: ignore
        else:
            self.evaluated_at_step = self.trainer.global_step
            # float32: what a log holds need not be exact, the reported numbers are final_metrics
            self.log_dict({name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()})

    def configure_optimizers(self) -> Any:
        schedule, lr = self.schedule, self.lr
        groups = parameter_groups(
            self.detector,
            lr=lr,
            weight_decay=schedule.weight_decay,
            bias_lr_factor=self.of_recipe("bias_lr_factor"),
            bias_weight_decay=self.of_recipe("bias_weight_decay"),
            slower=self.detector.backbone,
            slower_factor=1.0 if schedule.backbone_lr_factor is None else schedule.backbone_lr_factor,
        )
        # The group of plain weights first: its lr is the one shown and logged.
        groups.sort(key=lambda group: (group["lr"] != lr, group["weight_decay"] != schedule.weight_decay))
        match schedule.optimizer:
            case OptimizerName.sgd:
                optimizer = torch.optim.SGD(groups, lr=lr, momentum=schedule.momentum, fused=self.fused)
            case OptimizerName.adamw:
                optimizer = torch.optim.AdamW(groups, lr=lr, fused=self.fused)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        # Lightning clips by norm too, but under bf16-mixed refuses to for every fused optimizer.
        if gradient_clip_val is not None:
            torch.nn.utils.clip_grad_norm_(self.detector.parameters(), gradient_clip_val)

    def lr_factor(self, step: int) -> float:
        """What the base lr is multiplied by at optimizer step `step` (from 0)."""
        schedule, first, last = self.schedule, self.of_recipe("warmup_factor"), self.warmup_steps - 1
        rising = schedule.warmup is not Warmup.constant
        warmup = first + rising * (1 - first) * step / last if step < last else 1.0
        match schedule.decay:
            case Decay.step:
                reached = sum(step // self.steps_per_epoch >= epoch for epoch in schedule.milestones)
                return warmup * schedule.gamma**reached
            case Decay.cosine:
                return warmup * (0.5 * (1 + math.cos(math.pi * min(step / self.total_steps, 1))))

    def of_recipe(self, name: str) -> float:
        """A setting of the schedule that, if null, is that of the head's published recipe."""
        value = getattr(self.schedule, name)
        return self.detector.recipe[name] if value is None else value

    @property
    def fused(self) -> bool | None:
        """Of the optimizer, which then can leave a step out: see FiniteSteps. Under 16-mixed the loss scaler does."""
        device = self.trainer.strategy.root_device.type
        # On a CPU it takes a gradient for one of its weight's strides, unlooked; those of DDP can have others.
        known = device == "cuda" or (device == "cpu" and self.trainer.world_size == 1)
        return True if known and self.trainer.precision != "16-mixed" else None

    @property
    def lr(self) -> float:
        """Learning rate before any factor, scaled to the images a step."""
        base = self.schedule.base_batch_size
        return self.schedule.lr if base is None else self.schedule.lr * self.batch_size / base

    @property
    def warmup_steps(self) -> int:
        """Of the warm-up: at most a quarter of the training."""
        return min(self.schedule.warmup_steps, self.total_steps // 4)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        total = self.schedule.epochs * self.steps_per_epoch
        return total if self.schedule.max_steps is None else min(total, self.schedule.max_steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["msil"] = self.describe
        checkpoint["evaluated_at_step"] = self.evaluated_at_step

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.evaluated_at_step = checkpoint["evaluated_at_step"]
        # Under schedule.epochs beyond those of before, the next step's lr is another than the one that was saved.
        factor = self.lr_factor(checkpoint["lr_schedulers"][0]["last_epoch"])
        for group in checkpoint["optimizer_states"][0]["param_groups"]:
            group["lr"] = group["initial_lr"] * factor
            group["fused"] = self.fused  # it may have been saved on another kind of device
