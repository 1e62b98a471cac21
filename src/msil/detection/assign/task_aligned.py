"""TOOD's assignment: by how well a prediction's score and box fit a ground-truth box together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from msil.detection.assign.base import GroundTruth, Match, best_box, cross_iou
from msil.detection.priors import Priors
from msil.detection.structures import boxes_to_distances, pairwise_iou

BLOCK = 512  # priors that a CPU takes at a time: their temporaries stay in its cache
CHUNK = 64  # priors of one maximum in `_best`


@dataclass(frozen=True)
class TaskAlignedAssigner:
    """Task-aligned assignment (arXiv 2108.07755, section 3.2.1) by t = score * IoU^6.

    A box's candidates are the `topk` priors of highest t, of all the image's own; positive are those with t > 0 whose
    centres lie more than 0.01 pixels inside the box. A prior of several boxes goes to the one of highest IoU, of equal
    ones to the first. The metric of a match is t, normalised so that a box's largest is its largest IoU. Priors in the
    batch's padding are ignored.

    Where t is equal the order of torch.topk decides, as in MMDetection.
    """

    topk: int = 13

    def __call__(self, priors: Priors, truth: GroundTruth, logits: Tensor, boxes: Tensor) -> Match:
        """logits (B, P, K) and boxes (B, P, 4) in pixels: what the head predicts, detached."""
        gt_boxes, labels, sizes = truth
        count, slots = len(priors.centers), gt_boxes.shape[1]
        valid = priors.valid(sizes)
        boxes = boxes * valid[..., None]  # without size, and so without IoU
        alignment = self._alignment(logits, boxes, truth)
        best, index = _best(alignment, min(self.topk, count))  # (B, G, topk)
        inside = boxes_to_distances(priors.centers[index], gt_boxes[:, :, None]).amin(-1) > 0.01
        positive = (best > 0) & inside & (labels >= 0)[..., None]
        candidates = boxes.gather(1, index.flatten(1)[..., None].expand(-1, -1, 4)).unflatten(1, index.shape[1:])
        candidate_iou = pairwise_iou(candidates, gt_boxes[:, :, None])
        match = best_box(index, positive, candidate_iou, count)

        # A box's largest t and IoU over the priors that it has won;
        own = positive & (
            match.gather(1, index.flatten(1)).view_as(index) == torch.arange(slots, device=index.device)[:, None]
        )
        largest = torch.where(own, best, 0).amax(-1)
        largest_iou = torch.where(own, candidate_iou, 0).amax(-1)
        normalised = best / (largest[..., None] + 1e-7) * largest_iou[..., None]
        metric = best.new_zeros(len(match), count + 1)
        metric.scatter_(1, torch.where(own, index, count).flatten(1), normalised.flatten(1))
        return Match(match - (~valid).long(), metric[:, :count], most=slots * index.shape[-1])

    def _alignment(self, logits: Tensor, boxes: Tensor, truth: GroundTruth) -> Tensor:
        """t of every box with every prior, (B, G, P), P filled up with -1 to a multiple of CHUNK."""
        images, count, classes = logits.shape
        row = truth.labels.clamp(min=0) + classes * torch.arange(images, device=logits.device)[:, None]
        result = boxes.new_empty(*row.shape, -(-count // CHUNK) * CHUNK)
        result[..., count:] = -1
        size = BLOCK if logits.device.type == "cpu" and not torch.compiler.is_compiling() else count
        sides = boxes.transpose(1, 2).contiguous()[:, :, None]  # (B, 4, 1, P)
        outs = result[..., :count].split(size, 2)
        for some, part, out in zip(logits.split(size, 1), sides.split(size, 3), outs, strict=True):
            of_class = some.transpose(1, 2).contiguous().flatten(0, 1)  # (B K, size)
            score = of_class.index_select(0, row.flatten()).float().sigmoid_().view_as(out)
            out.copy_(cross_iou(part, truth.boxes).square_().pow_(3).mul_(score))  # pow(6) is ten times as slow
        return result


def _best(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """topk of values (B, G, P), P a multiple of CHUNK: they lie in the `count` chunks of the highest maxima.

    On a GPU a third of the time of one topk, which sorts all of them.
    """
    chunks = values.unflatten(-1, (-1, CHUNK))
    chosen = chunks.amax(-1).topk(min(count, chunks.shape[2])).indices  # (B, G, some)
    best, place = chunks.gather(2, chosen[..., None].expand(-1, -1, -1, CHUNK)).flatten(2).topk(count)
    return best, chosen.gather(2, place // CHUNK) * CHUNK + place % CHUNK
