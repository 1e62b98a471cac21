"""What happens to a training image after reading: resize to the recipe's short side, flip. Boxes go along."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from msil.detection.preprocess import resize, resized_size
from msil.detection.structures import Target


def training_transform(
    image: Tensor,
    target: Target,
    generator: torch.Generator,
    *,
    min_size: int,
    max_size: int,
    multiscale: tuple[int, int] | None,
    flip: float,
) -> tuple[Tensor, Target]:
    """Resized and perhaps mirrored image (3, h, w) uint8 and its boxes.

    min_size: short side in pixels; with `multiscale` (low, high) it is drawn uniformly from low..high instead.
    max_size: limit of the long side. flip: probability of mirroring. All chance comes from `generator`.
    """
    if multiscale is not None:
        low, high = multiscale
        min_size = int(torch.randint(low, high + 1, (), generator=generator))
    image, target = resize_with_boxes(image, target, min_size, max_size)
    if float(torch.rand((), generator=generator)) < flip:
        image, target = mirror(image, target)
    return image, target


def resize_with_boxes(image: Tensor, target: Target, min_size: int, max_size: int) -> tuple[Tensor, Target]:
    """Keeps the aspect ratio but for the rounding of each side; boxes are scaled by axis and clipped to the image."""
    height, width = image.shape[-2:]
    size = resized_size(height, width, min_size, max_size)
    x, y = size[1] / width, size[0] / height
    boxes = target.boxes * target.boxes.new_tensor([x, y, x, y])
    boxes = torch.stack([boxes[:, i].clamp(max=size[1 - i % 2]) for i in range(4)], dim=1)  # rounding may pass the edge
    return resize(image, size), replace(target, boxes=boxes)


def mirror(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Left and right exchanged: x becomes width - x."""
    x1, y1, x2, y2 = target.boxes.unbind(dim=1)
    width = image.shape[-1]
    return image.flip(-1), replace(target, boxes=torch.stack([width - x2, y1, width - x1, y2], dim=1))
