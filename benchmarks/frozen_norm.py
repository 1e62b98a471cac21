"""P13: frozen BatchNorm folded into the convolution, against convolution + torchvision's FrozenBatchNorm2d.

    python -m benchmarks.frozen_norm

A ResNet-50 with all its stages trained, forward and backward, batch 2 at 320 px, channels last. In float64 the outputs
and the gradients of all weights are compared first.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FrozenBatchNorm2d

from benchmarks.compare import Row, counted, faster, interleaved, relative_difference, run
from benchmarks.operators import Kernels
from msil.detection.backbone import ResNet


def nets() -> tuple[ResNet, nn.Module]:
    """Both with the same weights and the same statistics, which are neither 0 nor 1."""
    torch.manual_seed(0)
    theirs = resnet50(norm_layer=FrozenBatchNorm2d)
    for module in theirs.modules():
        if isinstance(module, FrozenBatchNorm2d):
            for name, buffer in module.named_buffers():
                buffer.uniform_(0.7, 1.1) if name in ("weight", "running_var") else buffer.normal_(0, 0.1)
    ours = ResNet("resnet50", norm="frozen_bn", frozen_stages=0)
    ours.load_state_dict({name: value for name, value in theirs.state_dict().items() if not name.startswith("fc.")})
    body = IntermediateLayerGetter(theirs, {"layer2": "0", "layer3": "1", "layer4": "2"})
    return ours, body


def step(net: nn.Module, images: Tensor) -> list[Tensor]:
    """C3, C4 and C5, and the gradients of their sum by all weights."""
    found = net(images)
    maps = list(found.values()) if isinstance(found, dict) else found
    total = torch.stack([level.mean() for level in maps]).sum()
    return [*maps, *torch.autograd.grad(total, list(net.parameters()))]


def measure() -> Iterator[Row]:
    ours, theirs = nets()
    small = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    pairs = zip(step(ours.double(), small), step(theirs.double(), small), strict=True)
    worst = max(relative_difference(a.detach(), b.detach()) for a, b in pairs)
    assert worst < 1e-12, worst
    agreement = f"float64: outputs, gradients to {worst:.0e}"
    images = torch.randn(2, 3, 320, 320).contiguous(memory_format=torch.channels_last)
    for net in (ours, theirs):
        net.float().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    counts = []
    for net in (ours, theirs):
        with Kernels() as kernels:
            step(net, images)
        counts.append(kernels.count)
    seconds = interleaved({"ours": partial(step, ours, images), "anchor": partial(step, theirs, images)})
    yield faster("P13 frozen norm folded, ResNet-50 step", seconds["ours"], seconds["anchor"], 1.0, agreement)
    yield counted("P13 kernels of that step", counts[0], counts[1], counts[1], "counted in the same steps")


if __name__ == "__main__":
    run(measure, __doc__)
