"""P6: VFNet's star convolution by gathers against torchvision's deform_conv2d, forward and backward.

    python -m benchmarks.star_convolution

256 channels on a map of 40 x 56 cells, one image; output and all gradients are compared, relative to the largest value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torchvision.ops import deform_conv2d

from benchmarks.compare import MANY, Row, faster, interleaved, relative_difference, run
from msil.detection.starconv import gathered_conv

Convolution = Callable[[Tensor, Tensor, Tensor], Tensor]


def operator(features: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    return deform_conv2d(features, offsets, weight, padding=(1, 1))


def step(convolution: Convolution, inputs: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """The output, and the gradients by features, offsets and weight."""
    out = convolution(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, gradient)]


def check(convolution: Convolution, inputs: list[Tensor], gradient: Tensor) -> str:
    pairs = zip(step(convolution, inputs, gradient), step(operator, inputs, gradient), strict=True)
    worst = max(relative_difference(mine, other) for mine, other in pairs)
    assert worst < 1e-5, worst
    return f"output and gradients to {worst:.0e}"


def measure() -> Iterator[Row]:
    torch.manual_seed(0)
    features = torch.randn(1, 256, 40, 56).contiguous(memory_format=torch.channels_last)
    tensors = [features, 3 * torch.randn(1, 18, 40, 56), 0.05 * torch.randn(256, 256, 3, 3)]
    inputs, gradient = [tensor.requires_grad_() for tensor in tensors], torch.randn(1, 256, 40, 56)
    ways = {"eager": gathered_conv, "compiled": torch.compile(gathered_conv)}
    agreements = [check(way, inputs, gradient) for way in ways.values()]
    seconds = interleaved(
        {name: partial(step, way, inputs, gradient) for name, way in {**ways, "anchor": operator}.items()},
        repeats=MANY,
    )
    for way, goal, agreement in zip(ways, (2.5, 4.5), agreements, strict=True):
        yield faster(f"P6 star convolution, {way}", seconds[way], seconds["anchor"], goal, agreement)


if __name__ == "__main__":
    run(measure, __doc__)
