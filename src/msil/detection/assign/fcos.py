"""FCOS's assignment, from the boxes to the points: a box can own only points in a small window around it, so (B, G, L,
window) candidates are tested instead of (B, P, G). B images, G padded boxes an image, P points, L levels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from msil.detection.assign.base import GroundTruth, Match, low_bits, ordered_key, require_one_prior_a_cell
from msil.detection.priors import LevelGrid, Priors, cached_unless_compiling, vector
from msil.detection.structures import box_area

# Points whose smallest box is as large as this stay background, as in MMDetection.
MAX_AREA = 1e8
_NO_BOX = torch.iinfo(torch.int64).max

Ranges = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class FCOSAssigner:
    """FCOS assignment (arXiv 1904.01355, section 3.2; centre sampling arXiv 2006.09214).

    A point is positive for a box if it lies strictly inside it (with centre sampling: strictly inside the square of
    `center_sample_radius` strides around the box's centre, cut to the box) and the largest of the four distances to
    the full box is in the level's regress range, both ends included. Of several boxes the one of smallest area wins,
    of equal areas the first. No point is ignored, in the batch's padding either.

    regress_ranges: of the levels, pixels. center_sample_radius: in strides, None for no centre sampling.
    """

    regress_ranges: Ranges
    center_sample_radius: float | None = None

    def __call__(self, priors: Priors, truth: GroundTruth) -> Match:
        require_one_prior_a_cell("FCOS assignment", priors)
        grid, (gt_boxes, labels, _) = priors.grid, truth
        low, high = _range_tensors(self.regress_ranges, gt_boxes.device)
        index, inside, largest = _candidate_lines(gt_boxes, grid, self.center_sample_radius, self._window(grid))

        # (B, G, L, window of rows, window of columns)
        inside = inside[:, :, 1, :, :, None] & inside[:, :, 0, :, None, :]
        largest = torch.maximum(largest[:, :, 1, :, :, None], largest[:, :, 0, :, None, :])
        area = box_area(gt_boxes)
        owned = inside & (largest >= low[:, None, None]) & (largest <= high[:, None, None])
        owned &= ((labels >= 0) & (area < MAX_AREA))[..., None, None, None]

        row, column = index[:, :, 1, :, :, None], index[:, :, 0, :, None, :]
        point = grid.starts[:, None, None] + row * grid.widths[:, None, None] + column
        key = ordered_key(area, torch.arange(gt_boxes.shape[1], device=gt_boxes.device))
        # What owns nothing writes that to its own point: a slot for all of them would be one address for the atomics.
        key = torch.where(owned, key[..., None, None, None], _NO_BOX)
        best = torch.full((len(gt_boxes), len(priors.centers)), _NO_BOX, device=gt_boxes.device)
        best.scatter_reduce_(1, point.flatten(1), key.flatten(1), "amin")
        return Match(low_bits(best))  # -1 of _NO_BOX

    def _window(self, grid: LevelGrid) -> int:
        """Rows or columns that a box can own on any level, plus one so that rounding loses none."""
        if self.center_sample_radius is not None:
            return math.ceil(2 * self.center_sample_radius) + 1
        levels = zip(grid.map_sizes, self.regress_ranges, grid.level_strides, strict=True)
        longest = [min(max(size), high / stride) for size, (_, high), stride in levels]
        return max(math.ceil(length) for length in longest) + 1


def _candidate_lines(
    boxes: Tensor, grid: LevelGrid, radius: float | None, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The columns and rows whose points a box can own on each level, three times (B, G, 2, L, window), x, then y.

    Column or row, those beyond the map beginning at its first again; whether it lies in the map and inside the box (or
    its centre region); the larger of the two distances to the box's sides, pixels.
    """
    near, far = boxes[..., :2, None], boxes[..., 2:, None]  # (B, G, 2, 1)
    low, top = near, far
    if radius is not None:
        centre, reach = (near + far) / 2, radius * grid.strides
        low, top = torch.maximum(centre - reach, near), torch.minimum(centre + reach, far)  # (B, G, 2, L)
    start = torch.floor(low / grid.strides - grid.offset).clamp(min=0).long()
    index = start[..., None] + torch.arange(window, device=boxes.device)
    position = (index + grid.offset) * grid.strides[:, None]
    inside = (position > low[..., None]) & (position < top[..., None])
    cells = torch.stack([grid.widths, grid.heights])[..., None]
    inside &= index < cells
    largest = torch.maximum(position - near[..., None], far[..., None] - position)
    return index % cells, inside, largest


@cached_unless_compiling
def _range_tensors(ranges: Ranges, device: torch.device) -> tuple[Tensor, Tensor]:
    return vector([low for low, _ in ranges], device), vector([high for _, high in ranges], device)
