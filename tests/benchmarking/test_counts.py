"""What the goals P4 and P5 count. Times are not tested: `python -m benchmarks` measures them."""

from __future__ import annotations

import pytest
from benchmarks.host_syncs import ours as waits_of_run
from benchmarks.kernels import kernels, ours

from msil.detection import FCOSHead, VFNetHead


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


@pytest.mark.parametrize(("head", "at_most"), [(FCOSHead, 160), (VFNetHead, 200)])
def test_kernels_of_assignment_and_loss(head: type[FCOSHead] | type[VFNetHead], at_most: int) -> None:
    """As many for any number of images and boxes. MMDetection has 327, and 724 to 936 for VFNet."""
    counts = {kernels(*ours(head(80), images, boxes)) for images, boxes in ((1, 0), (1, 1), (2, 60), (8, 200))}
    assert len(counts) == 1, counts
    ((forward, _),) = counts
    assert 50 < forward <= at_most
