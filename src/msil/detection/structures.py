"""What travels between the parts: ground truth in, raw predictions through, detections out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass
class Target:
    """Ground truth of one image, in the pixels of the image tensor that it travels with.

    boxes: (M, 4) float32, x1 y1 x2 y2, x2 > x1 and y2 > y1; width is x2 - x1.
    labels: (M,) int64 in [0, num_classes).
    image_id: the data set's id of the image; evaluation needs it, the loss does not.
    size: (height, width) of the image file after its EXIF rotation, before any resizing; likewise.
    """

    boxes: Tensor
    labels: Tensor
    image_id: int = -1
    size: tuple[int, int] = (0, 0)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Target:
        return Target(
            self.boxes.to(device, non_blocking=non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
            self.image_id,
            self.size,
        )


class Level(NamedTuple):
    """Raw outputs of a dense head on one pyramid level, A priors a cell: logits (N, A K, H, W), box (N, A D, H, W) with
    the D channels of the box coder, quality (N, A, H, W), first_box as box."""

    logits: Tensor
    box: Tensor
    quality: Tensor | None = None
    first_box: Tensor | None = None


@dataclass
class Predictions:
    """Raw outputs of a dense head over all P priors: level by level (P3 first), row-major inside a level, a cell's
    priors side by side.

    logits: (N, P, K) classification logits, before the sigmoid.
    box: (N, P, D) what the head's box coder decodes.
    map_sizes: (height, width) of each level's feature map.
    quality: (N, P) logits of a factor of the score (centre-ness), or None for heads without that branch.
    first_box: (N, P, D) as `box`, before its refinement, or None for heads without one.
    """

    logits: Tensor
    box: Tensor
    map_sizes: tuple[tuple[int, int], ...]
    quality: Tensor | None = None
    first_box: Tensor | None = None


@dataclass
class Detections:
    """Detected objects of one image, by descending score.

    boxes: (D, 4) float32, x1 y1 x2 y2. scores: (D,) float32 in [0, 1]. labels: (D,) int64 in [0, num_classes).
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> Detections:
        return Detections(self.boxes.to(device), self.scores.to(device), self.labels.to(device))


def to_device(values: Tensor, device: torch.device | None) -> Tensor:
    """`values` on `device` (None: where they are); from the host without waiting for the copy."""
    if device is None or values.device == device:
        return values
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()  # an ordinary host tensor's copy would make the host wait
    return values.to(device, non_blocking=True)


def sizes_tensor(image_sizes: list[tuple[int, int]], device: torch.device) -> Tensor:
    """B pairs (height, width) -> (B, 2) int64 on `device`."""
    if torch.compiler.is_exporting():
        return torch.tensor(image_sizes, device=device)  # they may be symbols
    sizes = torch.empty((len(image_sizes), 2), dtype=torch.int64)
    sizes.numpy()[:] = image_sizes  # of the host: nothing that counts copies to a device takes it for one
    return to_device(sizes, device)
