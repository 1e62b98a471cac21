"""Losses as sums over a whole batch: pure functions of tensors, fixed shapes, no host synchronisation.

The caller divides by the number of positives over all ranks. Values follow MMDetection 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from msil.detection.boxes import pairwise_giou, pairwise_iou

LabelledTerm = Callable[[Tensor], tuple[Tensor, Tensor]]  # logits -> the loss of each, and its derivative

# MMDetection divides by avg_factor + float32's epsilon.
EPSILON = torch.finfo(torch.float32).eps


def mean_across_ranks(values: Tensor, at_least: Sequence[float] = ()) -> Tensor:
    """The element-wise mean of a small tensor (V,) over all processes of the default group; itself without one.

    at_least: limits, one an element, that the totals are raised to before they are shared. A limit of the mean would
    be one that grows with the number of processes.
    """
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if ranks > 1:
        values = values.detach().clone()
        dist.all_reduce(values)
    if at_least:
        values = torch.stack([total.clamp(min=low) for total, low in zip(values.unbind(), at_least, strict=True)])
    return values if ranks == 1 else values / ranks


class _ClassificationLoss(torch.autograd.Function):
    """The background term over all logits, then a correction at each labelled one; the gradient in the same pass."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, background_weight: float, gamma: float, object_term: LabelledTerm
    ) -> Tensor:
        loss, grad = _focal_term(logits, background_weight, gamma)
        classes = logits.shape[-1]
        mask = (labels < classes)[..., None]
        index = labels.clamp(max=classes - 1)[..., None]
        labelled = logits.gather(-1, index)
        as_background, background_grad = _focal_term(labelled, background_weight, gamma)
        as_object, object_grad = object_term(labelled)
        grad.scatter_add_(-1, index, torch.where(mask, object_grad - background_grad, 0))
        ctx.save_for_backward(grad)
        return loss.sum() + torch.where(mask, as_object - as_background, 0).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_outputs[0], None, None, None, None


def _focal_term(logits: Tensor, weight: float, gamma: float) -> tuple[Tensor, Tensor]:
    """weight * p^gamma * softplus(x) with p = sigmoid(x), and its derivative by x."""
    p = torch.sigmoid(logits)
    softplus = F.softplus(logits)
    factor = weight * p.pow(gamma)
    return factor * softplus, factor * (gamma * (1 - p) * softplus + p)


def sigmoid_focal_loss(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sum of the focal loss (arXiv 1708.02002) over all points and classes -> scalar.

    logits (..., K); labels (...) int64 in [0, K], K meaning background.
    """

    def object_term(logits: Tensor) -> tuple[Tensor, Tensor]:
        loss, grad = _focal_term(-logits, alpha, gamma)
        return loss, -grad

    return _ClassificationLoss.apply(  # pyright: ignore[reportReturnType]
        logits.float(), labels, 1 - alpha, gamma, object_term
    )


def varifocal_loss(logits: Tensor, labels: Tensor, quality: Tensor, alpha: float = 0.75, gamma: float = 2.0) -> Tensor:
    """Sum of the varifocal loss (arXiv 2008.13367, eq. 2) over all points and classes -> scalar.

    q * BCE(p, q) at a point's class, alpha * p^gamma * BCE(p, 0) everywhere else; the gradient passes through the
    weight p^gamma too. logits (..., K); labels (...) int64 in [0, K], K meaning background; quality (...) the targets q
    in (0, 1] at the points that are no background, without gradient.
    """
    target = quality.detach().float()[..., None]

    def object_term(logits: Tensor) -> tuple[Tensor, Tensor]:
        return target * (F.softplus(logits) - target * logits), target * (torch.sigmoid(logits) - target)

    return _ClassificationLoss.apply(  # pyright: ignore[reportReturnType]
        logits.float(), labels, alpha, gamma, object_term
    )


def centerness_targets(distances: Tensor) -> Tensor:
    """sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) of distances (..., 4), all positive -> (...) in (0, 1]."""
    horizontal, vertical = distances[..., 0::2], distances[..., 1::2]
    ratio = horizontal.amin(-1) / horizontal.amax(-1) * (vertical.amin(-1) / vertical.amax(-1))
    return ratio.sqrt()


def box_loss(distances: Tensor, targets: Tensor, weights: Tensor, kind: str) -> Tensor:
    """Weighted sum of the IoU ("iou": -log IoU, clamped to >= 1e-6) or GIoU ("giou": 1 - GIoU) loss -> scalar.

    distances, targets (..., 4): left, top, right, bottom from the same point. weights (...) >= 0; where it is 0
    the predictions get a zero gradient whatever they are.
    """
    used = (weights > 0)[..., None]
    boxes = _around_origin(torch.where(used, distances.float(), 1))
    others = _around_origin(torch.where(used, targets, 1))
    if kind == "giou":
        loss = 1 - pairwise_giou(boxes, others)
    elif kind == "iou":
        loss = -pairwise_iou(boxes, others).clamp(min=1e-6).log()
    else:
        raise ValueError(f"the box loss must be iou or giou, not {kind!r}.")
    return (loss * weights).sum()


@torch.no_grad()
def box_quality(distances: Tensor, targets: Tensor, positive: Tensor) -> Tensor:
    """IoU of the predicted with the true box at each positive point, at least 1e-6; 0 elsewhere; without gradient.

    distances, targets (..., 4): left, top, right, bottom from the same point. positive (...) bool.
    """
    iou = pairwise_iou(_around_origin(distances.float()), _around_origin(targets)).clamp(min=1e-6)
    return torch.where(positive, iou, 0)


def _around_origin(distances: Tensor) -> Tensor:
    # IoU does not change under translation, so the point itself is not needed (and adds no rounding).
    return torch.cat([-distances[..., :2], distances[..., 2:]], dim=-1)


def centerness_loss(logits: Tensor, targets: Tensor, positive: Tensor) -> Tensor:
    """Sum over the positive points of the binary cross-entropy of logits (...) with targets (...) in [0, 1]."""
    loss = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none")
    return torch.where(positive, loss, 0).sum()
