"""Quality focal, distribution focal, L1 loss, TOOD's joint probability by hand; against MMDetection's numbers in
test_golden_heads."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from msil.detection.heads.tood import geometric_mean
from msil.detection.losses import (
    distribution_focal_loss,
    l1_loss,
    quality_focal_loss,
    sigmoid_focal_loss,
    varifocal_loss,
)

from .cases import value_and_grad

Loss = Callable[..., Tensor]
WITH_QUALITY = [quality_focal_loss, varifocal_loss]


def test_geometric_mean_of_saturated_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (24 * torch.rand(2, 400, generator=generator) - 12).unbind()
    root = (x.double().sigmoid() * y.double().sigmoid()).sqrt()
    torch.testing.assert_close(geometric_mean(x, y).double(), root.logit(), rtol=1e-5, atol=1e-5)

    ends = torch.tensor([-100.0, 0.0, 100.0])
    pairs = torch.cartesian_prod(ends, ends)
    _, grad = value_and_grad(lambda x: geometric_mean(*x.unbind(1)).sum(), pairs)
    logits = geometric_mean(*pairs.unbind(1)).view(3, 3)
    assert logits.isfinite().all() and grad.isfinite().all()
    # sqrt(e^-100 * 1) and of 1/2 * 1: -50 and -log(sqrt(2) - 1)
    assert logits[0, 2].item() == pytest.approx(-50) and logits[2, 0].item() == pytest.approx(-50)
    assert logits[1, 2].item() == pytest.approx(-math.log(math.sqrt(2) - 1))
    assert logits[2, 2] > 80


@pytest.mark.parametrize("x", [-100.0, 100.0])
def test_quality_focal_loss_of_saturated_logits(x: float) -> None:
    """|q - p|^2 times -q log p - (1 - q) log(1 - p), where p is 0 or 1 and the logarithms are 0 and -100."""
    labels, quality = torch.tensor([0, 0, 2]), torch.tensor([0.25, 1.0, 0.0])
    value, grad = value_and_grad(lambda x: quality_focal_loss(x, labels, quality), torch.full((3, 2), x))
    objects = 0.25**2 * 25 + 100 if x < 0 else 0.75**2 * 75
    background = 0 if x < 0 else 4 * 100
    torch.testing.assert_close(value, torch.tensor(objects + background), rtol=1e-6, atol=1e-6)
    # slopes (p - q)^3 at the objects' class and p^2 * p elsewhere
    slopes = [[-(0.25**3), 0], [-1, 0], [0, 0]] if x < 0 else [[0.75**3, 1], [0, 1], [1, 1]]
    torch.testing.assert_close(grad, torch.tensor(slopes, dtype=torch.float32), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss", [sigmoid_focal_loss, *WITH_QUALITY])
def test_ignored_priors_do_not_count(loss: Loss) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = 3 * torch.randn(2, 30, 4, generator=generator), torch.randint(5, (2, 30), generator=generator)
    quality = [torch.rand(2, 30, generator=generator) + 1e-3] if loss in WITH_QUALITY else []
    ignored = (labels == 4) & (torch.rand(2, 30, generator=generator) < 0.7)
    counted = ~ignored
    assert ignored.any() and (counted & (labels == 4)).any()
    value, grad = value_and_grad(lambda x: loss(x, labels, *quality, ignored), logits)
    kept = [one[counted] for one in quality]
    expected, expected_grad = value_and_grad(lambda x: loss(x, labels[counted], *kept), logits[counted])
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad[counted], expected_grad, rtol=1e-6, atol=0)
    assert not grad[ignored].any()


def test_distribution_focal_loss_by_hand() -> None:
    # Distributions over 0, 1, 2 with shares 1/2, 1/3, 1/6; targets 0.25, 1 and, beyond the ends, 0 and 1.9.
    logits = torch.tensor([1 / 2, 1 / 3, 1 / 6]).log().repeat(4)[None]
    targets = torch.tensor([[0.25, 1, -3, 7]])
    first, second, third = math.log(2), math.log(3), math.log(6)
    expected = (0.75 * first + 0.25 * second) + second + first + (0.1 * second + 0.9 * third)
    torch.testing.assert_close(distribution_focal_loss(logits, targets, torch.ones(1)), torch.tensor(expected))
    # where the weight is 0 nothing counts, whatever it is
    logits, targets = torch.cat([logits, torch.full((1, 12), math.inf)]), torch.cat([targets, torch.full((1, 4), 9e9)])
    value, grad = value_and_grad(lambda x: distribution_focal_loss(x, targets, torch.tensor([2.0, 0.0])), logits)
    torch.testing.assert_close(value, torch.tensor(2 * expected))
    assert grad[0].any() and not grad[1].any()


def test_l1_loss_by_hand() -> None:
    predicted = torch.tensor([[1.0, -2, 3, 0.5], [math.inf, 1, 1, 1]])
    targets = torch.tensor([[0.0, 1, 3, 1], [0, 0, 0, -math.inf]])  # the logarithm of a padded box's side
    value, grad = value_and_grad(lambda x: l1_loss(x, targets, torch.tensor([True, False])), predicted)
    assert value == 1 + 3 + 0 + 0.5
    assert grad.tolist() == [[1, -1, 0, -1], [0, 0, 0, 0]]
