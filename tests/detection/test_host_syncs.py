"""A training step has no host sync.

Checked without a GPU in two ways: a dispatch mode records the operators that synchronise, and a step runs on torch's
"meta" device, whose tensors have no values, so that reading one raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from benchmarks.operators import HostSyncs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from msil.detection import Detections
from msil.detection.assign import ground_truth
from msil.detection.heads import HEADS
from msil.detection.postprocess import mirrored, rescaled

from .cases import IMAGE_SIZES, map_sizes_of, random_pyramid, random_targets, small_detector
from .reference import FORMS, build

forms = pytest.mark.parametrize(("name", "epoch"), FORMS)


def mask_assignment(x: Tensor) -> None:
    x[x > 0.5] = torch.zeros(2)  # a scalar would be a masked fill, without a sync


class ReadInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.sum()

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> Tensor:
        return torch.full((4,), grad_outputs[0].item())


SYNCS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "mask assignment": mask_assignment,
    "where of one argument": lambda x: torch.where(x > 0.5),
    "tensor of a list": lambda x: torch.tensor([1.0, 2.0]),
    "to another device": lambda x: x.to("meta"),
    "item in a backward pass": lambda x: ReadInBackward.apply(x.requires_grad_()).backward(),
}


@pytest.mark.parametrize("name", SYNCS)
def test_syncs_are_recorded(name: str) -> None:
    x = torch.linspace(0, 1, 4)
    with HostSyncs() as syncs:
        SYNCS[name](x)
    assert syncs.found


@pytest.mark.parametrize("head", HEADS)
def test_whole_step_from_the_images(head: str) -> None:
    detector = small_detector({}, head).to("meta")
    images = [torch.zeros(3, 64, size, dtype=torch.uint8, device="meta") for size in (96, 70)]
    targets = [target.to("meta") for target in random_targets([3, 2], 64, 70, 3)]

    def step() -> None:
        torch.stack(list(detector.loss(images, targets).values())).sum().backward()

    step()  # the first step makes the priors and ranges of this size
    with HostSyncs() as syncs:
        step()
    # The images' sizes are copied asynchronously; to a GPU from pinned memory.
    assert syncs.found == ["aten._to_copy.default, non_blocking"] and syncs.operators > 100


def test_detections_go_back_to_their_images_without_a_sync() -> None:
    boxes = torch.tensor([[10.0, 20, 40, 80], [0, 0, 100, 100.00001]])
    with HostSyncs() as syncs:
        found = rescaled(mirrored(Detections(boxes, boxes[:, 0], boxes[:, 0]), 100), (100, 100), (50, 200))
    assert syncs.found == [] and syncs.operators > 5
    assert found.boxes.tolist() == [[120, 10, 180, 40], [0, 0, 200, 50]]
    outside = Detections(torch.tensor([[90.0, 20, 110, 40]]), torch.ones(1), torch.zeros(1))
    assert rescaled(outside, (100, 100), (50, 200), clip=False).boxes.tolist() == [[180, 10, 220, 20]]


class Writes(TorchDispatchMode):
    """The most elements that one scattered minimum or maximum writes to one address, and how many there are in all:
    a GPU writes those to one address one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self.all = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.scatter_reduce_.two:
            index = args[2]
            self.most = max(self.most, *(int(row.bincount().max()) for row in index))
            self.all = max(self.all, index.shape[1])
        return func(*args, **(kwargs or {}))


@forms
def test_candidates_do_not_queue_for_one_address(name: str, epoch: str) -> None:
    head = build(name, {}, epoch=epoch)
    with Writes() as writes:
        head.loss(head(random_pyramid(2)), random_targets([60, 33], 256, 320, 5), IMAGE_SIZES)
    assert writes.most * 10 <= writes.all  # the reference's maps are small: P7 has 6 cells


def test_ground_truth_goes_to_a_gpu_by_asynchronous_copies_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three copies for any number of images; a copy from pageable memory is a host sync."""
    pinned, moved = [], []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: pinned.append(id(self)) or self)
    monkeypatch.setattr(Tensor, "to", lambda self, *to, **how: moved.append((id(self), to, how)) or self)
    gpu = torch.device("cuda")
    truth = ground_truth(random_targets([3, 0, 1], 256, 320, 5), [(256, 320), (200, 300), (64, 64)], gpu)
    assert [(where, to, how) for where, to, how in moved if gpu in to] == [
        (id(part), (gpu,), {"non_blocking": True}) for part in truth
    ]
    assert pinned == [id(part) for part in truth]
    assert truth.boxes.shape == (3, 8, 4) and truth.sizes.tolist() == [[256, 320], [200, 300], [64, 64]]


@forms
def test_the_number_of_operators_does_not_grow_with_boxes_or_images(name: str, epoch: str) -> None:
    """On the meta device, whose operators are those of a GPU."""
    head, maps = build(name, epoch=epoch).to("meta"), map_sizes_of(64, 96)
    counts = {}

    def step(images: int, boxes: int) -> int:
        sizes = [(64, 96)] * images
        with torch.no_grad():
            predictions = head([level.to("meta") for level in random_pyramid(images, map_sizes=maps)])
        predictions.logits.requires_grad_(), predictions.box.requires_grad_()
        truth = ground_truth(random_targets([boxes] * images, 64, 96, 5), sizes, torch.device("meta"))
        with HostSyncs() as syncs:
            torch.stack(list(head.padded_loss(predictions, truth).values())).sum().backward()
        assert syncs.found == []
        return syncs.operators

    step(2, 1)
    for images, boxes in ((2, 0), (2, 1), (2, 7), (2, 120), (5, 60)):  # one alone may take a view for a copy
        counts[images, boxes] = step(images, boxes)
    assert len(set(counts.values())) == 1 and counts[2, 0] > 50, counts
