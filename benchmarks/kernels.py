"""P5: kernels of assignment and loss, FCOS and VFNet, forward; and whether their number depends on batch or boxes.

    python -m benchmarks.kernels

Kernels are dispatched operators that are neither views nor allocations, from the raw outputs and the padded ground
truth of a batch to the losses. Ours are counted on the meta device, where they are those of a GPU: a CPU takes the
logits block by block. Asserted: as many for 1, 2 and 8 images and for 0, 1, 7, 60 and 200 boxes. MMDetection's heads
(extra `benchmarks`), whose shapes depend on values, are counted on the CPU at 2 images with 60 boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.compare import NotRun, Row, counted, run
from benchmarks.mmdetection import fcos_head, instances, vfnet_head
from benchmarks.operators import Kernels
from benchmarks.scenes import ground_truth, map_sizes, num_points
from benchmarks.vfnet_loss import as_maps
from msil.detection import FCOSHead, Predictions, VFNetHead
from msil.detection.assign import ground_truth as padded

SIZE: tuple[int, int] = (256, 320)
GOALS = {"FCOS": 160, "VFNet": 200}


def outputs(images: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (N, P, 80), distances (N, P, 4) and a second number a point (N, P), of the CPU."""
    points = num_points(SIZE)
    return torch.randn(images, points, 80) - 4, 1 + 7 * torch.rand(images, points, 4), torch.randn(images, points)


def ours(head: FCOSHead | VFNetHead, images: int, boxes: int) -> Callable[[], dict[str, Tensor]]:
    logits, distances, more = (tensor.to("meta").requires_grad_() for tensor in outputs(images))
    if isinstance(head, VFNetHead):
        more = (8 * distances.detach()).requires_grad_()
        predictions = Predictions(logits, distances, map_sizes(SIZE), first_box=more)
    else:
        predictions = Predictions(logits, distances, map_sizes(SIZE), more)
    truth = padded(ground_truth(images, boxes, size=SIZE), [SIZE] * images, logits.device)
    return partial(head.padded_loss, predictions, truth)


def kernels(loss: Callable[[], dict[str, Any]]) -> int:
    """Of the losses. The first call, not counted, makes grids."""
    loss()
    with Kernels() as forward:
        loss()
    return forward.count


def theirs(name: str) -> int | str:
    try:
        head = fcos_head(80) if name == "FCOS" else vfnet_head(80)
    except NotRun:
        return ""
    logits, distances, more = (tensor.requires_grad_() for tensor in outputs(2))
    # Maps as the head gives them: their flattening is a part of the loss.
    maps = [
        as_maps(tensor, SIZE) for tensor in (logits, 8 * distances, more[..., None] if name == "FCOS" else distances)
    ]
    truth = instances(ground_truth(2, 60, size=SIZE), SIZE)
    return kernels(lambda: head.loss_by_feat(*maps, *truth))


def measure() -> Iterator[Row]:
    for name, head in (("FCOS", FCOSHead(80)), ("VFNet", VFNetHead(80))):
        found = {kernels(ours(head, images, boxes)) for images in (1, 2, 8) for boxes in (0, 1, 7, 60, 200)}
        assert len(found) == 1, found
        constant = "the same for 1 to 8 images, 0 to 200 boxes"
        yield counted(f"P5 kernels of {name}'s assignment + loss", found.pop(), theirs(name), GOALS[name], constant)


if __name__ == "__main__":
    run(measure, __doc__)
