"""ATSS's assignment, from the boxes to the anchors: a box's nearest anchors of a level lie in a small window."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from msil.detection.assign.base import LOW_BITS, GroundTruth, Match, best_box, ordered_key, require_one_prior_a_cell
from msil.detection.priors import LevelGrid, Priors, covered
from msil.detection.structures import boxes_to_distances, pairwise_iou

_NOT_A_CANDIDATE = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class ATSSAssigner:
    """ATSS assignment (arXiv 1912.02424) of anchors centred on the corners of their cells (offset 0), one a cell.

    A box's candidates are its `topk` nearest anchors of each level, by their centres; of equally near ones the upper,
    then the left one counts (torch.topk, which MMDetection uses, promises no order). Positive are candidates whose IoU
    with the box reaches the mean plus the standard deviation (of n - 1) over the box's candidates of all levels, and
    whose centres lie more than 0.01 pixels inside the box. An anchor of several boxes goes to the one of highest IoU,
    of equal ones to the first. Anchors in the batch's padding are ignored.
    """

    topk: int = 9

    def __call__(self, priors: Priors, truth: GroundTruth) -> Match:
        require_one_prior_a_cell("ATSS assignment", priors)
        grid, (gt_boxes, labels, sizes) = priors.grid, truth
        # The nearest `topk` anchors lie in a window of topk x topk cells, wherever the centre is: a row or a column
        # that holds one holds all the nearer ones of that row or column too.
        window = min(self.topk, max(max(size) for size in grid.map_sizes))
        line, away, exists = _nearest_lines(gt_boxes, _valid_cells(sizes, grid), grid.strides, window)

        # (B, G, L, window * window), row by row
        squares = away.square()
        distance = (squares[:, :, 1, :, :, None] + squares[:, :, 0, :, None, :]).flatten(-2)
        exists = (exists[:, :, 1, :, :, None] & exists[:, :, 0, :, None, :]).flatten(-2)
        place = torch.arange(distance.shape[-1], device=gt_boxes.device)
        key = torch.where(exists, ordered_key(distance, place), _NOT_A_CANDIDATE)
        nearest = key.topk(min(self.topk, len(place)), largest=False).values  # (B, G, L, topk)
        is_candidate = nearest != _NOT_A_CANDIDATE
        place = (nearest & LOW_BITS).clamp(max=len(place) - 1)
        row, column = line[:, :, 1].gather(-1, place // window), line[:, :, 0].gather(-1, place % window)
        index = grid.starts[:, None] + row * grid.widths[:, None] + column
        index = torch.where(is_candidate, index, 0)

        target = gt_boxes[:, :, None, None]
        iou = pairwise_iou(priors.boxes[index], target)
        inside = boxes_to_distances(priors.centers[index], target).amin(-1) > 0.01
        positive = is_candidate & inside & (iou >= _mean_plus_deviation(iou, is_candidate)[..., None, None])
        positive &= (labels >= 0)[..., None, None]
        best = best_box(index, positive, iou, len(priors.centers))
        ignored = ~priors.valid(sizes)  # none of them is positive
        return Match(best - ignored.long(), most=iou[0].numel())


def _nearest_lines(boxes: Tensor, cells: Tensor, stride: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """The columns and rows nearest to every box's centre, three times (B, G, 2, L, window), x, then y: column or row,
    its distance from the centre in pixels, whether it is one of the image's own.

    cells (B, 2, L): how many columns and rows the image has on each level. stride (L,).
    """
    centre = ((boxes[..., :2] + boxes[..., 2:]) / 2)[..., None]  # (B, G, 2, 1)
    cells = cells[:, None]  # (B, 1, 2, L)
    start = torch.ceil(centre / stride - window / 2)  # of two equally far lines the first
    start = torch.minimum(start, cells - window).clamp(min=0).long()
    index = start[..., None] + torch.arange(window, device=centre.device)
    return index, (index * stride[:, None] - centre[..., None]).abs(), index < cells[..., None]


def _mean_plus_deviation(values: Tensor, counted: Tensor) -> Tensor:
    """Mean plus standard deviation (of n - 1) of the counted values (B, G, L, k) over L and k -> (B, G)."""
    count = counted.sum(dim=(-2, -1))
    mean = torch.where(counted, values, 0).sum(dim=(-2, -1)) / count
    spread = torch.where(counted, values - mean[..., None, None], 0).square().sum(dim=(-2, -1))
    return mean + (spread / (count - 1)).sqrt()


def _valid_cells(image_sizes: Tensor, grid: LevelGrid) -> Tensor:
    """Columns and rows (B, 2, L) of each level whose anchors lie in the image's own size, rounded up."""
    cells = torch.ceil(covered(image_sizes)[..., None] / grid.strides)
    return torch.minimum(cells, torch.stack([grid.widths, grid.heights]))
