"""Training transforms, of pixels and boxes: resizing to the recipe's short side, random flip, colours, crop, zoom-out.

An augmentation is drawn first, from the image's own random stream; pixels and boxes are two functions of it, so that
the pixels can be transformed later, on the device that trains (data.device_transforms).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from msil.detection.preprocess import IMAGENET_MEAN, resize, resized_size
from msil.detection.structures import Target

Rectangle = tuple[int, int, int, int]  # left, top, right, bottom in pixels

SCALES = (0.8, 1.25)  # of the standard scale jitter (arXiv 2012.07177)
# Ranges of SSD (arXiv 1512.02325), as are the defaults of its zoom-out and its crop.
COLOURS = v2.ColorJitter(brightness=0.125, contrast=0.5, saturation=0.5, hue=0.05)
ZOOM_OUT = v2.RandomZoomOut()
IOU_CROP = v2.RandomIoUCrop()
LEAST_VISIBLE = 0.25  # a box whose centre is visible has at least so much


class Augmentation(NamedTuple):
    """What is done to one image.

    height, width: of the result. mirrored: whether left and right are exchanged, last of all.
    part: what is taken of the image, in its pixels; None: all of it.
    place: where that is put in the result, before mirroring; None: it fills it. Round it is the mean colour.
    colours: what ColorJitter draws: the factors, and the order in which they apply; None: as they are.
    """

    height: int
    width: int
    mirrored: bool
    part: Rectangle | None = None
    place: Rectangle | None = None
    colours: dict[str, Any] | None = None


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
    target: Target,
    generator: torch.Generator,
    *,
    min_size: int,
    max_size: int,
    multiscale: Sequence[int] | None,
    flip: float,
    augment: str | None = None,
) -> Augmentation:
    """For the image of `target`, which is of target.size; all chance comes from `generator`.

    min_size: short side in pixels; with `multiscale` (low, high) it is drawn uniformly from low..high instead.
    max_size: limit of the long side. flip: probability of mirroring.
    augment: "none": neither of the two; "flip" or None: no more than these; "standard": colours too, and a scale of
        SCALES, beyond 1 by a crop that keeps the size of the result; "strong": zoom-out and IoU crop after that.
    """
    if augment == "none":
        multiscale, flip = None, 0.0
    if multiscale is not None:
        low, high = multiscale
        min_size = int(torch.randint(low, high + 1, (), generator=generator))
    mirrored = float(torch.rand((), generator=generator)) < flip
    height, width = target.size
    if augment not in ("standard", "strong"):
        return Augmentation(*resized_size(height, width, min_size, max_size), mirrored=mirrored)
    x, y, scale = torch.rand(3, generator=generator).tolist()
    scale = SCALES[0] + scale * (SCALES[1] - SCALES[0])
    if scale < 1:
        min_size, max_size = max(round(min_size * scale), 1), max(round(max_size * scale), 1)
    part = _crop(height, width, max(scale, 1.0), x, y)
    with torch.random.fork_rng(devices=[]):
        # torchvision draws from torch's own stream, which is the image's meanwhile.
        torch.set_rng_state(generator.get_state())
        colours = COLOURS.make_params([])
        window = _draw_window(target, part) if augment == "strong" else part
    colours["fn_idx"] = colours["fn_idx"].tolist()  # a tensor would cost each worker's batch file descriptors
    left, top, right, bottom = window
    height, width = resized_size(bottom - top, right - left, min_size, max_size)
    part = (max(part[0], left), max(part[1], top), min(part[2], right), min(part[3], bottom))
    columns = _placed(part[0] - left, part[2] - left, right - left, width)
    rows = _placed(part[1] - top, part[3] - top, bottom - top, height)
    place = (columns[0], rows[0], columns[1], rows[1])
    return Augmentation(height, width, mirrored, part, place, colours)


def _crop(height: int, width: int, scale: float, x: float, y: float) -> Rectangle:
    """The part of an image that is `scale` times smaller than it a side; x and y, in 0..1, say where."""
    h, w = max(round(height / scale), 1), max(round(width / scale), 1)
    left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
    return left, top, left + w, top + h


def _draw_window(target: Target, part: Rectangle) -> Rectangle:
    """`part` of the image, perhaps zoomed out and cropped round one of its boxes, in pixels of the image: may leave it.

    From torch's own random stream.
    """
    left, top, right, bottom = part
    size = (bottom - top, right - left)
    boxes = transform_target(target, Augmentation(*size, mirrored=False, part=part)).boxes
    if float(torch.rand(())) < ZOOM_OUT.p:
        before_x, before_y, after_x, after_y = ZOOM_OUT.make_params([_framed(boxes, size)])["padding"]
        boxes = boxes + torch.tensor([before_x, before_y, before_x, before_y])
        size = (size[0] + before_y + after_y, size[1] + before_x + after_x)
        left, top = left - before_x, top - before_y
    if len(boxes) and min(size) * IOU_CROP.min_scale >= 1:
        crop = IOU_CROP.make_params([_framed(boxes, size)])
        if crop:  # else all of it is kept
            left, top, size = left + crop["left"], top + crop["top"], (crop["height"], crop["width"])
    return left, top, left + size[1], top + size[0]


def _framed(boxes: Tensor, size: tuple[int, int]) -> tv_tensors.BoundingBoxes:
    return tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)  # pyright: ignore[reportCallIssue]


def _placed(start: int, end: int, length: int, resized: int) -> tuple[int, int]:
    """start..end of `length` pixels, in the `resized` pixels that they become: at least 1."""
    first = min(round(start * resized / length), resized - 1)
    return first, max(round(end * resized / length), first + 1)


def transform_image(image: Tensor, augmentation: Augmentation) -> Tensor:
    """(3, H, W) uint8, on any device -> (3, h, w) uint8.

    A GPU rounds exactly: its values may differ by 1, and by more once colours have multiplied that.
    """
    height, width, mirrored, part, place, colours = augmentation
    if part is not None:
        image = image[:, part[1] : part[3], part[0] : part[2]]
    if colours is not None:
        image = COLOURS.transform(image, colours)
    if part is not None or colours is not None:
        image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # as `resize` is fastest
    # Mirrored first: the same picture, from fewer pixels where training images are made larger.
    image = image.flip(-1) if mirrored else image
    if place is None or place == (0, 0, width, height):
        return resize(image, (height, width))
    left, top, right, bottom = (width - place[2], place[1], width - place[0], place[3]) if mirrored else place
    whole = image.new_empty((3, height, width))
    for channel, mean in zip(whole, IMAGENET_MEAN, strict=True):
        channel.fill_(round(mean))
    whole[:, top:bottom, left:right] = resize(image, (bottom - top, right - left))
    return whole


def transform_target(target: Target, augmentation: Augmentation) -> Target:
    """The target of the transformed image: boxes scaled by axis, clipped and perhaps mirrored with it.

    Each axis has its own scale: the aspect ratio is kept but for the rounding of each side. Where a part of the image
    is taken, a box goes with its label if less than LEAST_VISIBLE of its area is visible, a side longer than the part's
    counted as the part's, or if a visible side has less than 1 pixel of the result.
    """
    height, width, mirrored, part, place, _ = augmentation
    from_left, from_top, from_right, from_bottom = part or (0, 0, target.size[1], target.size[0])
    left, top, right, bottom = place or (0, 0, width, height)
    x, y = (right - left) / (from_right - from_left), (bottom - top) / (from_bottom - from_top)
    # NumPy: after a picture has gone through the caches, each small operation of torch takes longer than all of this.
    boxes = target.boxes.numpy()
    if part is not None:
        boxes = boxes - np.array([from_left, from_top, from_left, from_top], dtype=np.float32)
    moved = boxes * np.array([x, y, x, y], dtype=np.float32)
    if place is not None:
        moved += np.array([left, top, left, top], dtype=np.float32)
    whole = moved.copy() if part is not None else moved
    np.minimum(moved, np.array([right, bottom, right, bottom], dtype=np.float32), out=moved)  # rounding may pass it
    labels = target.labels
    if part is not None:
        np.maximum(moved, np.array([left, top, left, top], dtype=np.float32), out=moved)
        sides, all_of_it = moved[:, 2:] - moved[:, :2], whole[:, 2:] - whole[:, :2]
        visible = sides.prod(1) >= LEAST_VISIBLE * np.minimum(all_of_it, (right - left, bottom - top)).prod(1)
        kept = visible & (sides >= 1).all(1)
        moved, labels = moved[kept], labels[torch.from_numpy(kept)]
    if mirrored:  # x becomes width - x
        moved[:, [0, 2]] = width - moved[:, [2, 0]]
    return replace(target, boxes=torch.from_numpy(moved), labels=labels)
