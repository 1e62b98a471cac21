"""P7: a training step of FCOS with ResNet-50 on the CPU, batch 2 at 320 px, against torchvision's FCOS as shipped.

    python -m benchmarks.training_step

Both from images to weights: normalising, padding, forward, loss, backward, SGD; with frozen BatchNorm, stem and first
stage frozen, as both have it with pretrained weights; 80 classes. Ours is plain FCOS (model.msil.apply=none) with
trainer.channels_last on and, beside it, off. The nets hold the same weights, and their predictions before the step are
compared. Their losses are not: torchvision puts points at corners and does not weigh its box loss;
benchmarks/fcos_loss.py compares loss and gradients.

What bounds the goal, by timing every operator: the convolutions of our step, forward and backward, without the rest;
and their rate beside that of one large matrix product.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS

from benchmarks.compare import Row, faster, interleaved, run
from benchmarks.operators import Seconds, flops, matrix_product, rates
from benchmarks.scenes import detector_like, ground_truth, torchvision_fcos
from msil.detection import Detector

SIZE = (320, 320)


def step_of(net: nn.Module, losses_of: Callable[[], dict[str, Tensor]]) -> Callable[[], None]:
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-5, momentum=0.9)

    def step() -> None:
        losses = losses_of()
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()

    return step


def measure() -> Iterator[Row]:
    theirs = torchvision_fcos(SIZE)
    last, first = (detector_like(theirs, channels_last=last) for last in (True, False))
    images = [torch.randint(256, (3, *SIZE), dtype=torch.uint8) for _ in range(2)]
    floats = [image / 255 for image in images]
    targets = ground_truth(images=2, boxes=7, size=SIZE)
    dicts = [{"boxes": target.boxes, "labels": target.labels} for target in targets]
    agreement = compared(last, theirs, images, floats)
    theirs.train()
    ways: dict[str, Callable[[], object]] = {
        "last": step_of(last, partial(last.loss, images, targets)),
        "first": step_of(first, partial(first.loss, images, targets)),
        "anchor": step_of(theirs, partial(theirs, floats, dicts)),
    }
    seconds = interleaved({**ways, "product": matrix_product()})
    yield faster("P7 FCOS R50 training step", seconds["last"], seconds["anchor"], 1.25, agreement)
    yield faster("P7 the same, channels_last=false", seconds["first"], seconds["anchor"], None, "the same weights")
    share = statistics.median(convolutions(ways["last"]) for _ in range(3))
    taken = share * seconds["last"]
    said = f"{100 * share:.0f} % of the step"
    yield faster("P7 only the convolutions of our step", taken, seconds["anchor"], None, said)
    yield rates("P7 the rate of these convolutions", flops(ways["last"]), taken, seconds["product"])


def convolutions(step: Callable[[], object]) -> float:
    """Their share of a step's CPU time, forward and backward."""
    began = time.process_time()
    with Seconds("convolution", "convolution_backward") as spent:
        step()
    return spent.total / (time.process_time() - began)


@torch.no_grad()
def compared(ours: Detector, theirs: FCOS, images: list[Tensor], floats: list[Tensor]) -> str:
    """Asserts that both nets predict the same of the same images."""
    predictions = ours.eval()(images)
    ours.train()
    theirs.eval()
    batch, _ = theirs.transform(floats)
    outputs = theirs.head(list(theirs.backbone(batch.tensors).values()))
    difference = float((predictions.logits - outputs["cls_logits"]).abs().max())
    assert difference < 1e-3, difference
    return f"logits of the same weights to {difference:.0e}"


if __name__ == "__main__":
    run(measure, __doc__)
