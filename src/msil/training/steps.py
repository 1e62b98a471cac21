"""One step's loss where its images are spread: over processes, over parts taken one after the other, or both."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from msil.detection import Detector, Target


class SharedPadding:
    """The largest height and width among all processes' images of a step.

    All processes pad to it, because points in the padding are points: with a padding of its own each, the step would
    depend on their number. The one with the largest images sets the pace of the step anyway. The sizes are numbers of
    the host, so they travel by a group of the host (gloo) and no process waits for its GPU.
    """

    def __init__(self) -> None:
        """A call of all processes together, if there are several."""
        self.group = None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")

    def __call__(self, images: list[Tensor]) -> tuple[int, int]:
        """(height, width) for this process's images (3, H, W) of a step; all processes call this."""
        sides = [max(image.shape[-2] for image in images), max(image.shape[-1] for image in images)]
        if self.group is not None:
            largest = torch.tensor(sides)
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)  # pyright: ignore[reportArgumentType]
            sides = largest.tolist()
        return sides[0], sides[1]


def loss_by_parts(
    detector: Detector,
    images: list[Tensor],
    targets: list[Target],
    *,
    parts: int,
    pad_to: tuple[int, int],
    backward: Callable[[Tensor], None],
) -> tuple[dict[str, Tensor], Tensor]:
    """The loss of some images in `parts` parts, all but the last of which are gone through `backward` on return.

    Up to rounding the sum of the parts' gradients is that of the images together, for all parts have the divisors and
    the padding of the whole (norms that take a batch's statistics aside). At most one part's graph is in memory.

    Returns the loss terms of all images, without gradient, and a scalar to go backward through: its value is their
    sum, its gradient that of the last part.
    """
    shares = split(images, targets, parts)
    sums = [detector.loss_sums(*share, pad_to=pad_to) for share in shares]
    divisors = detector.head.divisors(torch.stack(sums).sum(0))
    terms: dict[str, Tensor] = {}
    for number, share in enumerate(shares, start=1):
        losses = detector.part_loss(*share, pad_to=pad_to, divisors=divisors)
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
