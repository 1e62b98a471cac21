"""Four ways to a cheaper net on the CPU that were measured and not taken, against what msil does.

    python -m benchmarks.ways_not_taken

1. The first layers of both towers, here of two, as one convolution of double width. 2. All pyramid levels in one
canvas, a row of zeros between them. 3. The folded weights of frozen stages kept in training. 4. Folded weights in
oneDNN's own layout.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.compare import Row, faster, interleaved, relative_difference, run
from msil.detection.backbone import ResNet
from msil.detection.folding import FoldedConv2d, keep_folded
from msil.detection.timm_backbone import TimmBackbone

GROUPS = 32
TOWERS = {  # channels, images, sides of the levels
    "64 ch, 4 of 128x128": (64, 4, [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]),
    "64 ch, 8 of 192x256": (64, 8, [(24, 32), (12, 16), (6, 8), (3, 4), (2, 2)]),
    "256 ch, 2 of 608x800": (256, 2, [(76, 100), (38, 50), (19, 25), (10, 13), (5, 7)]),
}
NHWC = torch.channels_last


def tower_rows(name: str, channels: int, images: int, sides: list[tuple[int, int]]) -> Iterator[Row]:
    levels = [torch.randn(images, channels, *side).contiguous(memory_format=NHWC).requires_grad_() for side in sides]
    convs = [
        (0.03 * torch.randn(channels, channels, 3, 3)).contiguous(memory_format=NHWC).requires_grad_() for _ in "cr"
    ]
    norms = [torch.rand(channels, requires_grad=True) for _ in "cr"]

    def layer(features: Tensor, groups: int, norm: Tensor) -> Tensor:
        return F.relu(F.group_norm(features, groups, norm))

    def apart() -> list[Tensor]:
        return [
            layer(F.conv2d(level, conv, padding=1), GROUPS, norm)
            for level in levels
            for conv, norm in zip(convs, norms, strict=True)
        ]

    def as_one() -> list[Tensor]:
        conv, norm = torch.cat(convs), torch.cat(norms)
        both = [layer(F.conv2d(level, conv, padding=1), 2 * GROUPS, norm) for level in levels]
        return [half for one in both for half in one.split(channels, dim=1)]

    def canvas() -> list[Tensor]:
        width = max(side[1] for side in sides) + 1
        whole = torch.cat([F.pad(level, (0, width - level.shape[3], 0, 1)) for level in levels], dim=2)
        features = [F.conv2d(whole, conv, padding=1) for conv in convs]
        found, top = [], 0
        for height, wide in sides:
            parts = [one[:, :, top : top + height, :wide].contiguous(memory_format=NHWC) for one in features]
            found += [layer(part, GROUPS, norm) for part, norm in zip(parts, norms, strict=True)]
            top += height + 1
        return found

    gradients = [torch.randn_like(one) for one in apart()]

    def step(way: Callable[[], list[Tensor]]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(way(), [*levels, *convs, *norms], gradients)

    seconds = interleaved({way.__name__: partial(step, way) for way in (apart, as_one, canvas)}, repeats=9)
    for way in (as_one, canvas):
        difference = max(map(relative_difference, step(way), step(apart)))
        assert difference < 1e-4, difference
        told = f"gradients to {difference:.0e}"
        yield faster(f"{way.__name__}, {name}", seconds[way.__name__], seconds["apart"], None, told)


def pack(own: FoldedConv2d, size: tuple[int, ...]) -> None:
    """`own` computes with the weights that it has now in oneDNN's layout for inputs of that size."""
    weight, bias = own.folded()
    how = [list(own.padding), list(own.stride), list(own.dilation), own.groups]
    pad = own.pad or (lambda features: features)
    ours = torch.ops.mkldnn._reorder_convolution_weight(weight, *how, pad(torch.zeros(size)).shape)
    own.forward = lambda features: torch.ops.mkldnn._convolution_pointwise(
        pad(features), ours, bias, *how, "none", [], ""
    )


def weights_rows(name: str, net: nn.Module, images: Tensor) -> Iterator[Row]:
    net = net.eval().to(memory_format=NHWC)
    kept, packed = copy.deepcopy(net), copy.deepcopy(net)
    taken: dict[str, tuple[int, ...]] = {}

    def note(key: str, module: nn.Module, inputs: tuple[Tensor]) -> None:
        taken[key] = inputs[0].shape

    for key, module in net.named_modules():
        if isinstance(module, FoldedConv2d):
            module.register_forward_pre_hook(partial(note, key))
    with torch.no_grad():
        expected = net(images)
        for module in net.modules():
            module._forward_pre_hooks.clear()
        keep_folded(kept)
        for key in taken:
            pack(packed.get_submodule(key), taken[key])  # pyright: ignore[reportArgumentType]
        seconds = interleaved({"kept": partial(kept, images), "packed": partial(packed, images)}, repeats=11)
        difference = max(map(relative_difference, packed(images), expected))
    assert difference < 1e-4, difference
    yield faster(f"packed weights, {name}", seconds["packed"], seconds["kept"], None, f"maps to {difference:.0e}")


def with_kept(own: FoldedConv2d, weight: Tensor, bias: Tensor, features: Tensor) -> Tensor:
    """As `keep_folded`, whose weights are not used where there are gradients."""
    features = features if own.pad is None else own.pad(features)
    return F.conv2d(features, weight, bias, own.stride, own.padding, own.dilation, own.groups)


def frozen_rows(name: str, net: nn.Module, images: Tensor) -> Iterator[Row]:
    """A training step of a backbone whose frozen stages keep their folded weights."""
    net = net.train().to(memory_format=NHWC)
    kept = copy.deepcopy(net)
    for module in kept.modules():
        if isinstance(module, FoldedConv2d) and not module.weight.requires_grad:
            module.forward = partial(with_kept, module, *(one.detach() for one in module.folded()))

    def step(own: nn.Module) -> None:
        torch.stack([level.sum() for level in own(images)]).sum().backward()

    seconds = interleaved({"now": partial(step, net), "kept": partial(step, kept)}, repeats=15)
    with torch.no_grad():
        difference = max(map(relative_difference, kept(images), net(images)))
    assert difference < 1e-4, difference
    yield faster(f"frozen stages' kept, {name}", seconds["kept"], seconds["now"], None, f"maps to {difference:.0e}")


def measure() -> Iterator[Row]:
    torch.manual_seed(0)
    for name, layout in TOWERS.items():
        yield from tower_rows(name, *layout)
    for images, side in ((1, (608, 800)), (1, (224, 224))):
        batch = torch.rand(images, 3, *side).contiguous(memory_format=NHWC)
        yield from weights_rows(f"R50, {images} of {side[0]}x{side[1]}", ResNet("resnet50", norm="frozen_bn"), batch)
    for images in (8, 1):
        batch = torch.rand(images, 3, 192, 256).contiguous(memory_format=NHWC)
        lite = TimmBackbone("tf_efficientnet_lite0", norm="frozen_bn")
        yield from weights_rows(f"Lite0, {images} of 192x256", lite, batch)
    batch = torch.rand(8, 3, 192, 256).contiguous(memory_format=NHWC)
    lite = TimmBackbone("tf_efficientnet_lite0", norm="frozen_bn", frozen_stages=2)
    yield from frozen_rows("Lite0, 8 of 192x256", lite, batch)


if __name__ == "__main__":
    run(measure, __doc__)
