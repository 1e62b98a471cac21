"""Made-up pyramids, predictions and ground truth of the sizes that the goals name."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from msil.detection import Target

STRIDES = (8, 16, 32, 64, 128)
IMAGE = (800, 1344)  # height, width: 22,400 points


def map_sizes(size: tuple[int, int] = IMAGE) -> tuple[tuple[int, int], ...]:
    """(height, width) of P3..P7."""
    return tuple((math.ceil(size[0] / stride), math.ceil(size[1] / stride)) for stride in STRIDES)


def num_points(size: tuple[int, int] = IMAGE) -> int:
    return sum(height * width for height, width in map_sizes(size))


def ground_truth(
    images: int, boxes: int, classes: int = 80, size: tuple[int, int] = IMAGE, seed: int = 0
) -> list[Target]:
    """`boxes` boxes in each of `images` images, sides from 8 to 600 pixels, log-uniform, as COCO's roughly are."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    targets = []
    for image in range(images):
        sides = torch.exp(torch.empty(boxes, 2).uniform_(math.log(8), math.log(600), generator=generator))
        sides = torch.minimum(sides, torch.tensor([width - 1.0, height - 1.0]))
        corner = torch.rand(boxes, 2, generator=generator) * (torch.tensor([width, height]) - sides)
        labels = torch.randint(classes, (boxes,), generator=generator)
        targets.append(Target(torch.cat([corner, corner + sides], dim=1), labels, image, size))
    return targets


def raw_outputs(
    images: int, classes: int = 80, size: tuple[int, int] = IMAGE, seed: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (N, P, K), distances (N, P, 4) in strides, centre-ness logits (N, P), as of a net early in training."""
    generator = torch.Generator().manual_seed(seed)
    points = num_points(size)
    logits = torch.randn(images, points, classes, generator=generator) - 4
    distances = torch.rand(images, points, 4, generator=generator) * 8
    return logits, distances, torch.randn(images, points, generator=generator)
