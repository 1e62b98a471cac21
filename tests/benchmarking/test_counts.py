"""What the goals P4 and P5 count. Times are not tested: `python -m benchmarks` measures them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from benchmarks.host_syncs import ours as waits_of_run
from benchmarks.kernels import kernels, ours
from benchmarks.operators import HostSyncs
from torch import Tensor

from msil.detection import FCOSHead, VFNetHead
from msil.training import divergence, step_log


@pytest.mark.parametrize("head", ["fcos", "vfnet"])
def test_no_step_of_a_run_waits_for_the_device(head: str) -> None:
    """From the batch to what is logged of it, with run.py's own trainer and callbacks; an epoch's end lies between."""
    assert waits_of_run(f"model/head={head}") == [[]] * 8  # 2 epochs of 16 images, 4 a step


def test_a_read_in_a_step_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    step = FCOSHead.padded_loss

    def reads(self, *arguments, **keywords):
        losses = step(self, *arguments, **keywords)
        losses["loss_cls"].item()
        return losses

    monkeypatch.setattr(FCOSHead, "padded_loss", reads)
    assert waits_of_run("model/head=fcos") == [["aten._local_scalar_dense.default"]] * 8


def looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "LATE", 0)


def logs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    write = step_log.StepLog._write
    monkeypatch.setattr(step_log.StepLog, "_write", lambda self, trainer, all_of_them=True: write(self, trainer))


@pytest.mark.parametrize("impatience", [looks_at_once, logs_at_once])
def test_a_number_that_is_read_before_it_has_come_is_seen(
    monkeypatch: pytest.MonkeyPatch, impatience: Callable[[pytest.MonkeyPatch], None]
) -> None:
    impatience(monkeypatch)
    assert waits_of_run("model/head=fcos") == [["Later.read"]] * 8


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
