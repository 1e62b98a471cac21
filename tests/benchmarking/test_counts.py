"""What the goals P4 and P5 count. Times are not tested: `python -m benchmarks` measures them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from benchmarks.host_syncs import ours as waits_of_step
from benchmarks.kernels import kernels, ours
from benchmarks.operators import HostSyncs
from torch import Tensor

from msil.detection import FCOSHead, VFNetHead


@pytest.mark.parametrize("head", ["fcos", "vfnet"])
def test_no_step_waits_for_the_device(head: str) -> None:
    assert waits_of_step(head) == []


def test_a_read_in_a_step_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    step = FCOSHead.padded_loss

    def reads(self, *arguments, **keywords):
        losses = step(self, *arguments, **keywords)
        losses["loss_cls"].item()
        return losses

    monkeypatch.setattr(FCOSHead, "padded_loss", reads)
    assert waits_of_step("fcos") == ["aten._local_scalar_dense.default"]


def waits(code: Callable[[Tensor, Tensor], object]) -> int:
    """Of `code` with numbers (4,) and a mask of two of them."""
    numbers, mask = torch.arange(4.0), torch.tensor([True, False, True, False])
    with HostSyncs() as counter:
        code(numbers, mask)
    return len(counter.found)


def test_a_python_number_travels_with_its_kernel() -> None:
    """CUDA fills a slice, and where a mask says so, without the host; the number of a mask's places it must know."""
    assert waits(lambda x, mask: x[:2].fill_(1)) == 0
    assert waits(lambda x, mask: x.__setitem__(slice(2), 1)) == 0
    assert waits(lambda x, mask: x.__setitem__(mask, 1)) == 0
    assert waits(lambda x, mask: x.__setitem__(mask, x[:2].clone())) == 1
    assert waits(lambda x, mask: x.view(4, 1).__setitem__((mask, torch.zeros(2, dtype=torch.int64)), 1)) == 1
    assert waits(lambda x, mask: x[mask]) == 1
    assert waits(lambda x, mask: torch.tensor(1.0) / torch.tensor(2.0)) == 2  # copies to where they are wanted
    assert waits(lambda x, mask: x[[0, 2]]) == 1


@pytest.mark.parametrize(("head", "at_most"), [(FCOSHead, 160), (VFNetHead, 200)])
def test_kernels_of_assignment_and_loss(head: type[FCOSHead] | type[VFNetHead], at_most: int) -> None:
    """As many for any number of images and boxes. MMDetection has 327, and 724 to 936 for VFNet."""
    counts = {kernels(*ours(head(80), images, boxes)) for images, boxes in ((1, 0), (1, 1), (2, 60), (8, 200))}
    assert len(counts) == 1, counts
    ((forward, _),) = counts
    assert 50 < forward <= at_most
