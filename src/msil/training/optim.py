"""Parameter groups of the recipes (section 4 of the paper, MMDetection's configs)."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

NORMS = (nn.GroupNorm, nn.LayerNorm, _BatchNorm, _InstanceNorm)


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    bias_lr_factor: float,
    bias_weight_decay: float,
    slower: nn.Module | None = None,
    slower_factor: float = 1.0,
) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters.

    Biases outside norm layers learn at lr * bias_lr_factor; every bias, those of norms too, decays by
    bias_weight_decay; all else (weights, norm weights, scales) has lr and weight_decay. The lr of all parameters of
    `slower`, a part of the model, is multiplied by slower_factor.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    inside = set() if slower is None else set(slower.modules())
    for module in model.modules():
        rate = lr * slower_factor if module in inside else lr
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            is_bias = name == "bias"
            is_norm = isinstance(module, NORMS)
            key = (
                rate * bias_lr_factor if is_bias and not is_norm else rate,
                bias_weight_decay if is_bias else weight_decay,
            )
            groups.setdefault(key, []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]
