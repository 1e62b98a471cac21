"""The star convolution against torchvision's deformable convolution; against MMDetection's numbers in
test_golden_heads."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torchvision.ops import deform_conv2d

from msil.detection import starconv
from msil.detection.starconv import StarConv, gathered_conv

# (N, C, K, H, W)
SIZES = [(1, 1, 1, 1, 1), (2, 3, 5, 1, 7), (2, 8, 8, 6, 7), (1, 6, 3, 13, 11)]


class Inputs(NamedTuple):
    features: Tensor
    offsets: Tensor
    weight: Tensor


def random_inputs(size: tuple[int, ...], seed: int = 0, reach: float = 3.0) -> Inputs:
    batch, channels, outputs, height, width = size
    generator = torch.Generator().manual_seed(seed)
    return Inputs(
        torch.randn(batch, channels, height, width, generator=generator),
        reach * torch.randn(batch, 18, height, width, generator=generator),
        torch.randn(outputs, channels, 3, 3, generator=generator),
    )


def outputs_and_gradients(function, inputs: Inputs) -> list[Tensor]:
    """The output, and the gradients by features, offsets and weight of its product with one fixed tensor."""
    leaves = [value.detach().clone(memory_format=torch.preserve_format).requires_grad_() for value in inputs]
    out = function(*leaves)
    factor = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    return [out.detach(), *torch.autograd.grad((out * factor).sum(), leaves)]


def assert_as_torchvision(inputs: Inputs, function=gathered_conv) -> None:
    ours = outputs_and_gradients(function, inputs)
    theirs = outputs_and_gradients(lambda x, o, w: deform_conv2d(x, o, w, padding=1), inputs)
    for name, got, expected in zip(("output", "features", "offsets", "weight"), ours, theirs, strict=True):
        assert got.shape == expected.shape, name
        # float32 sums of up to 9 C products, or of all cells: 1e-5 of the largest
        allowed = 1e-5 * max(float(expected.abs().max()), 1.0)
        assert (got - expected).abs().max() <= allowed, name


@pytest.mark.parametrize("reach", [0.0, 3.0, 40.0])
@pytest.mark.parametrize("size", SIZES)
def test_as_torchvision_at_random_positions(size: tuple[int, ...], reach: float) -> None:
    for seed in range(3):
        assert_as_torchvision(random_inputs(size, seed, reach))


@pytest.mark.parametrize("size", SIZES)
def test_as_torchvision_on_grid_lines_and_on_the_border(size: tuple[int, ...]) -> None:
    """Whole offsets, and just beside: every tap on a cell, among them -1, H and W, where a neighbour stops counting."""
    inputs = random_inputs(size)
    for reach, nudge in ((1.0, 0.0), (4.0, 0.0), (4.0, 1e-4), (4.0, -1e-4)):
        whole = (reach * torch.randn(inputs.offsets.shape, generator=torch.Generator().manual_seed(1))).round()
        assert_as_torchvision(inputs._replace(offsets=whole + nudge))
        halves = torch.where(
            torch.rand(whole.shape, generator=torch.Generator().manual_seed(2)) < 0.5, whole, whole / 2
        )
        assert_as_torchvision(inputs._replace(offsets=halves))


@pytest.mark.parametrize("value", [1e9, -1e9, 1e30, math.inf, -math.inf])
def test_taps_out_of_all_bounds_read_nothing(value: float) -> None:
    inputs = random_inputs((1, 2, 3, 4, 5))
    far, outside = inputs.offsets.clone(), inputs.offsets.clone()
    far[0, [3, 8], 2, 1], outside[0, [3, 8], 2, 1] = value, 100.0
    ours = outputs_and_gradients(gathered_conv, inputs._replace(offsets=far))
    expected = outputs_and_gradients(gathered_conv, inputs._replace(offsets=outside))
    for got, same in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, same, rtol=1e-6, atol=1e-6)  # sums run in another order


def test_an_offset_that_is_no_number_is_no_index_error() -> None:
    """A net that diverges must reach the check of its loss, which says so."""
    inputs = random_inputs((1, 2, 3, 4, 5))
    inputs.offsets[0, 3, 2, 1] = math.nan
    out, *gradients = outputs_and_gradients(gathered_conv, inputs)
    # the other cells do not notice
    clean = inputs._replace(offsets=inputs.offsets.nan_to_num())
    expected, *_ = outputs_and_gradients(gathered_conv, clean)
    others = torch.ones(4, 5, dtype=torch.bool)
    others[2, 1] = False
    assert torch.equal(out[..., others], expected[..., others])
    assert [gradient.shape for gradient in gradients] == [value.shape for value in inputs]


def test_in_an_exported_graph_torchvisions_operator_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It also runs on a GPU."""
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    monkeypatch.setattr(starconv, "gathered_conv", None)
    module, inputs = StarConv(6, 4), random_inputs((2, 6, 4, 5, 7))
    expected = gathered_conv(inputs.features, inputs.offsets, module.weight)
    torch.testing.assert_close(module(inputs.features, inputs.offsets), expected, rtol=1e-5, atol=1e-5)


def test_a_star_convolution_is_one_weight() -> None:
    torch.manual_seed(0)
    module = StarConv(64, 32)
    assert [(name, tuple(value.shape)) for name, value in module.state_dict().items()] == [("weight", (32, 64, 3, 3))]
    # Kaiming's bound sqrt(6 / 9C), whose standard deviation is sqrt(2 / 9C)
    assert module.weight.abs().max() <= math.sqrt(6 / 576)
    assert module.weight.std().item() == pytest.approx(math.sqrt(2 / 576), rel=0.02)
    assert module.weight.mean().abs() < 5 * math.sqrt(2 / 576 / module.weight.numel())
