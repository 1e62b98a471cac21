"""TOOD's assignment: by how well a prediction's score and box fit a ground-truth box together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from msil.detection.assign.base import GroundTruth, Match, best_box
from msil.detection.boxes import boxes_to_distances, pairwise_iou
from msil.detection.priors import Priors


@dataclass(frozen=True)
class TaskAlignedAssigner:
    """Task-aligned assignment (arXiv 2108.07755, section 3.2.1) by t = score^alpha * IoU^beta.

    A box's candidates are the `topk` priors of highest t, of all the image's own; positive are those with t > 0 whose
    centres lie more than 0.01 pixels inside the box. A prior of several boxes goes to the one of highest IoU, of equal
    ones to the first. The metric of a match is t, normalised so that a box's largest is its largest IoU. Priors in the
    batch's padding are ignored.

    Needs scores and boxes. Where t is equal the order of torch.topk decides, as in MMDetection.
    """

    topk: int = 13
    alpha: float = 1.0
    beta: float = 6.0

    def __call__(
        self, priors: Priors, truth: GroundTruth, scores: Tensor | None = None, boxes: Tensor | None = None
    ) -> Match:
        if scores is None or boxes is None:
            raise ValueError("task-aligned assignment needs the predicted scores and boxes.")
        gt_boxes, labels, sizes = truth
        count, slots = len(priors.centers), gt_boxes.shape[1]
        valid = priors.valid(sizes)
        class_of = labels.clamp(min=0)[..., None].expand(-1, -1, count)
        score = scores.transpose(1, 2).gather(1, class_of)  # (B, G, P): of each box's class
        iou = pairwise_iou(boxes[:, None], gt_boxes[:, :, None])
        alignment = score.pow(self.alpha) * iou.pow(self.beta)
        alignment = torch.where(valid[:, None], alignment, -1)
        best, index = alignment.topk(min(self.topk, count), dim=-1)  # (B, G, topk)
        inside = boxes_to_distances(priors.centers[index], gt_boxes[:, :, None]).amin(-1) > 0.01
        positive = (best > 0) & inside & (labels >= 0)[..., None]
        candidate_iou = iou.gather(2, index)
        match = best_box(torch.where(positive, index, count), candidate_iou, count)

        # A box's largest t and IoU over the priors that it has won;
        own = positive & (
            match.gather(1, index.flatten(1)).view_as(index) == torch.arange(slots, device=index.device)[:, None]
        )
        largest = torch.where(own, best, 0).amax(-1)
        largest_iou = torch.where(own, candidate_iou, 0).amax(-1)
        normalised = best / (largest[..., None] + 1e-7) * largest_iou[..., None]
        metric = best.new_zeros(len(match), count + 1)
        metric.scatter_(1, torch.where(own, index, count).flatten(1), normalised.flatten(1))
        return Match(match - (~valid).long(), metric[:, :count])
