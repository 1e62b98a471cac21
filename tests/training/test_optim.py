"""Parameter groups and learning-rate curves, held to the reference's (golden/misc.json) and to arithmetic by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from msil.detection import FCOSHead, VFNetHead
from msil.detection.weights import from_mmdet
from msil.training.optim import parameter_groups, warmup_factor_at

from .cases import module_of, tiny_config

RECIPE = {"lr": 0.01, "weight_decay": 1e-4, "bias_lr_factor": 2.0, "bias_weight_decay": 0.0}


def rates(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Parameter name -> (lr, weight decay); every trainable parameter is in exactly one group."""
    found: dict[int, tuple[float, float]] = {}
    for group in groups:
        for parameter in group["params"]:
            assert id(parameter) not in found
            found[id(parameter)] = (group["lr"], group["weight_decay"])
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found.keys() == {id(parameter) for parameter in trainable.values()}
    return {name: found[id(parameter)] for name, parameter in trainable.items()}


@pytest.mark.parametrize(("name", "head"), [("fcos_tricks", FCOSHead), ("vfnet", VFNetHead)])
def test_every_parameter_has_the_reference_s_lr_and_weight_decay(golden: Any, name: str, head: Any) -> None:
    expected = golden.misc()["lr_and_weight_decay"][name]
    # Their names become ours by carrying the two numbers as a tensor through the key map; the five scales of the
    # levels, which are one parameter of ours, all have one lr and decay.
    renamed = from_mmdet({key: torch.tensor(pair, dtype=torch.float64) for key, pair in expected.items()})
    net = head(80, 256)
    ours = rates(net, parameter_groups(net, **RECIPE))
    assert ours.keys() == renamed.keys()
    for key, pairs in renamed.items():
        assert {tuple(pair) for pair in pairs.reshape(-1, 2).tolist()} == {ours[key]}, key


# The published recipes with 16 images a step as the configs give them: the lr of every early step and of every epoch.
@pytest.mark.parametrize(("name", "head"), [("fcos_tricks", "fcos"), ("vfnet", "vfnet")])
def test_the_whole_1x_recipe_is_the_reference_s(golden: Any, name: str, head: str) -> None:
    overrides = ("data.batch_size=16", "schedule=1x", "model.channels=16", f"model/head={head}")
    overrides += ("schedule.epochs=12", "schedule.warmup_steps=500", "model/backbone=resnet10")
    module = module_of(tiny_config("runs", "data", *overrides), steps_per_epoch=1000)
    for step, expected in golden.misc()["warmup_lr"][name].items():
        assert 0.01 * module.lr_factor(int(step)) == pytest.approx(expected, rel=1e-12), step
    last_steps = [0.01 * module.lr_factor(1000 * epoch + 999) for epoch in range(12)]
    assert last_steps == pytest.approx(golden.misc()["epoch_lr"], rel=1e-12)
    groups = module.configure_optimizers()["optimizer"].param_groups
    # initial_lr: before the warm-up's factor
    assert {(group["initial_lr"], group["weight_decay"]) for group in groups} == {
        tuple(pair) for pair in golden.misc()["lr_and_weight_decay"][name].values()
    }


def test_norms_of_every_kind_and_frozen_parameters() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    model[3].requires_grad_(False)
    assert rates(model, parameter_groups(model, **RECIPE)) == {
        "0.weight": (0.01, 1e-4),
        "0.bias": (0.02, 0.0),
        "1.weight": (0.01, 1e-4),
        "1.bias": (0.01, 0.0),
        "2.weight": (0.01, 1e-4),
        "2.bias": (0.01, 0.0),
    }


@pytest.mark.parametrize(("steps", "factors"), [(0, [1, 1, 1]), (1, [1, 1, 1]), (2, [0.1, 1, 1])])
def test_the_shortest_warm_ups(steps: int, factors: list[float]) -> None:
    assert [warmup_factor_at(step, warmup_steps=steps, warmup_factor=0.1) for step in range(3)] == factors


# What the module makes of them


def optimizer_of(*overrides: str, **settings: Any) -> tuple[torch.optim.Optimizer, Any]:
    configured = module_of(tiny_config("runs", "data", *overrides), **settings).configure_optimizers()
    return configured["optimizer"], configured["lr_scheduler"]


@pytest.mark.parametrize(("batch_size", "lr"), [(16, 0.01), (8, 0.005), (32, 0.02)])
def test_the_lr_is_proportional_to_the_images_a_step(batch_size: int, lr: float) -> None:
    settings = ("schedule=1x", "model/backbone=resnet10", "model.channels=16", "schedule.warmup_steps=0")
    optimizer, _ = optimizer_of(*settings, f"data.batch_size={batch_size}")
    assert isinstance(optimizer, torch.optim.SGD)
    first = optimizer.param_groups[0]  # that of plain weights, whose lr is logged
    assert (first["lr"], first["weight_decay"], first["momentum"]) == (pytest.approx(lr), 1e-4, 0.9)
    assert {group["lr"] / first["lr"] for group in optimizer.param_groups} == {1, 2}


def test_without_base_batch_size_the_lr_is_as_given() -> None:
    for batch_size in (4, 8):
        optimizer, _ = optimizer_of("schedule.warmup_steps=0", f"data.batch_size={batch_size}")
        assert isinstance(optimizer, torch.optim.AdamW)
        assert {group["lr"] for group in optimizer.param_groups} == {0.002}
        assert optimizer.param_groups[0]["weight_decay"] == 0.05
        assert optimizer.param_groups[1]["weight_decay"] == 0


def test_the_curve_is_walked_by_step_and_drops_after_whole_epochs() -> None:
    # 3 steps an epoch, 4 epochs, drops after epochs 2 and 3, i.e. before steps 6 and 9; warm-up over steps 0..2.
    optimizer, scheduler = optimizer_of(
        "schedule.optimizer=sgd", "schedule.lr=1", "schedule.decay=step", "schedule.milestones=[2,3]",
        "schedule.epochs=4", "schedule.warmup_steps=3", "schedule.warmup_factor=0.5", steps_per_epoch=3,
    )  # fmt: skip
    assert scheduler["interval"] == "step"
    seen = []
    for _ in range(12):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler["scheduler"].step()
    assert seen == pytest.approx([0.5, 0.75, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01])


def test_a_training_cut_short_has_the_whole_cosine() -> None:
    overrides = ("schedule.epochs=5", "schedule.max_steps=8", "schedule.warmup_steps=0")
    module = module_of(tiny_config("runs", "data", *overrides), steps_per_epoch=10)
    assert module.total_steps == 8
    assert module.lr_factor(4) == pytest.approx(0.5)
    assert module.lr_factor(6) == pytest.approx(0.5 * (1 - math.sqrt(0.5)))  # cos(3 pi / 4) = -sqrt(1/2)
