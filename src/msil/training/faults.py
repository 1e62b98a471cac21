"""What ends a run before its end: numbers that are not finite, too little memory, a full disk, a lost rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from msil.config import Config
from msil.errors import RunError, UserError
from msil.runs import lacks_space, no_space
from msil.training.module import Batch, DetectionModule

# PyTorch's CPU allocator, and a few kernels, raise a plain RuntimeError with one of these.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory")


class TrainingDiverged(RunError):
    """The loss or a gradient is no longer a finite number. step: from 1. losses: by name, of the ranks where they are
    not finite."""

    exit_code = 70

    def __init__(self, message: str, step: int, losses: dict[str, float]) -> None:
        super().__init__(message)
        self.step = step
        self.losses = losses


class PeerLost(RunError):
    """Another process of the run has ended, so this one cannot go on."""

    exit_code = 1


class OutOfMemory(UserError):
    """The machine or the GPU has too little memory for the settings."""


@dataclass
class CurrentStep:
    """number: from 1; 0 before the first. image_ids: of all its batches. size: the largest (height, width)."""

    number: int = 0
    evaluating: bool = False
    image_ids: list[int] = field(default_factory=list)
    size: tuple[int, ...] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class FiniteSteps(Callback):
    """Raises TrainingDiverged where a loss or gradient of a step is NaN or infinite on any rank, before the step is
    taken. Under 16-mixed infinite gradients are the loss scaler's to deal with: only losses are checked.

    With a fused optimizer the device itself leaves out that step and all that follow; the host reads the flag
    one step later, so that it need not wait for the device, and before every save.

    current: the step that is being computed, training or evaluation, for the sentence of `explained`.
    """

    def __init__(self) -> None:
        self.current = CurrentStep()
        self._bad: Tensor | None = None  # on the device: this step or one before it
        self._unread: _Flag | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        later = batch_idx % trainer.accumulate_grad_batches > 0
        self._begin(pl_module, batch, trainer.global_step + 1, self.current.image_ids if later else [])

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._begin(pl_module, batch, batch_idx + 1, [])
        self.current.evaluating = True

    def _begin(self, module: L.LightningModule, batch: Batch, number: int, earlier: list[int]) -> None:
        images, targets = batch
        ids = [*earlier, *(target.image_id for target in targets)]
        size = tuple(max(image.shape[axis] for image in images) for axis in (-2, -1))
        self.current = CurrentStep(number, False, ids, size, module.device)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert isinstance(pl_module, DetectionModule)
        scaled = trainer.precision == "16-mixed"
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None and not scaled]
        # A norm over all of them is finite only if each number is: one number to look at.
        norms = [torch.nn.utils.get_total_norm(gradients)] if gradients else []
        bad = 1 - torch.isfinite(torch.stack([*pl_module.losses.values(), *norms])).all().float()
        before, self._unread = self._unread, _Flag(bad, self.current, pl_module.own_losses)
        if optimizer.defaults.get("fused", False) and not scaled:
            self._bad = bad if self._bad is None else torch.maximum(bad, self._bad)
            optimizer.found_inf = self._bad  # pyright: ignore[reportAttributeAccessIssue]
            if before is not None:
                before.check()
        else:
            self._unread.check()

    def on_save_checkpoint(self, *_: Any) -> None:
        if self._unread is not None:
            self._unread.check()

    def on_train_end(self, *_: Any) -> None:
        self.on_save_checkpoint()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Of a run that ends so the loggers have a last row, by which `msil runs` and a dashboard tell it."""
        if isinstance(exception, TrainingDiverged):
            last = {"epoch": trainer.current_epoch, "diverged": 1, **exception.losses}
            for logger in trainer.loggers:
                logger.log_metrics(last, step=exception.step - 1)


class _Flag:
    """Whether a step is bad, on its way to the host. losses: this rank's."""

    def __init__(self, bad: Tensor, step: CurrentStep, losses: dict[str, Tensor]) -> None:
        # Only a copy from CUDA has an event to wait for before it is read.
        self.bad, self.step, self.losses = bad.to("cpu", non_blocking=bad.is_cuda), step, losses
        self.arrived = torch.cuda.Event() if bad.is_cuda else None
        if self.arrived is not None:
            self.arrived.record()

    def check(self) -> None:
        """Raises TrainingDiverged, which names the loss terms and images, on every rank."""
        if self.arrived is not None:
            self.arrived.synchronize()
        if not self.bad.item():
            return
        own = {name: float(loss) for name, loss in self.losses.items() if not torch.isfinite(loss)}
        ranks: list[Any] = [(own, self.step.image_ids)]
        if dist.is_available() and dist.is_initialized():
            ranks *= dist.get_world_size()
            dist.all_gather_object(ranks, ranks[0])
        guilty = [rank for rank in ranks if rank[0]]
        terms = {name: value for losses, _ in guilty for name, value in losses.items()}
        named = ", ".join(f"{name} is {value}" for name, value in terms.items())
        images = ", ".join(str(image) for _, ids in guilty or ranks for image in ids)
        raise TrainingDiverged(
            f"at step {self.step.number} {named or 'the losses are finite, but some gradients are not'} (images"
            f" {images}). The weights were left as they were. Lower schedule.lr, lengthen schedule.warmup_steps or set"
            " schedule.grad_clip.",
            self.step.number,
            terms,
        )


def explained(error: Exception, config: Config, run_dir: Path, current: CurrentStep) -> Exception | None:
    """The sentence for an error of the disk, the memory or another rank; None for any other error."""
    if lacks_space(error):
        return no_space(run_dir, None)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in _NO_MEMORY)
    ):
        return _out_of_memory(config, current)
    if isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo/transport" in str(error) or "NCCL" in str(error))
    ):
        return PeerLost(
            f"process {rank_zero_only.rank} of this run lost another one and cannot go on; the same command"
            " continues after the last checkpoint."
        )
    return None


def _out_of_memory(config: Config, current: CurrentStep) -> OutOfMemory:
    data = config.data
    if not current.number:
        return OutOfMemory("out of memory before the first step: stop other programs, or lower data.workers.")
    where = "memory" if current.device.type == "cpu" else f"memory of {current.device}"
    step = f"{'evaluation' if current.evaluating else 'training'} step {current.number}"
    height, width = current.size
    advice = f"raise trainer.accumulate or lower data.batch_size (now {data.batch_size}),"
    if current.evaluating:  # data.eval_batch_size alone is not in config_hash
        advice = f"lower data.eval_batch_size (now {data.eval_batch_size}) and the run continues; or"
    return OutOfMemory(
        f"out of {where} in {step} on {len(current.image_ids)} images of up to {height}x{width} pixels: {advice} lower"
        f" data.min_size and data.max_size (now {data.min_size} and {data.max_size}) or set"
        " trainer.precision=bf16-mixed, each of which makes another run that starts anew."
    )
