"""Frozen BatchNorm inside the convolution before it: scaling what it gives is scaling its weight."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops import FrozenBatchNorm2d


class FoldedConv2d(nn.Conv2d):
    """A convolution without bias that applies the frozen norm behind it as well, by its weight and a bias.

    Exact, gradients of the weight included, but for the order of roundings. The product is formed in every forward
    pass: the weight is trained, loaded and averaged under its own name.
    """

    norm: tuple[FoldedNorm]  # a tuple, so that it is not registered a second time

    def forward(self, features: Tensor) -> Tensor:
        (norm,) = self.norm
        scale, bias = norm.scale_and_bias()
        weight = self.weight * scale[:, None, None, None]
        return F.conv2d(features, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class FoldedNorm(FrozenBatchNorm2d):
    """A frozen norm that the convolution before it has applied already."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def scale_and_bias(self) -> tuple[Tensor, Tensor]:
        """What the norm multiplies each channel by, and what it then adds, (C,) each."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, features: Tensor) -> Tensor:
        return features


def fold_norms(net: resnet.ResNet) -> None:
    """Lets the convolutions of a torchvision ResNet with FrozenBatchNorm2d apply their norms.

    In place; the modules' names and the state dict stay as they are.
    """
    for block in [net, *(m for m in net.modules() if isinstance(m, resnet.BasicBlock | resnet.Bottleneck))]:
        for number in (1, 2, 3):
            if hasattr(block, f"conv{number}"):
                _fold(getattr(block, f"conv{number}"), getattr(block, f"bn{number}"))
        if getattr(block, "downsample", None) is not None:
            _fold(*block.downsample)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _fold(conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> None:
    # The same objects under new classes: weights, buffers and hooks stay what they are.
    conv.__class__, norm.__class__ = FoldedConv2d, FoldedNorm
    conv.norm = (norm,)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
