"""RetinaNet's assignment: by the IoU of anchors and boxes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from msil.detection.assign.base import BACKGROUND, IGNORED, GroundTruth, Match
from msil.detection.boxes import box_area
from msil.detection.priors import Priors


@dataclass(frozen=True)
class MaxIoUAssigner:
    """An anchor learns the box of its highest IoU from `positive` on, is background below `negative` and ignored in
    between (arXiv 1708.02002, section 4).

    Then every anchor that attains a box's highest IoU learns that box, however low it is; of several such boxes the
    last (MMDetection's MaxIoUAssigner with min_pos_iou 0; a box whose highest IoU is 0 claims all anchors that it does
    not meet). Anchors in the batch's padding are ignored.
    """

    positive: float = 0.5
    negative: float = 0.4

    def __call__(
        self, priors: Priors, truth: GroundTruth, scores: Tensor | None = None, boxes: Tensor | None = None
    ) -> Match:
        gt_boxes, labels, sizes = truth
        valid = priors.valid(sizes)
        iou = _iou(priors.boxes, gt_boxes)  # (B, G, P)
        usable = (labels >= 0)[..., None] & valid[:, None]
        iou.masked_fill_(~usable, -1)
        highest, index = iou.max(dim=1)
        match = torch.where(highest >= self.positive, index, IGNORED)
        match = torch.where(highest < self.negative, BACKGROUND, match)
        attains = (iou == iou.amax(dim=2, keepdim=True)) & usable
        number = torch.arange(gt_boxes.shape[1], device=iou.device)[:, None]
        claimed = torch.where(attains, number, BACKGROUND).amax(dim=1)
        match = torch.where(claimed >= 0, claimed, match)
        return Match(torch.where(valid, match, IGNORED))


def _iou(anchors: Tensor, boxes: Tensor) -> Tensor:
    """anchors (P, 4), boxes (B, G, 4) -> IoU (B, G, P), the union clamped to >= 1e-6; operation by operation as
    MMDetection's, whose ties at a box's highest IoU these numbers decide."""
    boxes = boxes[:, :, None]
    overlap = torch.minimum(boxes[..., 2], anchors[:, 2]).sub_(torch.maximum(boxes[..., 0], anchors[:, 0])).clamp_(0)
    overlap *= torch.minimum(boxes[..., 3], anchors[:, 3]).sub_(torch.maximum(boxes[..., 1], anchors[:, 1])).clamp_(0)
    union = (box_area(boxes) + box_area(anchors)).sub_(overlap).clamp_(min=1e-6)
    return overlap.div_(union)
