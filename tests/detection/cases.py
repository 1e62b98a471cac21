"""What the tests of this folder share: targets, boxes, pyramids, a small detector, and the reference's inputs."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from msil.detection import Detector, ResNetOptions, Target, build_detector
from msil.detection.heads import HEADS

STRIDES = (8, 16, 32, 64, 128)
RANGES = ((-1.0, 64.0), (64.0, 128.0), (128.0, 256.0), (256.0, 512.0), (512.0, 1e8))
# Of the reference's batch, padded to 256 x 320.
MAP_SIZES = ((32, 40), (16, 20), (8, 10), (4, 5), (2, 3))
IMAGE_SIZES = [(256, 320), (210, 275)]


def map_sizes_of(height: int, width: int, strides: tuple[int, ...] = STRIDES) -> tuple[tuple[int, int], ...]:
    return tuple((math.ceil(height / stride), math.ceil(width / stride)) for stride in strides)


def target(boxes: Tensor | list, labels: Tensor | list | None = None) -> Target:
    boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.zeros(len(boxes), dtype=torch.int64) if labels is None else torch.as_tensor(labels)
    return Target(boxes, labels, image_id=0, size=(1, 1))


def random_targets(counts: list[int], height: int, width: int, num_classes: int, seed: int = 0) -> list[Target]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([width, height, width, height])
    targets = []
    for count in counts:
        corners = torch.rand(count, 2, 2, generator=generator).sort(1).values.flatten(1) * scale
        boxes = corners + torch.tensor([0.0, 0.0, 4.0, 4.0])
        targets.append(target(boxes, torch.randint(num_classes, (count,), generator=generator)))
    return targets


def random_boxes(
    rng: random.Random, count: int, height: int, width: int, grain: float = 0, *, broken: bool = False
) -> Tensor:
    """Boxes from below a pixel to several images, on a grid of `grain` pixels: some with a centre outside or far away,
    twins, and of the area of another. broken: some without height or inverted."""
    rows: list[list[float]] = []
    while len(rows) < count:
        kind = rng.random()
        if kind < 0.1:  # tiny
            w, h = rng.uniform(0.05, 2), rng.uniform(0.05, 2)
        elif kind < 0.2:  # huge
            w, h = rng.uniform(1, 6) * width, rng.uniform(1, 6) * height
        else:
            w, h = (math.exp(rng.uniform(math.log(2), math.log(1.3 * side))) for side in (width, height))
        x, y = rng.uniform(-w / 2, width - w / 2), rng.uniform(-h / 2, height - h / 2)
        if kind > 0.95:  # its centre outside
            x, y = rng.uniform(-w, width), rng.uniform(-h, height)
        if kind > 0.98:
            x, y = x + rng.choice([-2000, 2000]), y + rng.choice([-900, 0, 900])
        x1, y1, x2, y2 = (round(side / grain) * grain if grain else side for side in (x, y, x + w, y + h))
        x2, y2 = max(x2, x1 + grain), max(y2, y1 + grain)
        if broken and rng.random() < 0.1:
            x1, y1, x2, y2 = rng.choice([(x1, y1, x2, y1), (x2, y2, x1, y1)])
        rows.append([x1, y1, x2, y2])
        if rng.random() < 0.1:
            rows.append(rows[-1])
        if rng.random() < 0.1:  # turned by 90 degrees round its corner
            rows.append([x1, y1, x1 + y2 - y1, y1 + x2 - x1])
    rng.shuffle(rows)
    return torch.tensor(rows[:count], dtype=torch.float32).reshape(-1, 4)


def small_detector(
    msil: dict[str, Any] | None = None,
    head: str = "fcos",
    *,
    norm: str | None = None,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> Detector:
    """options: of the head. settings: of the Detector."""
    torch.manual_seed(0)
    of_head, of_backbone = HEADS[head].Options(num_convs=1, **(options or {})), ResNetOptions("resnet10", norm=norm)
    built = build_detector(of_head, of_backbone, 3, msil=msil, channels=64)
    return Detector(built.backbone, built.fpn, built.head, **settings)


def random_pyramid(
    batch: int, channels: int = 32, map_sizes: tuple[tuple[int, int], ...] = MAP_SIZES, seed: int = 1
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, channels, height, width, generator=generator) for height, width in map_sizes]


def reference_targets(golden: Any, case: str) -> list[Target]:
    arrays = golden("inputs", f"gt/{case}/")
    return [target(arrays[f"{image}/boxes"], arrays[f"{image}/labels"]) for image in range(2)]


def reference_pyramid(golden: Any) -> list[Tensor]:
    arrays = golden("inputs", "feats/")
    return [arrays[str(level)] for level in range(5)]


def value_and_grad(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    value = function(x)
    (grad,) = torch.autograd.grad(value, x)
    return value.detach(), grad


def assert_gradient(ours: Tensor | None, theirs: Tensor, name: str, near: float = 1e-5) -> None:
    """Within `near` of the reference's largest element."""
    assert ours is not None
    assert (ours - theirs).abs().max() <= near * theirs.abs().max(), f"the gradient of {name} is off"
