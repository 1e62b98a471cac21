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

from msil.detection.structures import aligned_giou, aligned_iou

# Logits (..., 1) at the labelled classes -> the loss of each as an object's, and its derivative.
ObjectTerm = Callable[[Tensor], tuple[Tensor, Tensor]]

# Logits that a CPU takes at a time: their temporaries stay in its second-level cache, for a third of the time.
BLOCK = 32768

# MMDetection divides by avg_factor + float32's epsilon.
EPSILON = torch.finfo(torch.float32).eps


def mean_across_ranks(values: Tensor, at_least: Sequence[float] = ()) -> Tensor:
    """The element-wise mean of a small tensor (V,) over all processes of the default group; itself without one.

    at_least: lower limits of the totals, one an element. MMDetection limits the mean: below the limit its loss on
    several GPUs is not that of the whole batch on one; ours always is.
    """
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if ranks > 1:
        values = values.detach().clone()
        dist.all_reduce(values)
    if at_least:
        values = torch.stack([value.clamp(min=limit) for value, limit in zip(values.unbind(), at_least, strict=True)])
    return values if ranks == 1 else values / ranks


class _ClassificationLoss(torch.autograd.Function):
    """The background term over all logits (R, K), replaced at each labelled one; the gradient in the same pass."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        ignored: Tensor | None,
        background_weight: float,
        object_term: ObjectTerm,
    ) -> Tensor:
        classes, labels = logits.shape[1], labels.reshape(-1, 1)
        background = labels >= classes
        index = labels.clamp(max=classes - 1)
        labelled = logits.gather(1, index)
        as_object, object_grad = object_term(labelled)
        # None of the ignored has a label.
        weight = background_weight if ignored is None else torch.where(ignored.reshape(-1, 1), 0.0, background_weight)
        # Left out and not subtracted again, which would cancel all digits of the sum of saturated logits.
        if torch.compiler.is_compiling():  # a scatter into the logits would keep it from being one pass
            loss, grad = _focal_term(logits, weight)
            _, background_grad = _focal_term(labelled, weight)
            total = loss.masked_fill(torch.arange(classes, device=logits.device) == labels, 0).sum()
        else:
            grad, totals = torch.empty_like(logits), []
            without = torch.where(background, labelled, -torch.inf)  # whose loss and gradient are 0
            size = max(BLOCK // classes, 1) if logits.device.type == "cpu" else max(len(logits), 1)
            rows = [tensor.split(size) for tensor in (logits, index, without, grad)]
            weights = weight.split(size) if isinstance(weight, Tensor) else [weight] * len(rows[0])
            for block, place, value, out, part in zip(*rows, weights, strict=True):
                totals.append(_focal_term(block.scatter(1, place, value), part, out)[0].sum())
            background_grad = grad.gather(1, index)
            total = totals[0] if len(totals) == 1 else torch.stack(totals).sum()
        grad.scatter_(1, index, torch.where(background, background_grad, object_grad))
        total = total + as_object.masked_fill(background, 0).sum()
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_outputs[0], None, None, None, None


def _classification_loss(
    logits: Tensor, labels: Tensor, ignored: Tensor | None, background_weight: float, object_term: ObjectTerm
) -> Tensor:
    rows = logits.float().reshape(-1, logits.shape[-1])
    return _ClassificationLoss.apply(rows, labels, ignored, background_weight, object_term)  # pyright: ignore[reportReturnType]


def _focal_term(logits: Tensor, weight: float | Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """weight * p^2 * softplus(x) with p = sigmoid(x), and its derivative by x, into `out` if given."""
    if logits.device.type == "cpu":
        p, q, softplus = _fast_sigmoids(logits)
    else:
        p, q, softplus = torch.sigmoid(logits), torch.sigmoid(-logits), F.softplus(logits)
    factor = p.square().mul_(weight)
    return factor * softplus, torch.addcmul(p, softplus, q, value=2, out=out).mul_(factor)


def _fast_sigmoids(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sigmoid(x), sigmoid(-x) and softplus(x) within a few ulp, by one vectorised exponential and one logarithm.

    log(1 + e) of a small e = exp(x) suffers from the rounding of s = 1 + e: so (Higham, Accuracy and Stability of
    Numerical Algorithms, section 1.14.1) log(s) / (s - 1), which that rounding hardly changes, times e.
    """
    e = x.clamp(max=80).exp_()  # above, p is 1 and softplus x itself
    s = (e + 1).clamp_(min=1 + torch.finfo(x.dtype).eps)  # not 1, where 0 / 0 has the limit 1
    q, below = s.reciprocal(), s - 1
    softplus = s.log_().div_(below).mul_(e).clamp_(min=x)
    return e.mul_(q), q, softplus


def sigmoid_focal_loss(logits: Tensor, labels: Tensor, ignored: Tensor | None = None) -> Tensor:
    """Sum of the focal loss (arXiv 1708.02002, alpha 0.25, gamma 2) over all priors and classes -> scalar.

    logits (..., K); labels (...) int64 in [0, K], K meaning background; ignored (...) bool: background priors that do
    not count.
    """

    def object_term(logits: Tensor) -> tuple[Tensor, Tensor]:
        loss, grad = _focal_term(-logits, 0.25)
        return loss, -grad

    return _classification_loss(logits, labels, ignored, 0.75, object_term)


def varifocal_loss(logits: Tensor, labels: Tensor, quality: Tensor, ignored: Tensor | None = None) -> Tensor:
    """Sum of the varifocal loss (arXiv 2008.13367, eq. 2) over all priors and classes -> scalar.

    q * BCE(p, q) at a prior's class, 0.75 * p^2 * BCE(p, 0) everywhere else; the gradient passes through the weight
    p^2 too. logits, labels, ignored as in `sigmoid_focal_loss`; quality (...) the targets q in (0, 1] at the
    priors that are not background, without gradient.
    """
    target = quality.detach().float().reshape(-1, 1)

    def object_term(logits: Tensor) -> tuple[Tensor, Tensor]:
        entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return target * entropy, target * (torch.sigmoid(logits) - target)

    return _classification_loss(logits, labels, ignored, 0.75, object_term)


def quality_focal_loss(logits: Tensor, labels: Tensor, quality: Tensor, ignored: Tensor | None = None) -> Tensor:
    """Sum of the quality focal loss (arXiv 2006.04388, eq. 5, beta 2) over all priors and classes -> scalar.

    |q - p|^2 * BCE(p, q) at a prior's class, p^2 * BCE(p, 0) everywhere else; the gradient passes through both
    weights. Arguments as in `varifocal_loss`, q in [0, 1].
    """
    target = quality.detach().float().reshape(-1, 1)

    def object_term(logits: Tensor) -> tuple[Tensor, Tensor]:
        entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        p, q = torch.sigmoid(logits), torch.sigmoid(-logits)
        error = p - target
        return error.square() * entropy, error * (2 * p * q * entropy + error.square())

    return _classification_loss(logits, labels, ignored, 1.0, object_term)


def distribution_focal_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the distribution focal loss (arXiv 2006.04388, eq. 6) over the four sides -> scalar.

    Cross-entropy to the two whole numbers next to a target, by its nearness to each. logits (..., 4 (n + 1)): of each
    side over 0 ... n. targets (..., 4) in strides, clamped to [0, n - 0.1]. weights (...) >= 0; where it is 0 the
    predictions get a zero gradient.
    """
    logits = logits.float().unflatten(-1, (4, -1))
    targets = targets.clamp(0, logits.shape[-1] - 1 - 0.1)
    logits = logits.masked_fill((weights == 0)[..., None, None], 0)
    lower = targets.floor()
    near = torch.stack([lower + 1 - targets, targets - lower], dim=-1)
    index = torch.stack([lower, lower + 1], dim=-1).long()
    entropy = -logits.log_softmax(-1).gather(-1, index)
    return ((entropy * near).sum((-2, -1)) * weights).sum()


def l1_loss(predicted: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """Sum of |predicted - targets| (..., 4) where counted (...) bool -> scalar."""
    return (predicted.float() - targets).masked_fill(~counted[..., None], 0).abs().sum()


def centerness_targets(distances: Tensor) -> Tensor:
    """sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) of distances (..., 4), all positive -> (...) in (0, 1]."""
    first, second = distances[..., :2], distances[..., 2:]  # left and top; right and bottom
    ratios = torch.minimum(first, second) / torch.maximum(first, second)
    return (ratios[..., 0] * ratios[..., 1]).sqrt()


def box_loss(distances: Tensor, targets: Tensor, weights: Tensor, kind: str) -> Tensor:
    """Weighted sum of the IoU ("iou": -log IoU, clamped to >= 1e-6) or GIoU ("giou": 1 - GIoU) loss -> scalar.

    distances, targets (..., 4): left, top, right, bottom from the same point, or `edges` of boxes. weights (...) >= 0;
    where it is 0 the predictions get a zero gradient whatever they are. Of several sets of predictions for the same
    targets, distances (S, ..., 4) and weights (S, ...), each has its own sum -> (S,).
    """
    summed = tuple(range(1 - targets.dim(), 0))
    unused = (weights == 0)[..., None]
    distances, targets = distances.float().masked_fill(unused, 1), targets.masked_fill(unused, 1)
    if kind == "giou":
        loss = 1 - aligned_giou(distances, targets)
    elif kind == "iou":
        loss = -aligned_iou(distances, targets).clamp(min=1e-6).log()
    else:
        raise ValueError(f"the box loss must be iou or giou, not {kind!r}.")
    return (loss * weights).sum(dim=summed)


@torch.no_grad()
def box_quality(distances: Tensor, targets: Tensor, positive: Tensor) -> Tensor:
    """IoU of the predicted with the true box at each positive point, at least 1e-6; 0 elsewhere; without gradient.

    distances, targets (..., 4): as in `box_loss`. positive (...) bool. Several sets of
    predictions for the same targets: distances (S, ..., 4) -> (S, ...).
    """
    return torch.where(positive, aligned_iou(distances.float(), targets).clamp(min=1e-6), 0)


def centerness_loss(logits: Tensor, targets: Tensor, positive: Tensor) -> Tensor:
    """Sum over the positive points of the binary cross-entropy of logits (...) with targets (...) in [0, 1]."""
    loss = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none")
    return torch.where(positive, loss, 0).sum()
