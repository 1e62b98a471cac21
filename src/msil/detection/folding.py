"""Frozen norms computed inside the convolutions before them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops import FrozenBatchNorm2d


class FoldedConv2d(nn.Conv2d):
    """A convolution without bias and the frozen norm behind it in one: the norm scales the weight and is the bias.

    Equal up to rounding, gradients included. The weight is scaled in every forward pass, so that it is trained, loaded
    and averaged under its own name; or once, by `keep_folded`.
    """

    norm: tuple[FoldedNorm | FoldedBatchNorm2d]  # a tuple, so that it is not registered a second time
    folded_weight: Tensor | None
    folded_bias: Tensor | None
    pad: Callable[[Tensor], Tensor] | None = None  # before it, if its padding depends on the input's size

    def forward(self, features: Tensor) -> Tensor:
        weight, bias = self.folded_weight, self.folded_bias
        if weight is None or torch.is_grad_enabled():
            weight, bias = self.folded()
        features = features if self.pad is None else self.pad(features)
        return F.conv2d(features, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of both."""
        (norm,) = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return self.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale

    def train(self, mode: bool = True) -> Self:
        if mode:
            self.folded_weight = self.folded_bias = None
        return super().train(mode)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.folded_weight = self.folded_bias = None
        super()._load_from_state_dict(*arguments)


class FoldedNorm(FrozenBatchNorm2d):
    """A frozen norm that the convolution before it applies."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def forward(self, features: Tensor) -> Tensor:
        return features


class FoldedBatchNorm2d(nn.Module):
    """As FoldedNorm, for a BatchNorm2d, and for one of timm's with layers (dropout, activation) behind it.

    No BatchNorm, so that nothing that converts BatchNorms (SyncBatchNorm) takes it for one.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    eps: float

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.children():
            features = layer(features)
        return features


def fold_norms(net: resnet.ResNet) -> None:
    """Fold the frozen norms of a torchvision ResNet into its convolutions, in place; the state dict stays the same."""
    for block in [net, *(m for m in net.modules() if isinstance(m, resnet.BasicBlock | resnet.Bottleneck))]:
        for number in (1, 2, 3):
            if hasattr(block, f"conv{number}"):
                fold(getattr(block, f"conv{number}"), getattr(block, f"bn{number}"))
        if getattr(block, "downsample", None) is not None:
            fold(*block.downsample)  # pyright: ignore[reportArgumentType, reportCallIssue]


def fold(conv: nn.Conv2d, norm: FrozenBatchNorm2d | nn.BatchNorm2d) -> None:
    """Let `conv` apply the frozen norm behind it. In place; the state dict stays the same."""
    for name in ("folded_weight", "folded_bias"):
        conv.register_buffer(name, None, persistent=False)
    # The same objects under new classes: weights, buffers and hooks stay what they are.
    conv.__class__, conv.norm = FoldedConv2d, (norm,)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    folded: Any = FoldedNorm if isinstance(norm, FrozenBatchNorm2d) else FoldedBatchNorm2d
    norm.__class__ = folded


@torch.no_grad()
def keep_folded(net: nn.Module) -> None:
    """Scale the weights before frozen norms once, in place of in every forward pass without gradients: for a net whose
    weights are final. Until `train()` or `load_state_dict()`; a weight that is changed by other means is not seen."""
    for module in net.modules():
        if isinstance(module, FoldedConv2d):
            module.folded_weight, module.folded_bias = module.folded()
