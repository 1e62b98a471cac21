"""Feature pyramid network with two extra levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FPN(nn.Module):
    """C3, C4, C5 -> P3..P7, all with `out_channels` channels.

    lateral_convs: three 1x1 convolutions of C3..C5. fpn_convs: five 3x3 convolutions, the last two of stride 2. The
    top-down way is nearest upsampling to the lateral's size and addition. All with bias, without norm or activation;
    xavier-uniform weights and zero biases at the start.
    Source: Lin et al., arXiv 1612.03144; P6 and P7 as in MMDetection.

    in_channels: of C3, C4 and C5. extra_convs: P6 is made of P5 ("on_output": FCOS, arXiv 1904.01355) or of C5
    ("on_input": RetinaNet, arXiv 1708.02002). relu_before_extra_convs: P7 is made of ReLU(P6), else of P6.
    Raises ValueError if in_channels are not three.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        *,
        extra_convs: str = "on_output",
        relu_before_extra_convs: bool = True,
    ) -> None:
        super().__init__()
        if len(in_channels) != 3:
            raise ValueError(f"in_channels must hold the channels of C3, C4 and C5, not {in_channels}.")
        self.on_input = extra_convs == "on_input"
        self.relu_before_p7 = relu_before_extra_convs
        self.lateral_convs = nn.ModuleList(nn.Conv2d(channels, out_channels, 1) for channels in in_channels)
        self.fpn_convs = nn.ModuleList(nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in range(3))
        for channels in (in_channels[-1] if self.on_input else out_channels, out_channels):
            self.fpn_convs.append(nn.Conv2d(channels, out_channels, 3, stride=2, padding=1))
        for module in (*self.lateral_convs, *self.fpn_convs):
            nn.init.xavier_uniform_(module.weight)  # pyright: ignore[reportArgumentType]
            nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """C3, C4, C5 as (N, C_i, H_i, W_i), of strides 8, 16, 32 -> P3..P7 (N, out_channels, H, W), strides 8..128."""
        merged = [conv(feature) for conv, feature in zip(self.lateral_convs, features, strict=True)]
        for i in (1, 0):
            merged[i] = merged[i] + F.interpolate(merged[i + 1], size=merged[i].shape[-2:], mode="nearest")
        p3, p4, p5 = (conv(feature) for conv, feature in zip(self.fpn_convs[:3], merged, strict=True))
        p6 = self.fpn_convs[3](_divisible(features[-1] if self.on_input else p5))
        p7 = self.fpn_convs[4](_divisible(F.relu(p6) if self.relu_before_p7 else p6))
        return [p3, p4, p5, p6, p7]


def _divisible(level: Tensor) -> Tensor:
    """The map that a convolution of stride 2 takes: itself, or a single cell with the zeros of its padding."""
    # Of a single cell, oneDNN in torch 2.14 leaves the outer taps of the weight's bfloat16 gradient unset.
    if torch.is_autocast_enabled("cpu") and level.shape[-2:] == (1, 1):
        return F.pad(level, (0, 1, 0, 1))
    return level
