"""GroupNorm and ReLU as one operator on a GPU, in the precision of the map. Off, unless MSIL_FUSED_NORM=1 is in the
environment, until it has been measured.

Under autocast PyTorch's GroupNorm takes float32 in contiguous memory: behind a convolution in bfloat16 and channels
last stand a cast, a change of layout, the norm, the ReLU, and both changes back.

N images, C channels, G groups, H x W cells.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ENABLED = os.environ.get("MSIL_FUSED_NORM") == "1" and importlib.util.find_spec("triton") is not None
MOST_CHANNELS = 1024  # a kernel holds all of a cell


def group_norm_relu(features: Tensor, norm: nn.GroupNorm) -> Tensor:
    """relu(norm(features)) of (N, C, H, W), by the fused operator where it is enabled and can do it."""
    if ENABLED and _fits(features):
        return fused_norm_relu(features, norm.weight, norm.bias, norm.num_groups, norm.eps)[0]
    return F.relu(norm(features))


def _fits(features: Tensor) -> bool:
    channels = features.shape[1]
    return (
        features.is_cuda
        and features.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and features.is_contiguous(memory_format=torch.channels_last)
        and channels <= MOST_CHANNELS
        and channels.bit_count() == 1  # a power of two
        and not torch.compiler.is_exporting()
    )


@torch.library.custom_op("msil::group_norm_relu", mutates_args=())
def fused_norm_relu(
    features: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """features (N, C, H, W) in channels-last memory -> relu(group_norm(features)) of the same type and layout, and mean
    and 1 / deviation of each group (N, G) float32, for the backward pass."""
    from msil.detection import triton_norm  # late: triton is not everywhere

    return triton_norm.forward(features, weight, bias, groups, eps)


@torch.library.custom_op("msil::group_norm_relu_backward", mutates_args=())
def fused_norm_relu_backward(
    grad: Tensor, features: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of features, weight and bias."""
    from msil.detection import triton_norm

    return triton_norm.backward(grad, features, weight, bias, mean, rstd)


@fused_norm_relu.register_fake
def _(features: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = features.new_empty((2, len(features), groups), dtype=torch.float32).unbind()
    return torch.empty_like(features), torch.empty_like(mean), torch.empty_like(rstd)


@fused_norm_relu_backward.register_fake
def _(
    grad: Tensor, features: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(features), torch.empty_like(weight), torch.empty_like(bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3], *output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return (*fused_norm_relu_backward(grad, *ctx.saved_tensors), None, None)


fused_norm_relu.register_autograd(_backward, setup_context=_save)
