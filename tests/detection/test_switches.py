"""The reference's numbers under trainer.channels_last and trainer.compile: golden tests of the net, run again.

trainer.precision changes numbers; data.device_transforms is compared bit by bit in tests/data.

VFNet's second stage samples where its first pointed, thousands of pixels away under the reference's random weights,
which makes the order of a convolution's float32 sums visible: the reference's gradients are 1e-4 away from float64. So
only its losses are compared here, to 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from msil.detection import DenseHead
from msil.detection.backbone import ResNet
from msil.detection.fpn import FPN
from msil.detection.weights import from_mmdet

from . import test_backbone, test_fpn, test_golden_heads
from .cases import IMAGE_SIZES, reference_targets
from .reference import reference_head, reference_input

NETS = (ResNet, FPN, DenseHead)


def vfnet_losses(golden: Any) -> None:
    head = reference_head(golden, "head_vfnet_s3")
    losses = head.loss(head(reference_input(golden, head)), reference_targets(golden, "A"), IMAGE_SIZES)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, golden("head_vfnet_s3", "A/loss/")[name], rtol=1e-5, atol=0, check_dtype=False)


def resnet50(golden: Any) -> None:
    net = ResNet("resnet50", norm="frozen_bn")
    net.load_state_dict(from_mmdet(golden.fill(torchvision.models.resnet50().state_dict(), 10)), strict=True)
    test_backbone.assert_reference_outputs(net, golden)


TESTS: dict[str, Callable[[Any], None]] = {
    "resnet50": resnet50,
    "fpn": test_fpn.test_outputs_are_the_references,
    "fcos": lambda golden: test_golden_heads.test_losses_and_gradients_of_the_reference(
        golden, "head_fcos_tricks", "", "A"
    ),
    "fcos detections": lambda golden: test_golden_heads.test_detections_of_the_reference(
        golden, "head_fcos_tricks", "a"
    ),
    "vfnet": vfnet_losses,
}


def laid_out(forward: Callable[..., Any], seen: list[Tensor]) -> Callable[..., Any]:
    """`forward` of a net whose weights and inputs are channels last; the inputs are appended to `seen`."""

    def wrapped(net: nn.Module, features: Tensor | list[Tensor]) -> Any:
        net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        levels = [features] if isinstance(features, Tensor) else features
        levels = [level.contiguous(memory_format=torch.channels_last) for level in levels]
        seen.extend(levels)
        return forward(net, levels[0] if isinstance(features, Tensor) else levels)

    return wrapped


@pytest.mark.parametrize("name", TESTS)
def test_channels_last(golden: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    seen: list[Tensor] = []
    for net in NETS:
        monkeypatch.setattr(net, "forward", laid_out(net.forward, seen))
    TESTS[name](golden)
    assert seen and all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fcos", "fcos detections", "vfnet"])
def test_compiled(golden: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for net in NETS:
        monkeypatch.setattr(net, "forward", torch.compile(net.forward))
    monkeypatch.setattr(DenseHead, "padded_loss", torch.compile(DenseHead.padded_loss))
    TESTS[name](golden)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
