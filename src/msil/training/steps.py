"""A step whose images are taken in parts, for less memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from msil.detection import Target
from msil.detection.torchvision_detector import AnyDetector


def loss_by_parts(
    detector: AnyDetector,
    images: list[Tensor],
    targets: list[Target],
    *,
    parts: int,
    backward: Callable[[Tensor], None],
) -> tuple[dict[str, Tensor], Tensor]:
    """The mean of the losses of `parts` parts of some images, weighed by their images, as gradient accumulation has it;
    all parts but the last have gone through `backward` on return, so that one part's graph is in memory at a time.

    Returns the loss terms without gradient, and a scalar to go backward through: its value is their sum, its gradient
    that of the last part.
    """
    shares = split(images, targets, parts)
    terms: dict[str, Tensor] = {}
    for number, (some, truth) in enumerate(shares, start=1):
        weight = len(some) / len(images)
        losses = {name: loss * weight for name, loss in detector.loss(some, truth).items()}
        total = torch.stack(list(losses.values())).sum()
        terms = {name: loss.detach() + terms.get(name, 0) for name, loss in losses.items()}
        if number == len(shares):
            break
        backward(total)
    return terms, total - total.detach() + torch.stack(list(terms.values())).sum()


def split(images: list[Tensor], targets: list[Target], parts: int) -> list[tuple[list[Tensor], list[Target]]]:
    """Images and targets in at most `parts` parts of nearly equal length, in their order."""
    ends = [len(images) * part // parts for part in range(parts + 1)]
    return [(images[start:end], targets[start:end]) for start, end in itertools.pairwise(ends) if end > start]
