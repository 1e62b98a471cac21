"""P3: VFNet's assignment (ATSS), losses and gradients against MMDetection 3.3's, 22,400 points, 60 boxes in each of two
images, 80 classes.

    python -m benchmarks.vfnet_loss

Needs the extra `benchmarks`. Ours is VFNetHead.loss from the raw outputs of a head, eager and with its tensor part
compiled as trainer.compile does; MMDetection's is VFNetHead.loss_by_feat. Both get the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.compare import MANY, Row, faster, interleaved, run
from benchmarks.mmdetection import instances, vfnet_head
from benchmarks.scenes import IMAGE, STRIDES, ground_truth, map_sizes, raw_outputs
from msil.detection import Predictions, Target, VFNetHead

IMAGES = 2
Losses = dict[str, Tensor]


def outputs() -> list[Tensor]:
    """Logits (N, P, 80), initial and refined distances (N, P, 4) in pixels."""
    logits, distances, _ = raw_outputs(IMAGES)
    sizes = zip(map_sizes(), STRIDES, strict=True)
    strides = torch.cat([torch.full((height * width, 1), float(stride)) for (height, width), stride in sizes])
    initial = (distances + 0.5) * strides
    noise = torch.rand(initial.shape, generator=torch.Generator().manual_seed(2))
    return [
        logits.requires_grad_(),
        initial.requires_grad_(),
        ((0.7 + 0.6 * noise) * initial.detach()).requires_grad_(),
    ]


def ours_of(head: VFNetHead, tensors: list[Tensor], targets: list[Target]) -> Losses:
    logits, initial, refined = tensors
    predictions = Predictions(logits, refined, map_sizes(), first_box=initial)
    return head.loss(predictions, targets, [IMAGE] * IMAGES)


def as_maps(flat: Tensor, size: tuple[int, int] = IMAGE, per_cell: int = 1) -> list[Tensor]:
    """(N, P, C) -> (N, A C, H, W) of each level, views; A priors a cell."""
    maps = map_sizes(size)
    levels = flat.split([height * width * per_cell for height, width in maps], dim=1)
    return [
        level.unflatten(1, (*cells, per_cell)).flatten(3).permute(0, 3, 1, 2)
        for level, cells in zip(levels, maps, strict=True)
    ]


def theirs_of(head: Any, tensors: list[Tensor], truth: tuple[list[Any], list[dict[str, Any]]]) -> Losses:
    return head.loss_by_feat(*(as_maps(tensor) for tensor in tensors), *truth)


def step(loss: Callable[..., Losses], tensors: list[Tensor], truth: Any) -> list[Tensor]:
    """The three losses, and the gradients of their sum by the raw outputs."""
    losses = loss(tensors, truth)
    values = [losses[name] for name in ("loss_cls", "loss_bbox", "loss_bbox_rf")]
    gradients = torch.autograd.grad(torch.stack(values).sum(), tensors)
    return [*(value.detach() for value in values), *gradients]


def check(ours: list[Tensor], theirs: list[Tensor]) -> str:
    loss = max(float((a - b).abs() / b) for a, b in zip(ours[:3], theirs[:3], strict=True))
    gradient = max(float((a - b).abs().max()) for a, b in zip(ours[3:], theirs[3:], strict=True))
    assert loss < 1e-5 and gradient < 1e-6, (loss, gradient)
    return f"three losses to {loss:.0e}, gradients to {gradient:.0e}"


def measure() -> Iterator[Row]:
    reference = vfnet_head(80)
    eager, compiled = VFNetHead(80), VFNetHead(80)
    compiled.padded_loss = torch.compile(compiled.padded_loss)
    tensors = outputs()
    for boxes, heads in ((60, {"eager": (eager, 4.5), "compiled": (compiled, 9)}), (7, {"eager": (eager, None)})):
        targets = ground_truth(IMAGES, boxes)
        anchor = partial(step, partial(theirs_of, reference), tensors, instances(targets, IMAGE))
        ways = {way: partial(step, partial(ours_of, ours), tensors, targets) for way, (ours, _) in heads.items()}
        expected = anchor()
        agreements = {way: check(ours(), expected) for way, ours in ways.items()}
        seconds = interleaved({**ways, "anchor": anchor}, repeats=MANY)
        for way, (_, goal) in heads.items():
            name = f"P3 VFNet assignment + loss, {way}, 2 x {boxes} boxes"
            yield faster(name, seconds[way], seconds["anchor"], goal, agreements[way])


if __name__ == "__main__":
    run(measure, __doc__)
