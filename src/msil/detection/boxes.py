"""Geometry of points and boxes: pure functions of tensors. Boxes are x1 y1 x2 y2 in pixels, width x2 - x1."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class LevelGrid(NamedTuple):
    """The grid of points of every pyramid level, as tensors over P points or L levels.

    points: (P, 2) float32 x, y in pixels of the padded input. point_strides: (P,) float32.
    strides: (L,) float32. heights, widths, starts: (L,) int64, `starts` being the level's first point.
    """

    points: Tensor
    point_strides: Tensor
    strides: Tensor
    heights: Tensor
    widths: Tensor
    starts: Tensor


def level_grid(
    map_sizes: tuple[tuple[int, int], ...], strides: tuple[int, ...], offset: float, device: torch.device
) -> LevelGrid:
    """Points at ((x + offset) * stride, (y + offset) * stride), level by level, row-major inside a level.

    map_sizes: (height, width) a level. offset: 0.5 in FCOS (cell centres), 0 in VFNet and ATSS.
    Cached by its arguments: the tensors must not be changed in place.
    """
    # While a net is exported or compiled its sizes may be symbols, which no cache can hold.
    make = _make_level_grid if torch.compiler.is_compiling() else _cached_level_grid
    return make(map_sizes, strides, offset, device)


def _make_level_grid(
    map_sizes: tuple[tuple[int, int], ...], strides: tuple[int, ...], offset: float, device: torch.device
) -> LevelGrid:
    # Cached tensors outlive the call, so they must be ordinary ones even if made under inference_mode.
    with torch.inference_mode(False):
        points, point_strides, starts, count = [], [], [], 0
        for (height, width), stride in zip(map_sizes, strides, strict=True):
            y = (torch.arange(height, dtype=torch.float32, device=device) + offset) * stride
            x = (torch.arange(width, dtype=torch.float32, device=device) + offset) * stride
            grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
            points.append(torch.stack([grid_x.flatten(), grid_y.flatten()], dim=1))
            point_strides.append(torch.full((height * width,), float(stride), device=device))
            starts.append(count)
            count += height * width
        return LevelGrid(
            torch.cat(points),
            torch.cat(point_strides),
            vector([float(stride) for stride in strides], device),
            vector([height for height, _ in map_sizes], device),
            vector([width for _, width in map_sizes], device),
            vector(starts, device),
        )


_cached_level_grid = lru_cache(maxsize=1024)(_make_level_grid)  # COCO at 800 x 1333 has some 300 padded sizes


def vector(values: Sequence[int] | Sequence[float], device: torch.device) -> Tensor:
    """Numbers as a tensor (V,) of the device, filled there: torch.tensor(values) would wait for a copy to a GPU."""
    return torch.stack([torch.full((), value, device=device) for value in values])


def distances_to_boxes(points: Tensor, distances: Tensor) -> Tensor:
    """points (..., 2) x, y and distances (..., 4) left, top, right, bottom -> boxes (..., 4)."""
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)


def boxes_to_distances(points: Tensor, boxes: Tensor) -> Tensor:
    """points (..., 2) and boxes (..., 4) -> left, top, right, bottom (..., 4); negative for a point outside."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)


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
