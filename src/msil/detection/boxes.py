"""Geometry of points and boxes: pure functions of tensors. Boxes are x1 y1 x2 y2 in pixels, width x2 - x1."""

from __future__ import annotations

import torch
from torch import Tensor


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
    height, width = sizes[:, None, 0], sizes[:, None, 1]
    x1, y1, x2, y2 = boxes.unbind(-1)
    limit = torch.minimum
    return torch.stack(
        [limit(x1.clamp(min=0), width), limit(y1.clamp(min=0), height),
         limit(x2.clamp(min=0), width), limit(y2.clamp(min=0), height)],
        dim=-1,
    )  # fmt: skip


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
