"""The exponential moving average of a detector's weights: what is evaluated and kept, beside what is trained."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from msil.training.module import Batch, DetectionModule

TRAINED = "trained_state_dict"  # in a checkpoint: the weights that training goes on with
_PREFIX = "detector."


class AveragedWeights(Callback):
    """Keeps average = d * average + (1 - d) * weights after every step, floating-point buffers included.

    d = min(decay, (1 + n) / (10 + n)) after n averaged steps, as in TensorFlow's ExponentialMovingAverage with
    num_updates: else the random weights at the start would stay in the average for some 1 / (1 - decay) steps.

    Every evaluation is of the average, which the detector keeps after the last one, that behind the training. In a
    checkpoint the average is the state_dict and the weights being trained stand beside it, so a resumed run has both.

    Lightning's own WeightAveraging would hold the average of a GPU's weights on the CPU, copy the whole module with the
    metrics' ground truth, and swap the weights back before other callbacks have drawn what the evaluated ones detect.
    So: give this callback behind those that look at the detector in on_validation_end.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self._other: dict[str, Tensor] = {}  # the average; while that is in the detector, the weights being trained
        self._swapped = False

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:  # after the module has loaded state_dict, the average
        if TRAINED in checkpoint:
            self._other = {name: tensor.detach().clone() for name, tensor in _state(pl_module).items()}
            pl_module.load_state_dict(checkpoint[TRAINED])

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        live = _state(pl_module)
        average = self._other or live
        # Here, not before, the module is on its device.
        self._other = {name: average[name].detach().to(tensor.device, copy=True) for name, tensor in live.items()}

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        averaged, weights = [], []
        for name, tensor in _state(pl_module).items():
            if tensor.is_floating_point():
                averaged.append(self._other[name])
                weights.append(tensor.detach())
            else:
                self._other[name].copy_(tensor)
        get_ema_multi_avg_fn(decay)(averaged, weights, None)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._swapped:
            self._swap(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._swapped and trainer.state.fn == TrainerFn.FITTING:
            self._swap(pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        held, other = checkpoint["state_dict"], dict(checkpoint["state_dict"])
        other |= {f"{_PREFIX}{name}": tensor for name, tensor in self._other.items()}
        checkpoint["state_dict"], checkpoint[TRAINED] = (held, other) if self._swapped else (other, held)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = state_dict["steps"]

    def _swap(self, module: L.LightningModule) -> None:
        # The tensors change places without a copy. Optimizer and DDP hold the parameters, not what is in them.
        for name, tensor in _state(module).items():
            tensor.data, self._other[name] = self._other[name], tensor.data
        self._swapped = not self._swapped


def _state(module: L.LightningModule) -> dict[str, Tensor]:
    """The detector's own parameters and buffers, those that a checkpoint holds."""
    assert isinstance(module, DetectionModule)
    return module.detector.state_dict(keep_vars=True)
