"""What travels between the parts - ground truth, raw predictions, detections - and the geometry of boxes.

Boxes are x1 y1 x2 y2 in pixels, width x2 - x1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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

    def to(self, device: torch.device | str) -> Target:
        return replace(self, boxes=self.boxes.to(device), labels=self.labels.to(device))


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
    """`values` on `device` (None: where they are); copies from the host are asynchronous."""
    if device is None or values.device == device:
        return values
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()  # the copy from pageable memory is a host sync
    return values.to(device, non_blocking=True)


def sizes_tensor(image_sizes: list[tuple[int, int]], device: torch.device) -> Tensor:
    """B pairs (height, width) -> (B, 2) int64 on `device`."""
    if torch.compiler.is_exporting():
        return torch.tensor(image_sizes, device=device)  # they may be symbols
    sizes = torch.empty((len(image_sizes), 2), dtype=torch.int64)
    sizes.numpy()[:] = image_sizes  # on the host, before its one copy
    return to_device(sizes, device)


def target_list(targets: Sequence[Target | Mapping[str, Tensor]], images: int, num_classes: int) -> list[Target]:
    """The Targets of so many images, of Targets or torchvision's dicts with "boxes" and "labels".

    Raises ValueError for anything else.
    """
    if not isinstance(targets, Sequence) or len(targets) != images:
        found = len(targets) if isinstance(targets, Sequence) else kind_of(targets)
        raise ValueError(f"targets must be a list of one target for each of the {images} images, not {found}.")
    return [_as_target(target, number, num_classes) for number, target in enumerate(targets)]


def _as_target(given: Target | Mapping[str, Tensor], number: int, num_classes: int) -> Target:
    target = given
    if isinstance(target, Mapping) and {"boxes", "labels"} <= target.keys():
        target = Target(target["boxes"], target["labels"])
    if not isinstance(target, Target):
        found = f"a dict with {sorted(target)}" if isinstance(target, Mapping) else kind_of(target)
        raise ValueError(f'target {number} must be a Target or a dict with "boxes" and "labels", not {found}.')
    boxes, labels = target.boxes, target.labels
    tensors = isinstance(boxes, Tensor) and isinstance(labels, Tensor)
    if not tensors or boxes.shape[1:] != (4,) or labels.shape != boxes.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"target {number} must have boxes (M, 4) and torch.int64 labels (M,), not {kind_of(boxes)} and "
            f"{kind_of(labels)}."
        )
    if len(boxes) and target is not given:
        least, most = (int(label) for label in labels.aminmax())
        if least < 0 or most >= num_classes:
            raise ValueError(
                f"the labels of target {number} are {least} to {most}, and a head of {num_classes} classes takes 0 to "
                f"{num_classes - 1}; torchvision's nets count from 1."
            )
        if not boxes.isfinite().all():
            raise ValueError(f"the boxes of target {number} are not all finite.")
        if not (boxes[:, :2] < boxes[:, 2:]).all():
            raise ValueError(f"the boxes of target {number} must be (x1, y1, x2, y2) with x1 < x2 and y1 < y2.")
    return target


def kind_of(value: Any) -> str:
    """For error messages: dtype and shape of a tensor, the type of anything else."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def distances_to_boxes(points: Tensor, distances: Tensor) -> Tensor:
    """points (..., 2) x, y and distances (..., 4) left, top, right, bottom -> boxes (..., 4)."""
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)


def boxes_to_distances(points: Tensor, boxes: Tensor) -> Tensor:
    """points (..., 2) and boxes (..., 4) -> left, top, right, bottom (..., 4); negative for a point outside."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)


def edges(boxes: Tensor) -> Tensor:
    """Boxes (..., 4) as distances from the origin, -x1 -y1 x2 y2: what `aligned_iou` and `aligned_giou` take."""
    return torch.cat([-boxes[..., :2], boxes[..., 2:]], dim=-1)


def clip_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Clamp boxes (N, M, 4) to their image: x to [0, width], y to [0, height], sizes (N, 2) height, width."""
    return torch.minimum(boxes.clamp(min=0), sizes.flip(1).repeat(1, 2)[:, None])


def pairwise_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of boxes (..., 4) with others (..., 4), element by element -> (...), the union clamped to >= 1e-6."""
    low = torch.maximum(boxes[..., :2], others[..., :2])
    high = torch.minimum(boxes[..., 2:], others[..., 2:])
    intersection = _area((high - low).clamp(min=0))
    union = box_area(boxes) + box_area(others) - intersection
    return intersection / union.clamp(min=1e-6)


def aligned_iou(distances: Tensor, others: Tensor) -> Tensor:
    """IoU of boxes round one and the same point, given as left, top, right, bottom (..., 4) -> (...).

    The union is clamped to >= 1e-6. IoU does not change under translation, so the point itself is not needed.
    """
    intersection, union = _aligned_intersection_union(distances, others)
    return intersection / union.clamp(min=1e-6)


def aligned_giou(distances: Tensor, others: Tensor) -> Tensor:
    """Generalised IoU (arXiv 1902.09630) of boxes as in `aligned_iou` -> (...) in [-1, 1].

    Union and enclosing area are clamped to >= 1e-7, as MMDetection does (it does not add an epsilon).
    """
    intersection, union = _aligned_intersection_union(distances, others)
    union = union.clamp(min=1e-7)
    enclosing = _area(_spans(torch.maximum(distances, others)).clamp(min=0)).clamp(min=1e-7)
    return intersection / union - (enclosing - union) / enclosing


def _aligned_intersection_union(distances: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    intersection = _area(_spans(torch.minimum(distances, others)).clamp(min=0))
    return intersection, _area(_spans(distances)) + _area(_spans(others)) - intersection


def _spans(distances: Tensor) -> Tensor:
    """Left, top, right, bottom (..., 4) -> width and height (..., 2)."""
    return distances[..., :2] + distances[..., 2:]


def _area(spans: Tensor) -> Tensor:
    return spans[..., 0] * spans[..., 1]


def box_area(boxes: Tensor) -> Tensor:
    """Signed area (...) of boxes (..., 4)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
