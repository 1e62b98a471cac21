"""RetinaNet's assignment: by the IoU of anchors and boxes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from msil.detection.assign.base import BACKGROUND, IGNORED, GroundTruth, Match, cross_iou
from msil.detection.priors import Priors

BLOCK = 512  # anchors that a CPU takes at a time: their IoU with all boxes is in its cache when it is searched


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

    def __call__(self, priors: Priors, truth: GroundTruth) -> Match:
        gt_boxes, labels, sizes = truth
        valid = priors.valid(sizes)
        # Those of the padding without size, and so without IoU.
        anchors, boxes = priors.boxes * valid[..., None], gt_boxes * (labels >= 0)[..., None]
        sides = anchors.transpose(1, 2).contiguous()[:, :, None]  # (B, 4, 1, P)
        size = BLOCK if sides.device.type == "cpu" and not torch.compiler.is_compiling() else len(priors.boxes)
        blocks, parts = [], []
        for some in sides.split(size, 3):
            iou = cross_iou(some, boxes)  # (B, G, size)
            blocks.append(iou)
            parts.append((*iou.max(dim=1), iou.amax(dim=2, keepdim=True)))
        highest, index, of_box = (torch.cat(values, -1) for values in zip(*parts, strict=True))
        match = torch.where(highest >= self.positive, index, IGNORED)
        match = torch.where(highest < self.negative, BACKGROUND, match)
        # (B, G, 1); what no anchor attains for the padding
        best = of_box.amax(dim=2, keepdim=True).where((labels >= 0)[..., None], torch.inf)
        number = torch.arange(gt_boxes.shape[1], device=best.device)[:, None]
        claimed = torch.cat([torch.where(iou == best, number, BACKGROUND).amax(dim=1) for iou in blocks], 1)
        match = torch.where(claimed >= 0, claimed, match)
        return Match(torch.where(valid, match, IGNORED))
