"""Losses against torchvision, autograd and hand arithmetic; against MMDetection's numbers also in test_golden_heads."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss as torchvision_focal_loss

from msil.detection.losses import (
    box_loss,
    centerness_loss,
    centerness_targets,
    sigmoid_focal_loss,
    varifocal_loss,
)

from .cases import value_and_grad


@pytest.mark.parametrize("x", [-200.0, -50.0, 50.0, 200.0])
def test_focal_loss_stays_finite(x: float) -> None:
    value, grad = value_and_grad(lambda x: sigmoid_focal_loss(x, torch.tensor([0, 2])), torch.full((2, 2), x))
    assert value.isfinite() and grad.isfinite().all()
    # confidently wrong: -log p = |x|, its slope 1, times the class's weight
    expected = 0.25 * abs(x) if x < 0 else 0.75 * 3 * x
    torch.testing.assert_close(value, torch.tensor(expected), rtol=1e-4, atol=1e-3)
    assert grad[0, 0].item() == pytest.approx(-0.25 if x < 0 else 0, abs=1e-5)
    assert grad[1, 1].item() == pytest.approx(0 if x < 0 else 0.75, abs=1e-5)


def test_losses_of_bfloat16_logits_are_float32() -> None:
    logits = torch.randn(6, 4, dtype=torch.bfloat16)
    labels = torch.tensor([0, 1, 2, 3, 4, 4])
    assert torch.equal(sigmoid_focal_loss(logits, labels), sigmoid_focal_loss(logits.float(), labels))
    value, grad = value_and_grad(lambda x: sigmoid_focal_loss(x, labels), logits)
    assert value.dtype == torch.float32 and grad.dtype == torch.bfloat16
    targets, positive = torch.rand(6, 4), torch.ones(6, 4, dtype=torch.bool)
    assert torch.equal(centerness_loss(logits, targets, positive), centerness_loss(logits.float(), targets, positive))


def varifocal_by_autograd(logits: Tensor, labels: Tensor, quality: Tensor) -> Tensor:
    """Equation 2 as it stands, over all classes, the graph of p in the weight kept."""
    classes = logits.shape[-1]
    target = F.one_hot(labels, classes + 1)[..., :classes] * quality[..., None]
    p = logits.sigmoid()
    weight = torch.where(target > 0, target, 0.75 * (p - target).abs() ** 2)
    return (weight * F.binary_cross_entropy_with_logits(logits, target, reduction="none")).sum()


@pytest.mark.parametrize("classes", [1, 7])
def test_varifocal_loss_by_autograd(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    logits = 4 * torch.randn(3, 50, classes, generator=generator)
    labels = torch.randint(classes + 1, (3, 50), generator=generator)
    quality = torch.rand(3, 50, generator=generator).clamp(min=1e-6)
    quality[0, :10], quality[0, 10:20] = 1, 1e-6
    value, grad = value_and_grad(lambda x: varifocal_loss(x, labels, quality), logits)
    expected, expected_grad = value_and_grad(
        lambda x: varifocal_by_autograd(x, labels, quality.double()), logits.double()
    )
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-4, atol=1e-6)


SATURATED = [(3.0, -8.0), (12.0, -16.0)]  # logits of objects and of background


def saturated_logits(at_objects: float, elsewhere: float) -> tuple[Tensor, Tensor]:
    """Of 500 objects on 20,000 points, and the labels: as background each of them would cost far more than all do."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.full((20_000,), 10)
    labels[:500] = 3
    logits = elsewhere + 0.5 * torch.randn(20_000, 10, generator=generator)
    logits[:500, 3] += at_objects - elsewhere
    return logits, labels


@pytest.mark.parametrize(("at_objects", "elsewhere"), SATURATED)
def test_focal_loss_of_a_saturated_logits(at_objects: float, elsewhere: float) -> None:
    logits, labels = saturated_logits(at_objects, elsewhere)
    one_hot = F.one_hot(labels, 11)[:, :10].double()
    expected = torchvision_focal_loss(logits.double(), one_hot, reduction="sum")
    torch.testing.assert_close(sigmoid_focal_loss(logits, labels).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("at_objects", "elsewhere"), SATURATED)
@pytest.mark.parametrize("quality", [0.7, 1.0])
def test_varifocal_loss_of_saturated_logits(at_objects: float, elsewhere: float, quality: float) -> None:
    logits, labels = saturated_logits(at_objects, elsewhere)
    qualities = torch.full((20_000,), quality)
    expected = varifocal_by_autograd(logits.double(), labels, qualities.double())
    torch.testing.assert_close(varifocal_loss(logits, labels, qualities).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.slow
def test_compiled_losses_of_saturated_logits() -> None:
    focal, varifocal = torch.compile(sigmoid_focal_loss), torch.compile(varifocal_loss)
    for at_objects, elsewhere in SATURATED:
        logits, labels = saturated_logits(at_objects, elsewhere)
        qualities = torch.full((20_000,), 0.999)
        for compiled, eager in (
            (focal(logits, labels), sigmoid_focal_loss(logits, labels)),
            (varifocal(logits, labels, qualities), varifocal_loss(logits, labels, qualities)),
        ):
            torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=0)


def test_the_quality_gets_no_gradient_and_counts_at_labels_only() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 3, generator=generator).requires_grad_()
    labels = torch.tensor([[0, 1, 2, 3, 3, 3], [3] * 6])
    quality = torch.rand(2, 6, generator=generator).requires_grad_()
    value = varifocal_loss(logits, labels, quality)
    value.backward()
    assert quality.grad is None
    nonsense = torch.where(labels < 3, quality.detach(), math.nan)
    other, grad = value_and_grad(lambda x: varifocal_loss(x, labels, nonsense), logits.detach())
    assert torch.equal(other, value.detach())
    assert torch.equal(grad, logits.grad)
    # background alone: the focal loss's background term, of the same weight and power
    empty = torch.full((2, 6), 3)
    torch.testing.assert_close(varifocal_loss(logits, empty, quality), sigmoid_focal_loss(logits, empty))


@pytest.mark.parametrize(("name", "kind"), [("giou", "giou"), ("iou_log", "iou")])
def test_box_losses_of_the_reference(golden, name: str, kind: str) -> None:
    case = golden("primitives")
    signs = torch.tensor([-1.0, -1.0, 1.0, 1.0])  # a box is its distances from the origin, the first two negated
    boxes, others = case["box_in/pred"], case["box_in/target"] * signs
    value, grad = value_and_grad(lambda x: box_loss(x * signs, others, torch.ones(64), kind), boxes)
    torch.testing.assert_close(value, case[f"{name}/none/out"].sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, case[f"{name}/none/grad/0"], rtol=1e-4, atol=1e-6)


def test_box_losses_by_hand() -> None:
    # From one point: 4 x 4 around it against 2 to the left and top, 4 right and bottom, that is 6 x 6 holding it.
    inner, outer = torch.full((2, 4), 2.0), torch.tensor([[2.0, 2.0, 4.0, 4.0]] * 2)
    weights = torch.tensor([1.0, 0.5])
    # IoU 16 / 36, and the enclosing box is the outer one, so GIoU is the same
    torch.testing.assert_close(box_loss(inner, outer, weights, "iou"), torch.tensor(-1.5 * math.log(16 / 36)))
    torch.testing.assert_close(box_loss(inner, outer, weights, "giou"), torch.tensor(1.5 * (1 - 16 / 36)))
    # Two sets of predictions, the second of them right and without a weight at its second point: each its own sum.
    sets, weights = torch.stack([inner, outer]), torch.tensor([[1.0, 0.5], [1.0, 0.0]])
    expected = torch.tensor([1.5 * (1 - 16 / 36), 0.0])
    torch.testing.assert_close(box_loss(sets, outer, weights, "giou"), expected)


@pytest.mark.parametrize("kind", ["iou", "giou"])
def test_weight_zero_sends_nothing_whatever_is_there(kind: str) -> None:
    distances = torch.tensor([[1.0, 2.0, 3.0, 4.0], [math.inf] * 4, [math.nan] * 4, [0.0] * 4])
    targets = torch.tensor([[2.0, 2.0, 2.0, 2.0], [-1.0] * 4, [0.0] * 4, [math.nan] * 4])
    weights = torch.tensor([0.5, 0.0, 0.0, 0.0])
    value, grad = value_and_grad(lambda x: box_loss(x, targets, weights, kind), distances)
    alone, alone_grad = value_and_grad(lambda x: box_loss(x, targets[:1], weights[:1], kind), distances[:1])
    assert torch.equal(value, alone)
    assert torch.equal(grad[:1], alone_grad)
    assert (grad[1:] == 0).all()


def test_centerness_targets(golden) -> None:
    case = golden("primitives", "centerness/")
    torch.testing.assert_close(centerness_targets(case["distance"]), case["fcos"], rtol=1e-5, atol=1e-6)
    # sqrt(1/4 * 2/8) = 1/4, in the middle 1; the unit does not matter
    by_hand = centerness_targets(torch.tensor([[1.0, 8.0, 4.0, 2.0], [3.0, 5.0, 3.0, 5.0], [8.0, 64.0, 32.0, 16.0]]))
    torch.testing.assert_close(by_hand, torch.tensor([0.25, 1.0, 0.25]))


def test_centerness_loss_counts_positives_only() -> None:
    logits, targets = torch.tensor([0.0, math.log(3), 9.0]), torch.tensor([1.0, 0.5, 0.0])
    positive = torch.tensor([True, True, False])
    value, grad = value_and_grad(lambda x: centerness_loss(x, targets, positive), logits)
    # -log 1/2, and -1/2 log 3/4 - 1/2 log 1/4; slopes p - t
    expected = math.log(2) - 0.5 * (math.log(3 / 4) + math.log(1 / 4))
    torch.testing.assert_close(value, torch.tensor(expected))
    torch.testing.assert_close(grad, torch.tensor([-0.5, 0.25, 0.0]))
