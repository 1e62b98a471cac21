"""FPN against MMDetection's numbers."""

from __future__ import annotations

import math

import pytest
import torch

from msil.detection.fpn import FPN
from msil.detection.weights import from_mmdet


def test_outputs_are_the_references(golden) -> None:
    case = golden("fpn")
    fpn = FPN([16, 32, 64], 32)
    fpn.load_state_dict(from_mmdet(golden("fpn", "on_output_relu/state/")), strict=True)
    out = fpn([case["in/1"], case["in/2"], case["in/3"]])
    assert len(out) == 5
    for level, feature in enumerate(out):
        torch.testing.assert_close(feature, case[f"on_output_relu/out/{level}"], rtol=1e-5, atol=1e-5)
    # The ReLU before P7 is what tells FCOS and VFNet from the others: the fixture must not pass without it.
    assert not torch.allclose(out[4], case["on_output/out/4"], rtol=1e-3, atol=1e-3)


def test_levels_of_odd_sizes_and_a_batch() -> None:
    # 7 -> ceil(7 / 2) = 4 -> 2 for P6 and P7; C4 of 4 x 3 is stretched to C3's own 7 x 5.
    out = FPN([2, 4, 8], 4)([torch.randn(2, 2, 7, 5), torch.randn(2, 4, 4, 3), torch.randn(2, 8, 2, 2)])
    assert [tuple(level.shape) for level in out] == [
        (2, 4, 7, 5),
        (2, 4, 4, 3),
        (2, 4, 2, 2),
        (2, 4, 1, 1),
        (2, 4, 1, 1),
    ]


def test_starts_xavier_uniform_with_zero_biases() -> None:
    torch.manual_seed(0)
    fpn = FPN([64, 128, 256], 64)
    for name, parameter in fpn.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        else:
            out_channels, in_channels, *kernel = parameter.shape
            # U(-b, b) with b = sqrt(6 / (fan_in + fan_out)) has the standard deviation b / sqrt(3).
            bound = math.sqrt(6 / ((in_channels + out_channels) * math.prod(kernel)))
            assert parameter.abs().max() <= bound
            assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name


def test_bfloat16_gradients_at_a_single_cell() -> None:
    """torch 2.14's oneDNN leaves the taps round the cell unset: they saw only zeros, so their gradient is zero."""
    torch.manual_seed(0)
    fpn = FPN([8, 8, 8], 8)
    features = [torch.randn(2, 8, size, size) for size in (8, 4, 2)]  # P6 is one cell
    for _ in range(10):
        rubbish = [torch.full((100 * size + 7,), 1e4) for size in range(200)]
        del rubbish
        fpn.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            fpn(features)[-1].float().square().sum().backward()
        gradient = fpn.fpn_convs[4].weight.grad
        middle = torch.zeros(3, 3, dtype=torch.bool)
        middle[1, 1] = True
        assert (gradient[..., ~middle] == 0).all() and gradient[..., middle].abs().max() > 0
