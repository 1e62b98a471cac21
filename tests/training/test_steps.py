"""Accumulation, clipping and mixed precision: a step by them is the step that they promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from msil.validate import validate
from torch import Tensor, nn

from msil.config import Config
from msil.errors import ConfigError
from msil.training.experiment import run
from msil.training.setup import make_trainer
from msil.training.steps import split

from .cases import load, module_of, tiny_config
from .one_step import assert_same_gradients, batch_of, one_step

HEADS = ("fcos", "vfnet")


def config_of(*overrides: str) -> Config:
    return tiny_config("runs", "data", "schedule.grad_clip=null", *overrides)


# Accumulation


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("parts", [2, 3])
def test_parts_make_the_mean_of_their_losses(tmp_path: Path, head: str, parts: int) -> None:
    """Weighed by their images, as gradient accumulation has it: in 3 parts, of 1, 1 and 2 of 4 images."""
    batch = batch_of((3, 1, 0, 4))
    step = one_step(config_of(f"model/head={head}", f"trainer.accumulate={parts}"), batch, tmp_path)
    module = module_of(config_of(f"model/head={head}"))
    expected: dict[str, Tensor] = {}
    for images, targets in split(*batch, parts):
        for name, loss in module.detector.loss(images, targets).items():
            expected[name] = expected.get(name, torch.zeros(())) + loss * len(images) / 4
    total = torch.stack(list(expected.values())).sum()
    assert step.logged == pytest.approx({"loss": total.item(), **{n: v.item() for n, v in expected.items()}}, rel=1e-6)
    total.backward()
    own = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert_same_gradients(step.gradients, own)
    whole = one_step(config_of(f"model/head={head}"), batch, tmp_path)
    # Divisors and padding are a part's: far more than rounding, which is 1e-6 above.
    assert step.logged["loss"] != pytest.approx(whole.logged["loss"], rel=1e-5)


def test_parts_are_nearly_equal_and_in_order() -> None:
    images: list[Any] = list(range(7))
    assert [part for part, _ in split(images, images, 3)] == [[0, 1], [2, 3], [4, 5, 6]]
    assert [part for part, _ in split(images[:2], images[:2], 3)] == [[0], [1]]


def test_one_graph_at_a_time_is_in_memory(tmp_path: Path) -> None:
    """What accumulation is for: the bytes that the backward pass waits for, counted by autograd's own hooks."""

    class Saved(Callback):
        held = peak = 0

        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda kept: kept.tensor)
            self.hooks.__enter__()

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            self.hooks.__exit__(None, None, None)

        def pack(self, tensor: Tensor) -> Any:
            return Kept(self, tensor)

    class Kept:
        def __init__(self, count: Saved, tensor: Tensor) -> None:
            self.count, self.tensor = count, tensor
            count.held += tensor.nbytes
            count.peak = max(count.peak, count.held)

        def __del__(self) -> None:
            self.count.held -= self.tensor.nbytes

    whole, halves = Saved(), Saved()
    batch = batch_of((3, 1, 2, 4))
    one_step(config_of(), batch, tmp_path, whole)
    one_step(config_of("trainer.accumulate=2"), batch, tmp_path, halves)
    # Half, but for the weights, which both save.
    weights = sum(parameter.nbytes for parameter in module_of(config_of()).parameters())
    assert halves.peak - weights < 0.6 * (whole.peak - weights)


def test_more_parts_than_images_are_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "data", "trainer.accumulate=9")  # of 8 images
    with pytest.raises(ConfigError, match=r"accumulate=9 parts need at least as many images a step"):
        validate(config)
    with pytest.raises(ConfigError, match="gives each of 1 devices 8"):  # known only at the start: how many devices
        one_step(config, batch_of((1, 1, 1, 1)), tmp_path)


# Clipping


@pytest.mark.parametrize("parts", [1, 2])
def test_the_gradient_is_clipped_to_the_limit(tmp_path: Path, parts: int) -> None:
    """All gradients by one factor, so that their L2 norm is the limit; that of the whole step, not of a part."""
    config = tiny_config("runs", "data", "schedule.grad_clip=0.25", f"trainer.accumulate={parts}")
    batch = batch_of((3, 1, 0, 4))
    step = one_step(config, batch, tmp_path)
    norm = sum(float(gradient.double().square().sum()) for gradient in step.gradients.values()) ** 0.5
    assert norm > 1
    clipped = sum(float(gradient.double().square().sum()) for gradient in step.clipped.values()) ** 0.5
    assert clipped == pytest.approx(0.25, rel=1e-5)
    for name, gradient in step.gradients.items():
        torch.testing.assert_close(step.clipped[name], gradient * (0.25 / norm), rtol=1e-4, atol=1e-9)
    free = one_step(config_of(f"trainer.accumulate={parts}"), batch, tmp_path)
    assert_same_gradients(step.gradients, free.gradients)


def test_a_gradient_below_the_limit_stays_as_it_is(tmp_path: Path) -> None:
    step = one_step(tiny_config("runs", "data", "schedule.grad_clip=1e6"), batch_of((3, 1, 0, 4)), tmp_path)
    assert all(torch.equal(step.clipped[name], gradient) for name, gradient in step.gradients.items())


# Precision


class Types(Callback):
    """Which numbers the convolutions, the loss and the optimizer compute with."""

    def __init__(self) -> None:
        self.convolutions: set[torch.dtype] = set()
        self.others: set[torch.dtype] = set()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for module in pl_module.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda _, __, output: self.convolutions.add(output.dtype))

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self.others.add(loss.dtype)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.others |= {parameter.dtype for parameter in pl_module.parameters()}
        self.others |= {gradient.dtype for p in pl_module.parameters() if (gradient := p.grad) is not None}
        moments = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
        self.others |= {value.dtype for value in moments}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("parts", [1, 2])
def test_bf16_mixed(tmp_path: Path, head: str, parts: int) -> None:
    """Convolutions in bfloat16; the loss, weights, gradients and the optimizer's moments in float32.

    bfloat16 rounds to 8 bits, 0.2 % at most. One path from image to loss has some twenty roundings one after the
    other, 4 % if all went one way.
    """
    config = config_of(f"model/head={head}", f"trainer.accumulate={parts}")
    batch = batch_of((3, 1, 0, 4))
    full, mixed = Types(), Types()
    expected = one_step(config, batch, tmp_path, full)
    step = one_step(config, batch, tmp_path, mixed, precision="bf16-mixed")
    assert full.convolutions == full.others == mixed.others == {torch.float32}
    assert mixed.convolutions == {torch.bfloat16}
    assert step.logged == pytest.approx(expected.logged, rel=0.04)
    assert step.logged != pytest.approx(expected.logged, rel=1e-6)


@pytest.mark.parametrize("head", HEADS)
def test_parts_under_a_scaled_loss(tmp_path: Path, head: str) -> None:
    """16-mixed multiplies the loss by a scale before each backward pass and divides the gradient once.

    Lightning has no fp16 on a CPU, torch has: the plugin is given by hand. fp16 rounds to 11 bits, 5e-4 a rounding, of
    which some forty follow each other from the image to a gradient: 2e-2 if all went one way. A part without the scale
    would be missing almost whole.
    """

    def step(parts: int) -> dict[str, Tensor]:
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
        config = config_of(f"model/head={head}", f"trainer.accumulate={parts}")
        return one_step(config, batch_of((3, 1, 0, 4)), tmp_path, plugins=[plugin]).gradients

    by_parts = torch.cat([value.flatten() for value in step(2).values()])
    exact = one_step(
        config_of(f"model/head={head}", "trainer.accumulate=2"), batch_of((3, 1, 0, 4)), tmp_path
    ).gradients
    exact = torch.cat([value.flatten() for value in exact.values()])
    assert (by_parts - exact).norm() <= 2e-2 * exact.norm()


def test_a_bf16_run_to_its_end(tmp_path: Path, shapes: Path) -> None:
    config = tiny_config(
        tmp_path, shapes, "trainer.precision=bf16-mixed", "trainer.accumulate=2", "schedule.ema=0.9",
        "model/head=vfnet", "schedule.epochs=1",
    )  # fmt: skip
    result = run(config)
    assert result["steps"] == 2 and result["status"] == "finished"
    state = load(tmp_path / config.run_name / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in state.values())


def test_fp16_on_a_cpu_is_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "data", "trainer.precision=16-mixed")
    with pytest.raises(ConfigError, match=r"16-mixed needs a GPU, and this run is on the CPU: set .*bf16-mixed"):
        make_trainer(config, tmp_path, loggers=[], callbacks=[], total_steps=1)


def test_accumulation_is_another_run() -> None:
    """Divisors and padding are those of a part, so the weights are others."""
    by_parts, whole = tiny_config("runs", "data", "trainer.accumulate=4"), tiny_config("runs", "data")
    assert by_parts.run_name != whole.run_name == tiny_config("runs", "data", "trainer.accumulate=1").run_name
