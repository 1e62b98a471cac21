"""The LightningModule round a detector: steps, optimizer, evaluation. No detection in here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from msil.config import Decay, OptimizerName, ScheduleConfig
from msil.detection import Detector, Target
from msil.detection.losses import mean_across_ranks
from msil.detection.torchvision_detector import AnyDetector
from msil.errors import ConfigError
from msil.metrics.coco import CocoMetric
from msil.metrics.detections import DetectionMetric
from msil.training.graphs import GraphedSteps, check_graphs
from msil.training.optim import cosine_decay_at, parameter_groups, start_momentum, step_decay_at, warmup_factor_at
from msil.training.steps import loss_by_parts

Batch = tuple[list[Tensor], list[Target]]


class DetectionModule(L.LightningModule):
    """Trains `detector` by `schedule` and scores it with `metrics`.

    steps_per_epoch: optimizer steps an epoch. batch_size: images a step over all devices (scales the lr).
    accumulate: parts that this process takes its images of a step in; see msil.training.steps.
    cuda_graph: replay steps from CUDA graphs; see msil.training.graphs.
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
        accumulate: int = 1,
        cuda_graph: bool = False,
    ) -> None:
        super().__init__()
        self.detector = detector
        self.metrics = nn.ModuleList(metrics)
        self.schedule = schedule
        self.steps_per_epoch = steps_per_epoch
        self.batch_size = batch_size
        self.describe = dict(describe)
        self.accumulate = accumulate
        self.cuda_graph = cuda_graph
        self.graphed: GraphedSteps | None = None
        self.final_evaluation = False  # the reported numbers come from pycocotools itself
        self.final_metrics: dict[str, float] = {}
        self.evaluated_at_step: int | None = None
        # Of the current step, detached: this process's terms, and their means over all processes, which the step is.
        self.own_losses: dict[str, Tensor] = {}
        self.shared_losses: dict[str, Tensor] = {}

    def on_fit_start(self) -> None:
        images = self.batch_size // self.trainer.world_size
        if self.accumulate > images:
            raise ConfigError(
                f"trainer.accumulate={self.accumulate} parts need at least as many images a step on each device, but "
                f"data.batch_size={self.batch_size} gives each of {self.trainer.world_size} devices {images}."
            )
        if self.cuda_graph:
            if not isinstance(self.detector, Detector):
                raise ConfigError("trainer.cuda_graph=true does not go with model=torchvision: leave it out.")
            check_graphs(self.trainer, self.detector)
            self.graphed = GraphedSteps(self.detector)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = batch
        self.detector.set_epoch(self.current_epoch)
        losses, total = self.step_loss(images, targets)
        self.own_losses = {name: value.detach() for name, value in losses.items()}
        # A rank's terms are its share of a sum divided by the mean over ranks: only their mean is the step's loss.
        values = mean_across_ranks(torch.stack(list(self.own_losses.values())))
        # step_log.py writes them to the loggers; Lightning's own log() would wait for the device.
        self.shared_losses = dict(zip(losses, values, strict=True))
        return total

    def step_loss(self, images: list[Tensor], targets: list[Target]) -> tuple[dict[str, Tensor], Tensor]:
        """This process's loss terms, and their sum to go backward through; earlier parts' gradients are there."""
        if self.graphed is not None:
            losses = self.graphed(images, targets)
        elif self.accumulate > 1:
            self.trainer.optimizers[0].zero_grad()
            return loss_by_parts(self.detector, images, targets, parts=self.accumulate, backward=self.backward_of_part)
        else:
            losses = self.detector.loss(images, targets)
        return losses, torch.stack(list(losses.values())).sum()

    def backward_of_part(self, loss: Tensor) -> None:
        """Adds a part's gradients to the parameters', on this process alone.

        DistributedDataParallel begins to listen when training_step has returned, so the processes' gradients meet
        once, in the backward pass of the last part.
        """
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        with torch.autocast(loss.device.type, enabled=False):  # as outside training_step
            (loss if scaler is None else scaler.scale(loss)).backward()

    def backward(self, loss: Tensor) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.graphed is None:  # a graph has been backward already
            loss.backward()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        # Lightning calls this after training_step: by then the earlier parts' gradients, or a graph's, are there.
        if self.accumulate == 1 and self.graphed is None:
            optimizer.zero_grad()

    def on_validation_epoch_start(self) -> None:
        for metric in self.metrics:
            metric.reset()  # pyright: ignore

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, targets = batch
        detections = self.detector.predict(images)
        for metric in self.metrics:
            metric.update(detections, [target.image_id for target in targets])  # pyright: ignore

    def on_validation_epoch_end(self) -> None:
        values: dict[str, float] = {}
        for metric in self.metrics:
            if self.final_evaluation and isinstance(metric, CocoMetric):
                values |= metric.compute_final()
            else:
                values |= metric.compute()  # pyright: ignore
        if self.final_evaluation:
            self.final_metrics = values
        else:
            self.evaluated_at_step = self.trainer.global_step
            # float32: what a log holds need not be exact, the reported numbers are final_metrics
            self.log_dict({name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()})

    def configure_optimizers(self) -> Any:
        schedule = self.schedule
        lr = schedule.lr
        if schedule.base_batch_size is not None:
            lr *= self.batch_size / schedule.base_batch_size
        groups = parameter_groups(
            self.detector,
            lr=lr,
            weight_decay=schedule.weight_decay,
            bias_lr_factor=self.of_recipe("bias_lr_factor"),
            bias_weight_decay=self.of_recipe("bias_weight_decay"),
        )
        # The group of plain weights first: its lr is the one shown and logged.
        groups.sort(key=lambda group: (group["lr"] != lr, group["weight_decay"] != schedule.weight_decay))
        # A fused optimizer passes over a bad step by itself: see divergence.py. Under 16-mixed the loss scaler does.
        on_gpu = next(self.parameters()).is_cuda
        fused = True if on_gpu and self.trainer.precision != "16-mixed" else None
        match schedule.optimizer:
            case OptimizerName.sgd:
                optimizer = torch.optim.SGD(groups, lr=lr, momentum=schedule.momentum, fused=fused)
                if optimizer.defaults["fused"]:
                    start_momentum(optimizer)
            case OptimizerName.adamw:
                optimizer = torch.optim.AdamW(groups, lr=lr, fused=fused)
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
        schedule = self.schedule
        factor = self.of_recipe("warmup_factor")
        warmup = warmup_factor_at(step, warmup_steps=schedule.warmup_steps, warmup_factor=factor)
        match schedule.decay:
            case Decay.step:
                epoch = step // self.steps_per_epoch
                return warmup * step_decay_at(epoch, milestones=schedule.milestones, gamma=schedule.gamma)
            case Decay.cosine:
                return warmup * cosine_decay_at(step, total_steps=self.total_steps)

    def of_recipe(self, name: str) -> float:
        """A setting of the schedule that, if null, is that of the head's published recipe."""
        value = getattr(self.schedule, name)
        return self.detector.recipe[name] if value is None else value

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
