"""What heads are made of: a tower's layer, a predictor, and their weights at the start."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """Also of one value a group, as 32 channels in 32 groups have in a level of one cell, which PyTorch's refuses: what
    is left is the bias."""

    def forward(self, features: Tensor) -> Tensor:
        return torch.group_norm(features, self.num_groups, self.weight, self.bias, self.eps)


class ConvNormAct(nn.Module):
    """conv 3x3 + GroupNorm + ReLU, C -> C; norm_groups None: without norm."""

    def __init__(self, channels: int, norm_groups: int | None, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.norm = nn.Identity() if norm_groups is None else GroupNorm(norm_groups, channels)
        self.act = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(features)))


def predictor(channels: int, out_channels: int) -> nn.Conv2d:
    """A 3x3 convolution with bias."""
    return nn.Conv2d(channels, out_channels, 3, padding=1)


def init_normal(module: nn.Module, std: float = 0.01) -> None:
    """N(0, std) weights and zero biases for every convolution below `module`."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.normal_(child.weight, std=std)
            if child.bias is not None:
                nn.init.zeros_(child.bias)


def init_he(module: nn.Module) -> None:
    """He's rule for ReLU (arXiv 1502.01852) for every convolution below `module` with a norm behind it, or the place of
    one.

    The norm makes its output the same for weights of any scale, but a step of Adam's, about as large as the learning
    rate, turns small weights much further than large ones.
    """
    for child in module.modules():
        layers = list(child.children())[:2]
        if len(layers) == 2 and isinstance(layers[0], nn.Conv2d) and isinstance(layers[1], nn.GroupNorm | nn.Identity):
            nn.init.kaiming_normal_(layers[0].weight, nonlinearity="relu")


def init_prior(classifier: nn.Module) -> None:
    """The bias that makes every class's probability 0.01 at the start (arXiv 1708.02002, section 4.1)."""
    assert isinstance(classifier, nn.Conv2d) and classifier.bias is not None
    nn.init.constant_(classifier.bias, -math.log((1 - 0.01) / 0.01))
