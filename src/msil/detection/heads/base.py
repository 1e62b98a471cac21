"""What dense heads share: two convolution towers, the MSIL seam behind them, and the flattening of levels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from msil.interaction import MSIL


class ConvNormAct(nn.Module):
    """conv 3x3 + GroupNorm + ReLU, C -> C."""

    def __init__(self, channels: int, norm_groups: int, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.norm = nn.GroupNorm(norm_groups, channels)
        self.act = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(features)))


class DenseHead(nn.Module):
    """A classification and a regression tower, shared by all levels, with MSIL between them and the predictors."""

    msil: nn.Module | None

    def __init__(self, channels: int, num_convs: int, norm_groups: int, conv_bias: bool) -> None:
        super().__init__()
        if channels % norm_groups:
            raise ValueError(f"channels ({channels}) must be a multiple of norm_groups ({norm_groups}).")
        self.cls_tower = nn.Sequential(*(ConvNormAct(channels, norm_groups, conv_bias) for _ in range(num_convs)))
        self.reg_tower = nn.Sequential(*(ConvNormAct(channels, norm_groups, conv_bias) for _ in range(num_convs)))

    def towers(self, pyramid: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Pyramid levels (N, C, H, W) -> cls_feats and reg_feats, the same shapes, behind the MSIL seam."""
        cls_feats, reg_feats = [], []
        for level in pyramid:
            cls_feat, reg_feat = self.cls_tower(level), self.reg_tower(level)
            if self.msil is not None:
                cls_feat, reg_feat = self.msil(cls_feat, reg_feat)
            cls_feats.append(cls_feat)
            reg_feats.append(reg_feat)
        return cls_feats, reg_feats


def build_msil(channels: int, msil: nn.Module | Mapping[str, Any] | None) -> nn.Module | None:
    """The seam's module: as given, made of MSIL's keyword arguments, or None where nothing is to be enhanced."""
    if isinstance(msil, Mapping):
        msil = MSIL(channels, **msil)
    elif msil is not None and not isinstance(msil, nn.Module):
        raise TypeError(f"msil must be a module, a dict of MSIL's keyword arguments or None, not {msil!r}.")
    if isinstance(msil, MSIL) and msil.channels != channels:
        raise ValueError(f"the MSIL block has {msil.channels} channels, the head {channels}.")
    if isinstance(msil, MSIL) and not (msil.to_cls or msil.to_reg):
        return None
    return msil


def flatten_levels(maps: list[Tensor]) -> Tensor:
    """Maps (N, C, H, W) of all levels -> (N, P, C), level by level, row-major."""
    return torch.cat([level.permute(0, 2, 3, 1).flatten(1, 2) for level in maps], dim=1)


def init_normal(module: nn.Module, std: float = 0.01) -> None:
    """N(0, std) weights and zero biases for every convolution below `module`."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.normal_(child.weight, std=std)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
