"""schedule.ema: the average is what hand arithmetic says, what is evaluated, saved and predicted with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from benchmarks.operators import HostSyncs
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from msil.config import Config
from msil.training import build
from msil.training.callbacks import AveragedWeights
from msil.training.experiment import run

from .cases import assert_same, assert_same_run, last, module_of, stop, tiny_config

TRAINED = "current_model_state"  # in a checkpoint, where Lightning's WeightAveraging keeps it
SETTINGS = ("schedule.ema=0.5", "model.backbone.norm=bn")


class Raw(Callback):
    """Keeps the weights after every optimizer step, and those in use at the end of every evaluation."""

    def __init__(self, _seed: int) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.evaluations: list[tuple[int, dict[str, Tensor]]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.states.append(_copy(pl_module))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.states.append(_copy(pl_module))

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.evaluations.append((trainer.global_step, _copy(pl_module)))


def _copy(module: L.LightningModule) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


Averaged = tuple[Config, Raw]


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Averaged:
    """A whole run, and its weights after each step."""
    config = tiny_config(tmp_path_factory.mktemp("runs"), shapes, *SETTINGS)
    watch = Raw(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "SeedSteps", lambda _seed: watch)
        run(config)
    return config, watch


def test_a_step_does_not_wait_for_the_device(tmp_path: Path, shapes: Path) -> None:
    module = module_of(tiny_config(tmp_path, shapes, *SETTINGS))
    averaging = AveragedWeights(0.5)
    averaging.setup(SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu"))), module, "fit")  # pyright: ignore
    with HostSyncs() as syncs:
        averaging._average_model.update_parameters(module)  # pyright: ignore[reportOptionalMemberAccess]
    assert syncs.found == []


def test_the_average_is_that_of_the_steps(averaged: Averaged) -> None:
    """d = min(0.5, (1 + n) / (10 + n)) after n averaged steps, the first of which is the weights themselves."""
    config, raw = averaged
    average = raw.states[1]
    averages = {1: average}
    for n, state in enumerate(raw.states[2:], start=1):
        decay = min(0.5, (1 + n) / (10 + n))
        average = {
            name: decay * average[name] + (1 - decay) * tensor if tensor.is_floating_point() else tensor
            for name, tensor in state.items()
        }
        averages[n + 1] = average
    assert len(averages) == 8
    torch.testing.assert_close(last(config)["state_dict"], average)
    assert_same(dict(last(config)[TRAINED]), raw.states[-1])
    assert not torch.equal(average["detector.head.scales"], raw.states[-1]["detector.head.scales"])
    # Every evaluation is of the average: after both epochs and at the end, two batches each.
    assert [step for step, _ in raw.evaluations] == [4, 4, 8, 8, 8, 8]
    for step, state in raw.evaluations:
        torch.testing.assert_close(state, averages[step])
    best = last(config, "best")
    torch.testing.assert_close(best["state_dict"], averages[best["global_step"]])


def test_interrupted_and_resumed_is_undisturbed(tmp_path: Path, shapes: Path) -> None:
    """Bit for bit: the average, the weights being trained, the optimizer's state and the numbers."""
    whole, config = (tiny_config(tmp_path / name, shapes, *SETTINGS) for name in ("whole", "stopped"))
    run(whole)
    stop(config, 23)
    assert last(config)["global_step"] == 5
    run(config)
    assert_same_run(config, whole)
    assert_same(last(config)[TRAINED], last(whole)[TRAINED])
