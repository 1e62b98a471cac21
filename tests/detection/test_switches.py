"""The reference's numbers under trainer.channels_last and trainer.compile: the golden tests of the net, run once more.

They build nets that lie channel by channel and run eagerly. trainer.cuda_graph needs a GPU; what data.device_transforms
gives is compared bit by bit in tests/data; trainer.precision changes numbers and says so.

Of FCOS the very tests run. VFNet's second stage looks where its first pointed, thousands of pixels away under the
reference's random weights, which makes the order of a convolution's float32 sums visible: the reference is 1e-4 away
from float64 itself. So its numbers are held to float64: within 1e-5 of it, or within twice what the reference is off.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from msil.detection import DenseHead, VFNetHead
from msil.detection.backbone import ResNet
from msil.detection.fpn import FPN
from msil.detection.weights import from_mmdet

from . import test_backbone, test_fcos, test_fpn, test_golden_heads
from .cases import FORMS, IMAGE_SIZES, dense, reference_pyramid, reference_targets
from .reference import reference_head

NETS = (ResNet, FPN, DenseHead)
SETTINGS = {"score_thresh": 0.05, "nms_thresh": 0.6, "topk_candidates": 1000, "detections_per_img": 100}
REFERENCE = "head_vfnet_s3"

Golden = Any


def laid_out(forward: Callable[..., Any], seen: list[Tensor]) -> Callable[..., Any]:
    """`forward` of a net whose weights and inputs lie channels last; what went in is appended to `seen`."""

    def wrapped(net: nn.Module, features: Tensor | list[Tensor]) -> Any:
        net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        levels = [features] if isinstance(features, Tensor) else features
        levels = [level.contiguous(memory_format=torch.channels_last) for level in levels]
        seen.extend(levels)
        return forward(net, levels[0] if isinstance(features, Tensor) else levels)

    return wrapped


@pytest.fixture
def channels_last(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """All nets lie channels last; the inputs that they saw."""
    seen: list[Tensor] = []
    for net in NETS:
        monkeypatch.setattr(net, "forward", laid_out(net.forward, seen))
    return seen


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """All nets and losses are compiled; how many graphs there are."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for net in NETS:
        monkeypatch.setattr(net, "forward", torch.compile(net.forward))
    monkeypatch.setattr(DenseHead, "padded_loss", torch.compile(DenseHead.padded_loss))
    return lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]


def predictions_of(golden: Golden, form: str, run: str, settings: dict[str, Any]) -> None:
    test_golden_heads.test_predictions_of_the_reference(golden, form, run, settings)


FCOS_TESTS = {
    "FPN": test_fpn.test_outputs_are_the_references,
    **{
        f"{form} {name}": partial(test, form=form)
        for form in FORMS
        for name, test in {
            "outputs": test_fcos.test_forward_of_the_reference,
            "detections": partial(predictions_of, run="a", settings=SETTINGS),
            "A": partial(test_fcos.test_losses_and_gradients_of_the_reference, case="A"),
            "B": partial(test_fcos.test_losses_and_gradients_of_the_reference, case="B"),
            "C": partial(test_fcos.test_losses_and_gradients_of_the_reference, case="C"),
        }.items()
    },
}


@pytest.mark.parametrize("name", FCOS_TESTS)
def test_channels_last(golden: Golden, channels_last: list[Tensor], name: str) -> None:
    FCOS_TESTS[name](golden)
    assert channels_last and all(x.is_contiguous(memory_format=torch.channels_last) for x in channels_last)


def test_resnet50_channels_last(golden: Golden, channels_last: list[Tensor]) -> None:
    net = ResNet("resnet50", norm="frozen_bn")
    net.load_state_dict(from_mmdet(golden.fill(torchvision.models.resnet50().state_dict(), 10)), strict=True)
    test_backbone.assert_reference_outputs(net, golden)
    assert len(channels_last) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["head_fcos_tricks A", "head_fcos_tricks detections"])
def test_compiled(golden: Golden, compiled: Callable[[], int], name: str) -> None:
    FCOS_TESTS[name](golden)
    assert compiled() > 0


def vfnet_numbers(head: VFNetHead, pyramid: list[Tensor], golden: Golden, case: str) -> dict[str, Tensor]:
    """Outputs, losses and gradients by the names that the reference's have here."""
    pyramid = [level.requires_grad_() for level in pyramid]
    predictions = head(pyramid)
    losses = head.loss(predictions, reference_targets(golden, case), IMAGE_SIZES)
    torch.stack(list(losses.values())).sum().backward()
    numbers = {"logits": predictions.logits, "initial": predictions.first_box, "refined": predictions.box}
    for level, feature in enumerate(pyramid):
        numbers[f"feature {level}"] = feature.grad
    for name, parameter in head.named_parameters():
        numbers[name] = parameter.grad
    return {name: number.detach().double() for name, number in {**numbers, **losses}.items()}


def reference_numbers(golden: Golden, case: str) -> dict[str, Tensor]:
    outputs, arrays = golden(REFERENCE, "train_out/"), golden(REFERENCE, f"{case}/")
    numbers = {name: dense(outputs, f"{place}/") for place, name in enumerate(("logits", "initial", "refined"))}
    for name in ("loss_cls", "loss_bbox", "loss_bbox_rf"):
        numbers[name] = arrays[f"loss/{name}"]
    for key in arrays:
        if key.startswith("grad_feat/"):
            numbers[f"feature {key.removeprefix('grad_feat/')}"] = arrays[key]
    parameters = {key.removeprefix("grad/"): grad for key, grad in arrays.items() if key.startswith("grad/")}
    return {name: number.double() for name, number in {**numbers, **from_mmdet(parameters)}.items()}


def assert_as_exact(ours: dict[str, Tensor], reference: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """Nothing is further from the truth than 1e-5, or twice what the reference is, of a tensor's largest value."""

    def errors(numbers: dict[str, Tensor]) -> dict[str, float]:
        largest = {name: truth[name].abs().max().clamp(min=1e-12) for name in reference}
        return {name: float((numbers[name] - truth[name]).abs().max() / largest[name]) for name in reference}

    allowed = max(1e-5, 2 * max(errors(reference).values()))
    assert allowed < 1e-4
    off = {name: error for name, error in errors(ours).items() if error > allowed}
    assert not off, (off, allowed)


@pytest.fixture(scope="module")
def exact(golden: Golden) -> dict[str, dict[str, Tensor]]:
    """In float64, without switches: of a module's scope, so that it is made before a switch is thrown."""
    numbers = {}
    for case in "ABC":
        head = reference_head(golden, REFERENCE).double()
        numbers[case] = vfnet_numbers(head, [level.double() for level in reference_pyramid(golden)], golden, case)
    return numbers


def check_vfnet(golden: Golden, case: str, exact: dict[str, dict[str, Tensor]]) -> None:
    ours = vfnet_numbers(reference_head(golden, REFERENCE), reference_pyramid(golden), golden, case)
    reference = reference_numbers(golden, case)
    assert len(reference) == {"A": len(ours), "B": 14, "C": 6}[case]
    assert_as_exact(ours, reference, exact[case])
    for name in ("loss_cls", "loss_bbox", "loss_bbox_rf"):
        torch.testing.assert_close(ours[name], reference[name], rtol=1e-5, atol=0)


def check_vfnet_detections(golden: Golden, exact: dict[str, dict[str, Tensor]]) -> None:
    head = reference_head(golden, REFERENCE)
    ours = head.detect(head(reference_pyramid(golden)), IMAGE_SIZES, **SETTINGS)
    # A sigmoid is at most a quarter as steep as its input, whose error may be twice the reference's.
    allowed = 2 / 4 * float((reference_numbers(golden, "A")["logits"] - exact["A"]["logits"]).abs().max())
    assert allowed < 1e-4
    for image, found in enumerate(ours):
        expected = golden(REFERENCE, f"pred/a/{image}/")
        assert len(found.labels) > 0 and torch.equal(found.labels, expected["labels"])
        torch.testing.assert_close(found.boxes, expected["boxes"], rtol=0, atol=1e-2)
        torch.testing.assert_close(found.scores, expected["scores"], rtol=0, atol=allowed)


@pytest.mark.parametrize("case", ["A", "B", "C"])
def test_vfnet_channels_last(golden: Golden, exact: dict[str, Any], channels_last: list[Tensor], case: str) -> None:
    check_vfnet(golden, case, exact)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in channels_last) and len(channels_last) == 5


def test_vfnet_detections_channels_last(golden: Golden, exact: dict[str, Any], channels_last: list[Tensor]) -> None:
    check_vfnet_detections(golden, exact)
    assert len(channels_last) == 5


@pytest.mark.slow
def test_vfnet_compiled(golden: Golden, exact: dict[str, Any], compiled: Callable[[], int]) -> None:
    check_vfnet(golden, "A", exact)
    assert compiled() > 0


@pytest.mark.slow
def test_vfnet_detections_compiled(golden: Golden, exact: dict[str, Any], compiled: Callable[[], int]) -> None:
    check_vfnet_detections(golden, exact)
    assert compiled() > 0
