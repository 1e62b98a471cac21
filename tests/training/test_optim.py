"""Parameter groups and learning-rate curves, held to the reference's (golden/misc.json) and to arithmetic by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from msil.detection import FCOSHead, VFNetHead
from msil.detection.weights import from_mmdet
from msil.training.module import DetectionModule
from msil.training.optim import parameter_groups

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


def test_the_biases_of_every_norm_learn_at_the_plain_lr() -> None:
    norms = (nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.BatchNorm1d(4), nn.InstanceNorm2d(4, affine=True))
    net = nn.Sequential(nn.Linear(4, 4), *norms)
    plain, bias = (0.01, 1e-4), (0.01, 0.0)
    expected = {"0.weight": plain, "0.bias": (0.02, 0.0)}
    expected |= {f"{i}.{name}": pair for i in range(1, 5) for name, pair in (("weight", plain), ("bias", bias))}
    assert rates(net, parameter_groups(net, **RECIPE)) == expected


def test_the_backbone_has_a_factor_of_its_own() -> None:
    overrides = ("schedule.backbone_lr_factor=0.1", "schedule.bias_lr_factor=2")
    module = module_of(tiny_config("runs", "data", *overrides), steps_per_epoch=10)
    lr, decay, bias_decay = (getattr(module.schedule, name) for name in ("lr", "weight_decay", "bias_weight_decay"))
    groups = module.configure_optimizers()["optimizer"].param_groups
    assert (groups[0]["initial_lr"], groups[0]["weight_decay"]) == (lr, decay)  # its lr is the one that is logged
    named = {id(parameter): name for name, parameter in module.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            name = named[id(parameter)]
            factor = 0.1 if ".backbone." in name else 1.0
            if name.endswith(".bias") and not isinstance(module.get_submodule(name[:-5]), nn.GroupNorm):
                factor *= 2
            assert group["initial_lr"] == pytest.approx(factor * lr), name
            assert group["weight_decay"] == (bias_decay if name.endswith(".bias") else decay)


# The published recipes with 16 images a step as the configs give them: the lr of every early step and of every epoch.
@pytest.mark.parametrize(
    ("name", "head"),
    [("fcos", "fcos_plain"), ("fcos_tricks", "fcos"), ("vfnet", "vfnet"), ("atss_gfl_tood_retina", "gfl")],
)
def test_the_whole_1x_recipe_is_the_reference_s(golden: Any, name: str, head: str) -> None:
    overrides = ("data.batch_size=16", "schedule=1x", "model.channels=16", f"model/head={head}")
    overrides += ("schedule.epochs=12", "schedule.warmup_steps=500", "model/backbone=resnet10")
    module = module_of(tiny_config("runs", "data", *overrides), steps_per_epoch=1000)
    for step, expected in golden.misc()["warmup_lr"][name].items():
        assert 0.01 * module.lr_factor(int(step)) == pytest.approx(expected, rel=1e-12), step
    last_steps = [0.01 * module.lr_factor(1000 * epoch + 999) for epoch in range(12)]
    assert last_steps == pytest.approx(golden.misc()["epoch_lr"], rel=1e-12)
    assert module.schedule.grad_clip == (35 if name == "fcos" else None)
    if name not in golden.misc()["lr_and_weight_decay"]:
        return
    groups = module.configure_optimizers()["optimizer"].param_groups
    # initial_lr: before the warm-up's factor
    assert {(group["initial_lr"], group["weight_decay"]) for group in groups} == {
        tuple(pair) for pair in golden.misc()["lr_and_weight_decay"][name].values()
    }


# What the module makes of them


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a trainer, that says what it is on."""
    monkeypatch.setattr(DetectionModule, "fused", None)


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


def test_a_training_cut_short_has_the_whole_cosine() -> None:
    overrides = ("schedule.epochs=5", "schedule.max_steps=8", "schedule.warmup_steps=0")
    module = module_of(tiny_config("runs", "data", *overrides), steps_per_epoch=10)
    assert module.total_steps == 8
    assert module.lr_factor(4) == pytest.approx(0.5)
    assert module.lr_factor(6) == pytest.approx(0.5 * (1 - math.sqrt(0.5)))  # cos(3 pi / 4) = -sqrt(1/2)
