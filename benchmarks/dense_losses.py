"""P15: assignment, losses and gradients of ATSS, GFL, RetinaNet and TOOD against MMDetection 3.3's, 22,400 points, 60
boxes in each of two images, 80 classes.

    python -m benchmarks.dense_losses

Needs the extra `benchmarks`. Ours is DenseHead.loss, MMDetection's is loss_by_feat, from the same numbers. RetinaNet
has nine anchors a point. TOOD's boxes are decoded; its scores are logits here and probabilities there, whose gradients
are compared by the chain rule. It comes twice: with its task-aligned assignment, and in its warm-up with ATSS's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.compare import REPEATS, Row, faster, interleaved, relative_difference, run
from benchmarks.mmdetection import atss_head, gfl_head, instances, retinanet_head, tood_head
from benchmarks.scenes import IMAGE, ground_truth, map_sizes, num_points
from benchmarks.vfnet_loss import as_maps
from msil.detection import ATSSHead, DenseHead, GFLHead, Predictions, RetinaNetHead, Target, TOODHead

IMAGES, CLASSES, BOXES = 2, 80, 60
GOAL = 4.0


class Case(NamedTuple):
    """Both heads and what their losses take: logits (N, P, 80), raw boxes (N, P, D) and perhaps centre-ness (N, P).
    their_scores (N, P, 80): what theirs takes in place of the logits."""

    ours: DenseHead
    theirs: Any
    tensors: list[Tensor]
    their_scores: Tensor


def case_of(ours: DenseHead, theirs: Any) -> Case:
    """With raw outputs as of a net early in training."""
    generator = torch.Generator().manual_seed(1)
    shape = (IMAGES, num_points() * ours.priors.per_cell)
    logits = torch.randn(*shape, CLASSES, generator=generator) - 4
    if isinstance(ours, TOODHead):
        priors = ours.priors(map_sizes(), torch.device("cpu"))
        reach = 8 * torch.rand(*shape, 4, generator=generator) * torch.tensor([-1, -1, 1, 1])
        box = (priors.centers / priors.strides[:, None]).repeat(1, 2) + reach
    else:
        box = torch.randn(*shape, ours.coder.channels, generator=generator)
    tensors = [logits, box]
    if isinstance(ours, ATSSHead):
        tensors.append(torch.randn(*shape, generator=generator))
    scores = logits.sigmoid() if isinstance(ours, TOODHead) else logits.clone()
    return Case(ours, theirs, [tensor.requires_grad_() for tensor in tensors], scores.requires_grad_())


def ours_of(case: Case, targets: list[Target]) -> list[Tensor]:
    """The losses, and the gradients of their sum by the raw outputs."""
    logits, box, quality = (*case.tensors, None)[:3]
    losses = case.ours.loss(Predictions(logits, box, map_sizes(), quality), targets, [IMAGE] * IMAGES)
    return with_gradients(list(losses.values()), case.tensors)


def theirs_of(case: Case, truth: tuple[list[Any], list[dict[str, Any]]]) -> list[Tensor]:
    tensors = [case.their_scores, *case.tensors[1:]]
    maps = [as_maps(t if t.dim() == 3 else t[..., None], per_cell=case.ours.priors.per_cell) for t in tensors]
    losses = case.theirs.loss_by_feat(*maps, *truth)
    return with_gradients([torch.stack(list(levels)).sum() for levels in losses.values()], tensors)


def with_gradients(losses: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
    gradients = torch.autograd.grad(torch.stack(losses).sum(), tensors)
    return [*(loss.detach() for loss in losses), *gradients]


def check(case: Case, ours: list[Tensor], theirs: list[Tensor]) -> str:
    terms = len(ours) - len(case.tensors)
    loss = max(float((a - b).abs() / b) for a, b in zip(ours[:terms], theirs[:terms], strict=True))
    if isinstance(case.ours, TOODHead):  # by the logits
        p = case.their_scores.detach()
        theirs = [*theirs[:terms], theirs[terms] * p * (1 - p), *theirs[terms + 1 :]]
    gradient = max(relative_difference(a, b) for a, b in zip(ours[terms:], theirs[terms:], strict=True))
    assert loss < 1e-5 and gradient < 1e-5, (loss, gradient)
    return f"{terms} losses to {loss:.0e}, gradients to {gradient:.0e}"


def tood(epoch: int) -> tuple[DenseHead, Any]:
    head = TOODHead(CLASSES)
    head.set_epoch(epoch)
    return head, tood_head(CLASSES, epoch)


def measure() -> Iterator[Row]:
    heads: dict[str, Callable[[], tuple[DenseHead, Any]]] = {
        "ATSS": lambda: (ATSSHead(CLASSES), atss_head(CLASSES)),
        "GFL": lambda: (GFLHead(CLASSES), gfl_head(CLASSES)),
        "RetinaNet": lambda: (RetinaNetHead(CLASSES), retinanet_head(CLASSES)),
        "TOOD": partial(tood, 4),
        "TOOD, warm-up": partial(tood, 0),
    }
    targets = ground_truth(IMAGES, BOXES)
    truth = instances(targets, IMAGE)
    for name, make in heads.items():
        case = case_of(*make())
        ways = {"ours": partial(ours_of, case, targets), "anchor": partial(theirs_of, case, truth)}
        agreement = check(case, ways["ours"](), ways["anchor"]())
        seconds = interleaved(ways, repeats=REPEATS if name == "RetinaNet" else 15)
        yield faster(f"P15 {name} assignment + loss", seconds["ours"], seconds["anchor"], GOAL, agreement)


if __name__ == "__main__":
    run(measure, __doc__)
