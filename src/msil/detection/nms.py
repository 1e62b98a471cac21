"""Greedy non-maximum suppression, class by class."""

from __future__ import annotations

import torch
import torchvision.ops
from torch import Tensor

_ROUNDS = 16  # each settles one more link of a chain in which boxes suppress each other


@torch.library.custom_op("msil::batched_nms", mutates_args=())
def batched_nms(boxes: Tensor, scores: Tensor, labels: Tensor, nms_thresh: float) -> Tensor:
    """torchvision.ops.batched_nms, as one operator: it branches on the number of boxes, which an export cannot follow.

    boxes (C, 4), scores (C,), labels (C,) -> indices of the boxes kept, by descending score.
    """
    return torchvision.ops.batched_nms(boxes, scores, labels, nms_thresh)


@batched_nms.register_fake
def _(boxes: Tensor, scores: Tensor, labels: Tensor, nms_thresh: float) -> Tensor:
    return labels.new_empty(torch.library.get_ctx().new_dynamic_size())


def settled_nms(boxes: Tensor, labels: Tensor, nms_thresh: float) -> tuple[Tensor, Tensor]:
    """The same of a batch, in fixed shapes: no host looks at how many boxes are left.

    A box stays if no better one that stays overlaps it. That has one solution, the greedy one, and repeating the rule
    reaches it from the best box downwards. boxes (N, C, 4) and labels (N, C) by falling score. Returns kept (N, C) bool
    and settled (N,) bool: False where the rounds did not suffice, which takes a chain of more than 16 boxes.
    """
    low = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    high = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    common = (high - low).clamp(min=0).prod(-1)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    iou = common / (area[:, :, None] + area[:, None] - common)
    # [n, i, j]: i, if it stays, suppresses j.
    suppresses = ((iou > nms_thresh) & (labels[:, :, None] == labels[:, None])).triu(1)
    kept = before = torch.ones_like(labels, dtype=torch.bool)
    for _ in range(_ROUNDS):
        before = kept
        kept = ~(suppresses & kept[:, :, None]).any(1)
    return kept, (kept == before).all(1)
