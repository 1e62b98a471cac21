"""P2: FCOS's assignment, loss and gradients against torchvision's, 22,400 points, 60 boxes in each of two images.

    python -m benchmarks.fcos_loss

Ours is FCOSHead.loss from the raw outputs of a head, eager and with its tensor part compiled as trainer.compile does;
torchvision's is FCOS.compute_loss. The points are torchvision's (see fcos_assignment). torchvision does not weigh its
box loss by centre-ness, so that term is compared, forward and backward, with our box_loss without weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxLinearCoder
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.fcos import FCOSHead as TorchvisionHead

from benchmarks.compare import MANY, Row, faster, interleaved, run
from benchmarks.fcos_assignment import anchors, as_dicts
from benchmarks.scenes import IMAGE, ground_truth, map_sizes, raw_outputs
from msil.detection import FCOSHead, Predictions, Target
from msil.detection.losses import box_loss

Losses = dict[str, Tensor]


class Torchvision:
    """From raw outputs and targets to torchvision's three losses."""

    def __init__(self, images: int) -> None:
        self.head = mock.Mock(box_coder=BoxLinearCoder(normalize_by_size=True))
        self.net = mock.Mock(center_sampling_radius=1.5)
        self.net.head.compute_loss = lambda *arguments: TorchvisionHead.compute_loss(self.head, *arguments)
        self.anchors, self.levels = anchors(images)

    def __call__(self, outputs: list[Tensor], targets: list[dict[str, Tensor]]) -> Any:
        logits, distances, centerness = outputs
        named = {"cls_logits": logits, "bbox_regression": distances, "bbox_ctrness": centerness[..., None]}
        return FCOS.compute_loss(self.net, targets, named, self.anchors, self.levels)  # pyright: ignore


def loss_of(head: FCOSHead, outputs: list[Tensor], targets: list[Target]) -> Losses:
    logits, distances, centerness = outputs
    return head.loss(Predictions(logits, distances, map_sizes(), centerness), targets, [IMAGE] * len(targets))


def step(loss: Callable[..., Losses], outputs: list[Tensor], targets: list[Any]) -> tuple[Tensor, ...]:
    """Losses and their gradients by the outputs."""
    return torch.autograd.grad(torch.stack(list(loss(outputs, targets).values())).sum(), outputs)


def unweighted_box_loss(head: FCOSHead, outputs: list[Tensor], targets: list[Target]) -> Tensor:
    """torchvision's box term by our functions: every positive point counts 1."""
    predictions = Predictions(outputs[0], outputs[1], map_sizes(), outputs[2])
    found = head.targets(predictions, targets, [IMAGE] * len(targets))
    distances, positive = head.coder.encode(head.priors_of(predictions), found.boxes), found.positive.float()
    return box_loss(outputs[1], distances, positive, "giou") / positive.sum()


def check(head: FCOSHead, theirs: Losses, outputs: list[Tensor], targets: list[Target]) -> str:
    """Asserts that each term and its gradients agree; says how well."""
    logits, distances, centerness = outputs
    ours = loss_of(head, outputs, targets)
    box = unweighted_box_loss(head, outputs, targets)
    pairs = (
        (ours["loss_cls"], theirs["classification"], logits),
        (box, theirs["bbox_regression"], distances),
        (ours["loss_centerness"], theirs["bbox_ctrness"], centerness),
    )
    loss = max(float((a - b).detach().abs() / b.detach()) for a, b, _ in pairs)
    gradient = 0.0
    for a, b, output in pairs:
        (mine,) = torch.autograd.grad(a, output, retain_graph=True)
        (other,) = torch.autograd.grad(b, output, retain_graph=True)
        gradient = max(gradient, float((mine - other).abs().max()))
    assert loss < 1e-5 and gradient < 1e-6, (loss, gradient)
    return f"losses to {loss:.0e}, gradients to {gradient:.0e}"


def measure() -> Iterator[Row]:
    theirs = Torchvision(images=2)
    outputs = [tensor.requires_grad_() for tensor in raw_outputs(images=2)]
    head, compiled = FCOSHead(80, point_offset=0.0), FCOSHead(80, point_offset=0.0)
    compiled.padded_loss = torch.compile(compiled.padded_loss)
    for boxes, heads in ((60, {"eager": (head, 5), "compiled": (compiled, 10)}), (7, {"eager": (head, None)})):
        targets = ground_truth(images=2, boxes=boxes)
        dicts = as_dicts(targets)
        reference = theirs(outputs, dicts)
        agreements = {way: check(ours, reference, outputs, targets) for way, (ours, _) in heads.items()}
        ways = {way: partial(step, partial(loss_of, ours), outputs, targets) for way, (ours, _) in heads.items()}
        seconds = interleaved({**ways, "anchor": partial(step, theirs, outputs, dicts)}, repeats=MANY)
        for way, (_, goal) in heads.items():
            name = f"P2 FCOS assignment + loss, {way}, 2 x {boxes} boxes"
            yield faster(name, seconds[way], seconds["anchor"], goal, agreements[way])


if __name__ == "__main__":
    run(measure, __doc__)
