"""Label assignment: which point learns which ground-truth box. Fixed shapes, no host synchronisation.

Work goes from the boxes to the points: a box can own only points in a small window around it, so (B, G, L, window)
candidates are tested instead of (B, P, G). B images, G padded boxes an image, P points, L levels.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from msil.detection.boxes import LevelGrid, box_area
from msil.detection.structures import Target

# Points whose smallest box is as large as this stay background, as in MMDetection.
MAX_AREA = 1e8
_NO_BOX = torch.iinfo(torch.int64).max


def pad_ground_truth(targets: list[Target]) -> tuple[Tensor, Tensor]:
    """Boxes (B, G, 4) float32 and labels (B, G) int64 of a batch; padding has label -1.

    Labels are not checked against the classes: looking at them would make a GPU wait. The readers check them.

    G is 8, 16, 32, 64, 128 or a multiple of 128: few different shapes, so that compiled or captured graphs are reused.
    """
    most = max(len(target.labels) for target in targets)
    slots = next((size for size in (8, 16, 32, 64) if most <= size), 128 * math.ceil(most / 128))
    boxes = [F.pad(t.boxes.float(), (0, 0, 0, slots - len(t.labels))) for t in targets]
    labels = [F.pad(t.labels, (0, slots - len(t.labels)), value=-1) for t in targets]
    return torch.stack(boxes), torch.stack(labels)


def fcos_assign(
    boxes: Tensor,
    labels: Tensor,
    grid: LevelGrid,
    map_sizes: tuple[tuple[int, int], ...],
    strides: tuple[int, ...],
    regress_ranges: tuple[tuple[float, float], ...],
    center_sample_radius: float | None,
) -> Tensor:
    """FCOS assignment (arXiv 1904.01355, section 3.2; centre sampling arXiv 2006.09214).

    A point is positive for a box if it lies strictly inside it (with centre sampling: strictly inside the square of
    `center_sample_radius` strides around the box's centre, cut to the box) and the largest of the four distances to
    the full box is in the level's regress range, both ends included. Of several boxes the one of smallest area wins,
    of equal areas the first.

    boxes (B, G, 4), labels (B, G) with -1 for padding, regress_ranges L pairs in pixels, center_sample_radius in
    strides or None for no centre sampling.
    Returns matched (B, P) int64: the box's index in [0, G), or -1 for background.
    """
    radius = center_sample_radius
    window_y, window_x = _window(map_sizes, strides, regress_ranges, radius)
    low, high = _range_tensors(regress_ranges, boxes.device)
    stride = grid.strides  # (L,)
    reach = None if radius is None else radius * stride
    x = _axis_candidates(boxes[..., 0::2], stride, grid.widths, reach, window_x)
    y = _axis_candidates(boxes[..., 1::2], stride, grid.heights, reach, window_y)

    # (B, G, L, window_y, window_x)
    inside = y.inside[..., :, None] & x.inside[..., None, :]
    largest = torch.maximum(y.largest[..., :, None], x.largest[..., None, :])
    area = box_area(boxes)
    owned = inside & (largest >= low[:, None, None]) & (largest <= high[:, None, None])
    owned &= ((labels >= 0) & (area < MAX_AREA))[..., None, None, None]

    point = grid.starts[:, None, None] + y.index[..., :, None] * grid.widths[:, None, None] + x.index[..., None, :]
    count = len(grid.points)
    point = torch.where(owned, point, count)  # one slot more takes the candidates that own nothing
    # Bits of a non-negative float sort as the float does: one integer minimum decides by area, then by index, and
    # a minimum does not depend on the order of the writes.
    order = torch.arange(boxes.shape[1], device=boxes.device)
    key = (area.contiguous().view(torch.int32).long() << 32) | order
    key = torch.where(owned, key[..., None, None, None], _NO_BOX)
    best = torch.full((len(boxes), count + 1), _NO_BOX, device=boxes.device)
    best.scatter_reduce_(1, point.flatten(1), key.flatten(1), "amin")
    best = best[:, :count]
    return torch.where(best == _NO_BOX, -1, best & 0xFFFFFFFF)


class _Axis(NamedTuple):
    """Candidate grid lines of every box and level along one axis, each (B, G, L, window).

    index: column or row. inside: it lies in the map and inside the box (or its centre region).
    largest: the larger of the two distances to the box's sides, pixels.
    """

    index: Tensor
    inside: Tensor
    largest: Tensor


def _axis_candidates(sides: Tensor, stride: Tensor, cells: Tensor, reach: Tensor | None, window: int) -> _Axis:
    near, far = sides[..., 0, None], sides[..., 1, None]  # (B, G, 1)
    low, top = near, far
    if reach is not None:
        centre = (near + far) / 2
        low, top = torch.maximum(centre - reach, near), torch.minimum(centre + reach, far)
    start = torch.floor(low / stride - 0.5).long().clamp(min=0)  # (B, G, L)
    index = start[..., None] + torch.arange(window, device=sides.device)
    position = (index + 0.5) * stride[:, None]
    near, far = near[..., None], far[..., None]
    inside = (position - low[..., None] > 0) & (top[..., None] - position > 0)
    inside &= index < cells[:, None]
    return _Axis(index, inside, torch.maximum(position - near, far - position))


def _window(
    map_sizes: tuple[tuple[int, int], ...],
    strides: tuple[int, ...],
    regress_ranges: tuple[tuple[float, float], ...],
    radius: float | None,
) -> tuple[int, int]:
    """Grid lines a box can own along y and x on any level, plus one so that rounding loses none."""
    if radius is not None:
        window = math.ceil(2 * radius) + 1
        return window, window
    spans = [high / stride for (_, high), stride in zip(regress_ranges, strides, strict=True)]
    window_y = max(math.ceil(min(height, span)) for (height, _), span in zip(map_sizes, spans, strict=True))
    window_x = max(math.ceil(min(width, span)) for (_, width), span in zip(map_sizes, spans, strict=True))
    return window_y + 1, window_x + 1


@lru_cache(maxsize=64)
def _range_tensors(ranges: tuple[tuple[float, float], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # cached: must serve training too
        low, high = torch.tensor(ranges, dtype=torch.float32, device=device).unbind(1)
        return low, high
