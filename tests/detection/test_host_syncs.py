"""A training step never makes the host wait for the device.

Two witnesses on a machine without one: a dispatch mode that sees the operators which would have to, and a step on
torch's "meta" device, whose tensors have no values, so that whatever asks for one raises.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from benchmarks.operators import HostSyncs
from torch import Tensor

from msil.detection import FCOSHead, VFNetHead
from msil.detection.assign import atss_assign, ground_truth
from msil.detection.boxes import level_grid

from .cases import (
    FORMS,
    IMAGE_SIZES,
    MAP_SIZES,
    STRIDES,
    random_pyramid,
    random_targets,
    small_detector,
    small_head,
    small_vfnet,
)

HEADS = [*FORMS, "vfnet"]
# VFNet's step takes its images' sizes to the device, by a copy that nobody waits for; to a GPU from pinned memory.
SIZES_COPY = {"cpu": [], "meta": ["aten._to_copy.default, non_blocking"]}


def mask_assignment(x: Tensor) -> None:
    x[x > 0.5] = torch.zeros(2)  # a single number would be filled in, and nobody would have to count


class ReadInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.sum()

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> Tensor:
        return torch.full((4,), grad_outputs[0].item())


@pytest.mark.parametrize(
    "act",
    [
        pytest.param(lambda x: x[0].item(), id="item"),
        pytest.param(lambda x: x.sum() > 0 and None, id="truth"),
        pytest.param(lambda x: x[x > 0.5], id="mask"),
        pytest.param(mask_assignment, id="mask assignment"),
        pytest.param(lambda x: x.nonzero(), id="nonzero"),
        pytest.param(lambda x: torch.where(x > 0.5), id="where of one argument"),
        pytest.param(lambda x: x.masked_select(x > 0.5), id="masked_select"),
        pytest.param(lambda x: x.unique(), id="unique"),
        pytest.param(lambda x: torch.equal(x, x + 1), id="equal"),
        pytest.param(lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.int64)), id="repeat_interleave"),
        pytest.param(lambda x: torch.tensor([1.0, 2.0]), id="tensor of a list"),
        pytest.param(lambda x: x.new_tensor([1.0, 2.0]), id="new_tensor of a list"),
        pytest.param(lambda x: x.to("meta"), id="to another device"),
        pytest.param(lambda x: ReadInBackward.apply(x.requires_grad_()).backward(), id="item in a backward pass"),
    ],
)
def test_the_witness_sees(act: Callable[[Tensor], object]) -> None:
    x = torch.linspace(0, 1, 4)
    with HostSyncs() as syncs:
        act(x)
    assert syncs.found


@pytest.mark.parametrize("act", [lambda x: x.tolist(), lambda x: x.cpu(), lambda x: x.numpy(), lambda x: bool(x[0])])
def test_a_tensor_without_values_refuses(act: Callable[[Tensor], object]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
        act(torch.empty(4, device="meta"))


def head_of(name: str, msil: dict | None = None) -> FCOSHead | VFNetHead:
    return small_vfnet(msil) if name == "vfnet" else small_head(msil, **FORMS[name])


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("msil", [None, {}], ids=["plain", "msil"])
@pytest.mark.parametrize("name", HEADS)
def test_head_step(name: str, msil: dict | None, device: str) -> None:
    head = head_of(name, msil).to(device)
    pyramid = [level.to(device).requires_grad_() for level in random_pyramid(2)]
    targets = [target.to(device) for target in random_targets([7, 0], 256, 320, 5)]

    def step() -> None:
        losses = head.loss(head(pyramid), targets, IMAGE_SIZES)
        torch.stack(list(losses.values())).sum().backward()

    step()  # the first step makes the grids and ranges of this size
    with HostSyncs() as syncs:
        step()
    assert syncs.found == (SIZES_COPY[device] if name == "vfnet" else [])
    assert syncs.operators > 100


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("head", ["fcos", "vfnet"])
def test_whole_step_from_the_images(head: str, device: str) -> None:
    detector = small_detector({}, head).to(device)
    images = [torch.zeros(3, 64, size, dtype=torch.uint8, device=device) for size in (96, 70)]
    targets = [target.to(device) for target in random_targets([3, 2], 64, 70, 3)]

    def step() -> None:
        torch.stack(list(detector.loss(images, targets).values())).sum().backward()

    step()
    with HostSyncs() as syncs:
        step()
    assert syncs.found == (SIZES_COPY[device] if head == "vfnet" else [])


def test_ground_truth_goes_to_a_gpu_from_pinned_memory_and_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three copies, however many images: any other copy to a GPU makes the host wait."""
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


def test_the_operators_of_atss_do_not_grow_with_the_batch() -> None:
    grid = level_grid(MAP_SIZES, STRIDES, 0.0, torch.device("cpu"))
    counts = set()
    for images, slots in ((1, 8), (2, 8), (2, 128), (16, 32)):
        boxes, labels = torch.rand(images, slots, 4).sort(-1).values * 256, torch.zeros(images, slots).long()
        with HostSyncs() as syncs:
            atss_assign(boxes, labels, grid, MAP_SIZES, [(256, 320)] * images)
        assert syncs.found == SIZES_COPY["cpu"]
        counts.add(syncs.operators)
    assert len(counts) == 1, counts


@pytest.mark.parametrize("name", HEADS)
def test_the_number_of_operators_does_not_grow_with_the_boxes(name: str) -> None:
    head = head_of(name)
    predictions = head(random_pyramid(2))
    counts = {}

    def step(boxes: int) -> int:
        targets = random_targets([boxes, boxes // 2], 256, 320, 5)
        with HostSyncs() as syncs:
            torch.stack(list(head.loss(predictions, targets, IMAGE_SIZES).values())).sum().backward(retain_graph=True)
        return syncs.operators

    step(5)  # the first backward pass makes the gradients, later ones add to them
    for boxes in (0, 1, 7, 30, 60, 120):
        counts[boxes] = step(boxes)
    assert len(set(counts.values())) == 1, counts
