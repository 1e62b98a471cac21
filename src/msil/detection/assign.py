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

from msil.detection.boxes import LevelGrid, box_area, boxes_to_distances, pairwise_iou, vector
from msil.detection.host import sizes_tensor, to_device
from msil.detection.structures import Target

# Points whose smallest box is as large as this stay background, as in MMDetection.
MAX_AREA = 1e8
_NO_BOX = torch.iinfo(torch.int64).max
_LOW_BITS = 0xFFFFFFFF


class GroundTruth(NamedTuple):
    """The ground truth of a batch as tensors of the device: all that assignment and loss know of it.

    boxes (B, G, 4), labels (B, G): as of `pad_ground_truth`. sizes: (B, 2) int64 height, width of the images before
    their padding, pixels; None for a head to which a point in the padding is a point like any other.
    """

    boxes: Tensor
    labels: Tensor
    sizes: Tensor | None


def ground_truth(targets: list[Target], image_sizes: list[tuple[int, int]] | None, device: torch.device) -> GroundTruth:
    """B targets and as many (height, width) -> GroundTruth on `device`; nobody waits for the copies."""
    boxes, labels = pad_ground_truth(targets, device)
    return GroundTruth(boxes, labels, None if image_sizes is None else sizes_tensor(image_sizes, device))


def pad_ground_truth(targets: list[Target], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Boxes (B, G, 4) float32 and labels (B, G) int64 of a batch; padding has label -1.

    device: where they are needed, by default where the targets are. Targets of the host reach a GPU by one copy of all
    boxes and one of all labels, which nobody waits for.

    Labels are not checked against the classes: looking at them would make a GPU wait. The readers check them.

    G is 8, 16, 32, 64, 128 or a multiple of 128: few different shapes, so that compiled or captured graphs are reused.
    """
    most = max(len(target.labels) for target in targets)
    slots = next((size for size in (8, 16, 32, 64) if most <= size), 128 * math.ceil(most / 128))
    boxes = [F.pad(t.boxes.float(), (0, 0, 0, slots - len(t.labels))) for t in targets]
    labels = [F.pad(t.labels, (0, slots - len(t.labels)), value=-1) for t in targets]
    return to_device(torch.stack(boxes), device), to_device(torch.stack(labels), device)


def fcos_assign(
    boxes: Tensor,
    labels: Tensor,
    grid: LevelGrid,
    map_sizes: tuple[tuple[int, int], ...],
    strides: tuple[int, ...],
    regress_ranges: tuple[tuple[float, float], ...],
    center_sample_radius: float | None,
    point_offset: float = 0.5,
) -> Tensor:
    """FCOS assignment (arXiv 1904.01355, section 3.2; centre sampling arXiv 2006.09214).

    A point is positive for a box if it lies strictly inside it (with centre sampling: strictly inside the square of
    `center_sample_radius` strides around the box's centre, cut to the box) and the largest of the four distances to
    the full box is in the level's regress range, both ends included. Of several boxes the one of smallest area wins,
    of equal areas the first.

    boxes (B, G, 4), labels (B, G) with -1 for padding, regress_ranges L pairs in pixels, center_sample_radius in
    strides or None for no centre sampling, point_offset that of `grid`'s points in their cells.
    Returns matched (B, P) int64: the box's index in [0, G), or -1 for background.
    """
    window = _window(map_sizes, strides, regress_ranges, center_sample_radius)
    ranges = _make_range_tensors if torch.compiler.is_compiling() else _cached_range_tensors
    low, high = ranges(regress_ranges, boxes.device)
    lines = _candidate_lines(boxes, grid, center_sample_radius, window, point_offset)

    # (B, G, L, window of rows, window of columns)
    inside = lines.inside[:, :, 1, :, :, None] & lines.inside[:, :, 0, :, None, :]
    largest = torch.maximum(lines.largest[:, :, 1, :, :, None], lines.largest[:, :, 0, :, None, :])
    area = box_area(boxes)
    owned = inside & (largest >= low[:, None, None]) & (largest <= high[:, None, None])
    owned &= ((labels >= 0) & (area < MAX_AREA))[..., None, None, None]

    row, column = lines.index[:, :, 1, :, :, None], lines.index[:, :, 0, :, None, :]
    point = grid.starts[:, None, None] + row * grid.widths[:, None, None] + column
    count = len(grid.points)
    point = torch.where(owned, point, count)  # one slot more takes the candidates that own nothing
    # Bits of a non-negative float sort as the float does: one integer minimum decides by area, then by index, and
    # a minimum does not depend on the order of the writes.
    order = torch.arange(boxes.shape[1], device=boxes.device)
    key = (area.view(torch.int32).long() << 32) | order
    key = key[..., None, None, None].expand(point.shape)
    best = torch.full((len(boxes), count + 1), _NO_BOX, device=boxes.device)
    best.scatter_reduce_(1, point.flatten(1), key.flatten(1), "amin")
    return _low_bits(best[:, :count])


def atss_assign(
    boxes: Tensor,
    labels: Tensor,
    grid: LevelGrid,
    map_sizes: tuple[tuple[int, int], ...],
    image_sizes: list[tuple[int, int]] | Tensor,
    topk: int = 9,
    anchor_scale: int = 8,
    size_divisor: int = 32,
) -> Tensor:
    """ATSS assignment (arXiv 1912.02424) of points at the corners of their cells (`grid` with offset 0).

    Every point carries one square anchor of side anchor_scale strides. A box's candidates are its `topk` nearest points
    of each level; of equally near ones the upper, then the left one counts (torch.topk, which MMDetection uses,
    promises no order). Positive are candidates whose anchor's IoU with the box reaches the mean plus the standard
    deviation (of n - 1) over the box's candidates of all levels, and that lie more than 0.01 pixels inside the box. A
    point of several boxes goes to the one of highest IoU, of equal ones to the first.

    Points beyond an image's own size, rounded up to size_divisor, are none of its candidates, though the batch is
    padded to its largest image.

    boxes (B, G, 4), labels (B, G) with -1 for padding, image_sizes B pairs (height, width) in pixels, as a list or as
    int64 (B, 2).
    Returns matched (B, P) int64: the box's index in [0, G), or -1 for background.
    """
    if not isinstance(image_sizes, Tensor):
        image_sizes = sizes_tensor(image_sizes, boxes.device)
    # The nearest `topk` points lie in a window of topk x topk cells, wherever the centre is: a row or a column that
    # holds one holds all the nearer ones of that row or column too.
    window = min(topk, max(max(size) for size in map_sizes))
    lines = _nearest_lines(boxes, _valid_cells(image_sizes, size_divisor, grid), grid.strides, window)

    # (B, G, L, window * window), row by row
    squares = lines.distance.square()
    distance = (squares[:, :, 1, :, :, None] + squares[:, :, 0, :, None, :]).flatten(-2)
    exists = (lines.exists[:, :, 1, :, :, None] & lines.exists[:, :, 0, :, None, :]).flatten(-2)
    # Bits of a non-negative float sort as the float does: the position below them makes every key another one.
    place = torch.arange(distance.shape[-1], device=boxes.device)
    key = torch.where(exists, distance.view(torch.int32).long() << 32 | place, _NO_BOX)
    nearest = key.topk(min(topk, len(place)), largest=False).values  # (B, G, L, topk)
    is_candidate = nearest != _NO_BOX
    place = (nearest & _LOW_BITS).clamp(max=len(place) - 1)
    row = lines.index[:, :, 1].gather(-1, place // window)
    column = lines.index[:, :, 0].gather(-1, place % window)

    stride = grid.strides[:, None, None]
    point = torch.stack([column, row], dim=-1) * stride
    half = anchor_scale / 2 * stride
    target = boxes[:, :, None, None]
    iou = pairwise_iou(torch.cat([point - half, point + half], dim=-1), target)
    inside = boxes_to_distances(point, target).amin(-1) > 0.01
    positive = is_candidate & inside & (iou >= _mean_plus_deviation(iou, is_candidate)[..., None, None])
    positive &= (labels >= 0)[..., None, None]

    count, slots = len(grid.points), boxes.shape[1]
    index = grid.starts[:, None] + row * grid.widths[:, None] + column
    index = torch.where(positive, index, count)  # one slot more takes the candidates that own nothing
    # One integer maximum decides by IoU, then for the first box, whose complement is the largest.
    complement = torch.arange(_LOW_BITS, _LOW_BITS - slots, -1, device=boxes.device)[:, None, None]
    key = iou.view(torch.int32).long() << 32 | complement
    best = torch.zeros((len(boxes), count + 1), dtype=torch.int64, device=boxes.device)
    best.scatter_reduce_(1, index.flatten(1), key.flatten(1), "amax")
    return ~_low_bits(best[:, :count])  # -1 where nothing was written


def _low_bits(keys: Tensor) -> Tensor:
    """The lower 32 bits (...) of int64 keys as numbers with a sign: -1 of _NO_BOX."""
    return keys.to(torch.int32).long()


class _Lines(NamedTuple):
    """The columns and rows nearest to every box's centre, each (B, G, 2, L, window): x, then y.

    index: column or row. distance: from the centre, pixels. exists: it is one of the image's own.
    """

    index: Tensor
    distance: Tensor
    exists: Tensor


def _nearest_lines(boxes: Tensor, cells: Tensor, stride: Tensor, window: int) -> _Lines:
    """cells (B, 2, L): how many columns and rows the image has on each level. stride (L,)."""
    centre = ((boxes[..., :2] + boxes[..., 2:]) / 2)[..., None]  # (B, G, 2, 1)
    cells = cells[:, None]  # (B, 1, 2, L)
    start = torch.ceil(centre / stride - window / 2)  # of two equally far lines the first
    start = torch.minimum(start, cells - window).clamp(min=0).long()
    index = start[..., None] + torch.arange(window, device=centre.device)
    return _Lines(index, (index * stride[:, None] - centre[..., None]).abs(), index < cells[..., None])


def _mean_plus_deviation(values: Tensor, counted: Tensor) -> Tensor:
    """Mean plus standard deviation (of n - 1) of the counted values (B, G, L, k) over L and k -> (B, G)."""
    count = counted.sum(dim=(-2, -1))
    mean = torch.where(counted, values, 0).sum(dim=(-2, -1)) / count
    spread = torch.where(counted, values - mean[..., None, None], 0).square().sum(dim=(-2, -1))
    return mean + (spread / (count - 1)).sqrt()


def _valid_cells(image_sizes: Tensor, divisor: int, grid: LevelGrid) -> Tensor:
    """Columns and rows (B, 2, L) of each level whose points lie in the image's own size, rounded up to `divisor`."""
    padded = torch.ceil(image_sizes.flip(1) / divisor) * divisor  # (B, 2): width, height
    cells = torch.ceil(padded[..., None] / grid.strides)
    return torch.minimum(cells, torch.stack([grid.widths, grid.heights]))


class _CandidateLines(NamedTuple):
    """The columns and rows whose points a box can own on each level, each (B, G, 2, L, window): x, then y.

    index: column or row. inside: it lies in the map and inside the box (or its centre region).
    largest: the larger of the two distances to the box's sides, pixels.
    """

    index: Tensor
    inside: Tensor
    largest: Tensor


def _candidate_lines(
    boxes: Tensor, grid: LevelGrid, radius: float | None, window: int, offset: float
) -> _CandidateLines:
    near, far = boxes[..., :2, None], boxes[..., 2:, None]  # (B, G, 2, 1)
    low, top = near, far
    if radius is not None:
        centre, reach = (near + far) / 2, radius * grid.strides
        low, top = torch.maximum(centre - reach, near), torch.minimum(centre + reach, far)  # (B, G, 2, L)
    start = torch.floor(low / grid.strides - offset).clamp(min=0).long()
    index = start[..., None] + torch.arange(window, device=boxes.device)
    position = (index + offset) * grid.strides[:, None]
    inside = (position > low[..., None]) & (position < top[..., None])
    inside &= index < torch.stack([grid.widths, grid.heights])[..., None]
    return _CandidateLines(index, inside, torch.maximum(position - near[..., None], far[..., None] - position))


def _window(
    map_sizes: tuple[tuple[int, int], ...],
    strides: tuple[int, ...],
    regress_ranges: tuple[tuple[float, float], ...],
    radius: float | None,
) -> int:
    """Rows or columns that a box can own on any level, plus one so that rounding loses none."""
    if radius is not None:
        return math.ceil(2 * radius) + 1
    longest = [
        min(max(size), high / stride)
        for size, (_, high), stride in zip(map_sizes, regress_ranges, strides, strict=True)
    ]
    return max(math.ceil(length) for length in longest) + 1


def _make_range_tensors(ranges: tuple[tuple[float, float], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # cached: must serve training too
        return vector([low for low, _ in ranges], device), vector([high for _, high in ranges], device)


_cached_range_tensors = lru_cache(maxsize=64)(_make_range_tensors)
