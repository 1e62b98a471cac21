"""What travels between the parts: ground truth in, raw predictions through, detections out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Target:
    """Ground truth of one image, in the pixels of the image tensor that it travels with.

    boxes: (M, 4) float32, x1 y1 x2 y2, x2 > x1 and y2 > y1; width is x2 - x1.
    labels: (M,) int64 in [0, num_classes).
    image_id: the data set's id of the image.
    size: (height, width) of the image file after its EXIF rotation, before any resizing.
    """

    boxes: Tensor
    labels: Tensor
    image_id: int
    size: tuple[int, int]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Target:
        return Target(
            self.boxes.to(device, non_blocking=non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
            self.image_id,
            self.size,
        )


@dataclass
class Predictions:
    """Raw outputs of a dense head over all points of all levels, P = sum of h * w over `map_sizes`.

    Points run level by level (P3 first), row-major inside a level.

    logits: (N, P, K) classification logits, before the sigmoid.
    distances: (N, P, 4) left, top, right, bottom from the point to the box's sides, in pixels of the padded input,
        or in units of the level's stride if the head normalises by it.
    map_sizes: (height, width) of each level's feature map.
    centerness: (N, P) centre-ness logits, or None for heads without that branch (VFNet).
    initial_distances: (N, P, 4) as `distances`, before their refinement, or None for heads without one (FCOS).
    """

    logits: Tensor
    distances: Tensor
    map_sizes: tuple[tuple[int, int], ...]
    centerness: Tensor | None = None
    initial_distances: Tensor | None = None

    def to(self, device: torch.device | str) -> Predictions:
        centerness = None if self.centerness is None else self.centerness.to(device)
        initial = None if self.initial_distances is None else self.initial_distances.to(device)
        return Predictions(self.logits.to(device), self.distances.to(device), self.map_sizes, centerness, initial)


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
