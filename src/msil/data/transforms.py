"""Training transforms: resize to the recipe's short side, random flip, of pixels and boxes.

An augmentation is drawn first, from the image's own random stream; pixels and boxes are two functions of it, so that
the pixels can be transformed later, on the device that trains (data.device_transforms).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from msil.detection.preprocess import resize, resized_size
from msil.detection.structures import Target


class Augmentation(NamedTuple):
    """What is done to one image: resized to (height, width), and perhaps mirrored: left and right exchanged."""

    height: int
    width: int
    mirrored: bool


class Untransformed(NamedTuple):
    """A training batch whose pixels are still those of the files; the targets are those of the transformed images."""

    images: list[Tensor]
    targets: list[Target]
    augmentations: list[Augmentation]

    def transformed(self) -> tuple[list[Tensor], list[Target]]:
        """The batch to train on, its pixels transformed where they are."""
        pairs = zip(self.images, self.augmentations, strict=True)
        return [transform_image(image, augmentation) for image, augmentation in pairs], self.targets


def draw_augmentation(
    height: int,
    width: int,
    generator: torch.Generator,
    *,
    min_size: int,
    max_size: int,
    multiscale: Sequence[int] | None,
    flip: float,
) -> Augmentation:
    """For an image of height x width pixels.

    min_size: short side in pixels; with `multiscale` (low, high) it is drawn uniformly from low..high instead.
    max_size: limit of the long side. flip: probability of mirroring. All chance comes from `generator`.
    """
    if multiscale is not None:
        low, high = multiscale
        min_size = int(torch.randint(low, high + 1, (), generator=generator))
    size = resized_size(height, width, min_size, max_size)
    return Augmentation(*size, mirrored=float(torch.rand((), generator=generator)) < flip)


def transform_image(image: Tensor, augmentation: Augmentation) -> Tensor:
    """(3, H, W) uint8, on any device -> (3, h, w) uint8. A GPU rounds exactly: its values may differ by 1."""
    # Mirrored first: the same picture, from fewer pixels where training images are made larger.
    image = image.flip(-1) if augmentation.mirrored else image
    return resize(image, (augmentation.height, augmentation.width))


def transform_boxes(boxes: Tensor, size: tuple[int, int], augmentation: Augmentation) -> Tensor:
    """Boxes (M, 4) of an image of `size` (height, width), scaled by axis, clipped and perhaps mirrored with it.

    Each axis has its own scale: the aspect ratio is kept but for the rounding of each side.
    """
    height, width, mirrored = augmentation
    x, y = width / size[1], height / size[0]
    # NumPy: after a picture has gone through the caches, each small operation of torch takes longer than all of this.
    moved = boxes.numpy() * np.array([x, y, x, y], dtype=np.float32)
    edges = np.array([width, height, width, height], dtype=np.float32)
    np.minimum(moved, edges, out=moved)  # rounding may pass the edge
    if mirrored:  # x becomes width - x
        moved[:, [0, 2]] = width - moved[:, [2, 0]]
    return torch.from_numpy(moved)
