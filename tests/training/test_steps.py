"""Accumulation, clipping and mixed precision: a step by them is the step that they promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from msil.config import Config
from msil.data.sampler import TrainingBatches
from msil.errors import ConfigError
from msil.training.build import data_of, make_trainer
from msil.training.experiment import run

from .cases import folder, last, module_of, tiny_config
from .one_step import assert_same_gradients, batch_of, one_step

HEADS = ("fcos", "vfnet")


def config_of(*overrides: str) -> Config:
    return tiny_config("runs", "data", "schedule.grad_clip=null", *overrides)


@pytest.mark.parametrize("head", HEADS)
def test_accumulated_batches_make_the_mean_of_their_losses(tmp_path: Path, head: str) -> None:
    """In one step, whose logged losses are those means; torch alone says what they and the gradients are."""
    batch = batch_of((3, 1, 0, 4))
    step = one_step(config_of(f"model/head={head}", "trainer.accumulate=2"), batch, tmp_path)
    module = module_of(config_of(f"model/head={head}"))
    expected: dict[str, Tensor] = {}
    for part in (slice(0, 2), slice(2, 4)):
        for name, loss in module.detector.loss(batch[0][part], batch[1][part]).items():
            expected[name] = expected.get(name, torch.zeros(())) + loss / 2
    total = torch.stack(list(expected.values())).sum()
    assert step.logged == pytest.approx({"loss": total.item(), **{n: v.item() for n, v in expected.items()}}, rel=1e-6)
    total.backward()
    own = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert_same_gradients(step.gradients, own)


def test_a_step_sees_the_same_images_in_fewer_at_a_time(shapes: Path) -> None:
    """On two processes: rank 0's images of a step, in two batches of one."""
    batches = {
        parts: list(
            TrainingBatches(range(10), [False] * 10, batch_size=4, seed=0, rank=0, world_size=2, accumulate=parts)
        )
        for parts in (1, 2)
    }
    assert [len(batch) for batch in batches[1]] == [2, 2, 2] and [len(batch) for batch in batches[2]] == [1] * 6
    assert [key for batch in batches[1] for key in batch] == [key for batch in batches[2] for key in batch]
    data = data_of(tiny_config("runs", shapes, "trainer.accumulate=3"))
    with pytest.raises(ConfigError, match=r"batch_size=4 .* trainer\.accumulate=3 batches; make it a multiple of 3"):
        data.train_dataloader()


def test_an_accumulated_run_takes_as_many_steps(tmp_path: Path, shapes: Path) -> None:
    config = tiny_config(
        tmp_path, shapes, "trainer.precision=bf16-mixed", "trainer.accumulate=2", "schedule.ema=0.9",
        "model/head=vfnet", "schedule.epochs=1",
    )  # fmt: skip
    whole = tiny_config(tmp_path, shapes, "schedule.epochs=1", "model/head=vfnet")
    assert run(config)["steps"] == 4 and folder(config) != folder(whole)  # accumulation is another run
    state = last(config)["state_dict"]
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in state.values())


@pytest.mark.parametrize("parts", [1, 2])
def test_the_gradient_is_clipped_to_the_limit(tmp_path: Path, parts: int) -> None:
    """All gradients by one factor, so that their L2 norm is the limit; that of the whole step, not of a part."""
    config = tiny_config("runs", "data", "schedule.grad_clip=0.25", f"trainer.accumulate={parts}")
    batch = batch_of((3, 1, 0, 4))
    step = one_step(config, batch, tmp_path)
    norm = sum(float(gradient.double().square().sum()) for gradient in step.gradients.values()) ** 0.5
    assert norm > 1
    for name, gradient in step.gradients.items():
        torch.testing.assert_close(step.clipped[name], gradient * (0.25 / norm), rtol=1e-4, atol=1e-9)
    free = one_step(tiny_config("runs", "data", "schedule.grad_clip=1e6"), batch, tmp_path)
    assert all(torch.equal(free.clipped[name], gradient) for name, gradient in free.gradients.items())


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
def test_bf16_mixed(tmp_path: Path, head: str) -> None:
    """Convolutions in bfloat16; the loss, weights, gradients and the optimizer's moments in float32.

    bfloat16 rounds to 8 bits, 0.2 % at most. One path from image to loss has some twenty roundings one after the
    other, 4 % if all went one way.
    """
    config = config_of(f"model/head={head}")
    batch = batch_of((3, 1, 0, 4))
    full, mixed = Types(), Types()
    expected = one_step(config, batch, tmp_path, full)
    step = one_step(config, batch, tmp_path, mixed, precision="bf16-mixed")
    assert full.convolutions == full.others == mixed.others == {torch.float32}
    assert mixed.convolutions == {torch.bfloat16}
    assert step.logged == pytest.approx(expected.logged, rel=0.04)
    assert step.logged != pytest.approx(expected.logged, rel=1e-6)


def test_fp16_on_a_cpu_is_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "data", "trainer.precision=16-mixed")
    with pytest.raises(ConfigError, match=r"16-mixed needs a GPU, and this run is on the CPU: set .*bf16-mixed"):
        make_trainer(config, tmp_path)
