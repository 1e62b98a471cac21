"""The kernels of msil.detection.fused_norm: two passes over a map forward, two backward.

Maps are (N, C, H, W) in channels-last memory, C a power of two, of any float type; sums are taken in float32. Both
kernels do two things, so that each is compiled for one of them: BACKWARD says which.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16  # cells that a program of `_sums` takes at a time,
TURNS = 16  # and how often
SCALED_ROWS = 32  # cells that a program of `_scaled` takes


@triton.jit
def _sums(
    x, dy, a, b, out, rows, C: tl.constexpr, ROWS: tl.constexpr, TURNS: tl.constexpr, BACKWARD: tl.constexpr
):  # fmt: skip
    """Of each channel of an image, over a chunk of its cells: the sums of x and x * x, or of dy and dy * x where the
    ReLU let x * a + b through."""
    image, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    c = tl.arange(0, C)
    first, second = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    if BACKWARD:
        scale, shift = tl.load(a + image * C + c), tl.load(b + image * C + c)
    for turn in range(TURNS):
        r = (chunk * TURNS + turn) * ROWS + tl.arange(0, ROWS)
        at = (image.to(tl.int64) * rows + r[:, None]) * C + c[None, :]
        there = r[:, None] < rows
        value = tl.load(x + at, there, 0.0).to(tl.float32)
        if BACKWARD:
            grad = tl.load(dy + at, there, 0.0).to(tl.float32)
            grad = tl.where(value * scale[None, :] + shift[None, :] > 0, grad, 0.0)
            first += tl.sum(grad, 0)
            second += tl.sum(grad * value, 0)
        else:
            first += tl.sum(value, 0)
            second += tl.sum(value * value, 0)
    place = out + (image * chunks + chunk) * 2 * C + c
    tl.store(place, first)
    tl.store(place + C, second)


@triton.jit
def _scaled(x, dy, a, b, c2, c3, out, rows, C: tl.constexpr, ROWS: tl.constexpr, BACKWARD: tl.constexpr):
    """relu(x * a + b), or a * dy + c2 * x + c3 with dy where the ReLU let it through."""
    image, block = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, C)
    r = block * ROWS + tl.arange(0, ROWS)
    at = (image.to(tl.int64) * rows + r[:, None]) * C + c[None, :]
    there = r[:, None] < rows
    value = tl.load(x + at, there, 0.0).to(tl.float32)
    scale = tl.load(a + image * C + c)[None, :]
    result = value * scale + tl.load(b + image * C + c)[None, :]
    if BACKWARD:
        grad = tl.load(dy + at, there, 0.0).to(tl.float32)
        grad = tl.where(result > 0, grad, 0.0)
        result = grad * scale + value * tl.load(c2 + image * C + c)[None, :]
        result += tl.load(c3 + image * C + c)[None, :]
    else:
        result = tl.maximum(result, 0.0)
    tl.store(out + at, result.to(out.dtype.element_ty), there)


def forward(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """relu(group_norm(x)) like x; mean and 1 / deviation of each group (N, G) float32."""
    count = x[0].numel() // groups
    sums = _launch_sums(x, x, x, x, backward=False).unflatten(2, (groups, -1)).sum(-1)  # (N, 2, G)
    mean = sums[:, 0] / count
    rstd = (sums[:, 1] / count - mean.square()).clamp(min=0).add(eps).rsqrt()
    a, b = _scale_and_shift(weight, bias, mean, rstd)
    return _launch_scaled(x, x, a, b, a, a, backward=False), mean, rstd


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias."""
    groups, count = mean.shape[1], x[0].numel() // mean.shape[1]
    a, b = _scale_and_shift(weight, bias, mean, rstd)
    dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
    of_dy, of_both = _launch_sums(x, dy, a, b, backward=True).unflatten(2, (groups, -1)).unbind(1)  # (N, G, C / G)
    of_both = (of_both - mean[..., None] * of_dy) * rstd[..., None]  # with x normalised
    by_group = weight.float().view(groups, -1)
    c2 = -rstd.square() * (by_group * of_both).sum(-1) / count  # (N, G)
    c3 = -rstd * (by_group * of_dy).sum(-1) / count - c2 * mean
    wide = [values[..., None].expand_as(of_dy).flatten(1) for values in (c2, c3)]
    dx = _launch_scaled(x, dy, a, b, *wide, backward=True)
    return dx, of_both.sum(0).flatten().to(weight.dtype), of_dy.sum(0).flatten().to(bias.dtype)


def _scale_and_shift(weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """The norm as x * a + b, (N, C) float32 each."""
    a = rstd[..., None] * weight.float().view(mean.shape[1], -1)
    b = bias.float().view(mean.shape[1], -1) - mean[..., None] * a
    return a.flatten(1), b.flatten(1)


def _launch_sums(x: Tensor, dy: Tensor, a: Tensor, b: Tensor, *, backward: bool) -> Tensor:
    """(N, 2, C) float32."""
    images, channels, height, width = x.shape
    chunks = triton.cdiv(height * width, ROWS * TURNS)
    out = torch.empty((images, chunks, 2, channels), dtype=torch.float32, device=x.device)
    constants: Any = {"C": channels, "ROWS": ROWS, "TURNS": TURNS, "BACKWARD": backward}
    _sums[(images, chunks)](x, dy, a, b, out, height * width, **constants)
    return out.sum(1)


def _launch_scaled(x: Tensor, dy: Tensor, a: Tensor, b: Tensor, c2: Tensor, c3: Tensor, *, backward: bool) -> Tensor:
    images, channels, height, width = x.shape
    out = torch.empty_like(x)
    grid = (images, triton.cdiv(height * width, SCALED_ROWS))
    constants: Any = {"C": channels, "ROWS": SCALED_ROWS, "BACKWARD": backward}
    _scaled[grid](x, dy, a, b, c2, c3, out, height * width, **constants)
    return out
