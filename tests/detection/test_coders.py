"""Box coders against hand arithmetic and themselves; against MMDetection's numbers in test_golden_heads."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from msil.detection.coders import BoxCoder, Corners, Deltas, Distances, Integral
from msil.detection.priors import PriorGenerator, Priors

CPU = torch.device("cpu")
CODERS = {
    "distances": Distances(),
    "distances in strides": Distances(by_stride=True),
    "deltas": Deltas(),
    "deltas of ATSS": Deltas(stds=(0.1, 0.2)),
    "corners": Corners(),
}


def priors_of(boxes: Tensor, strides: Tensor | None = None, centers: Tensor | None = None) -> Priors:
    strides = torch.ones(len(boxes)) if strides is None else strides
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2 if centers is None else centers
    return Priors(boxes, centers, strides, PriorGenerator((8,))(((1, 1),), CPU).grid)


def test_by_hand() -> None:
    anchor = torch.tensor([[10.0, 20.0, 30.0, 60.0]])  # 20 x 40 around (20, 40)
    priors = priors_of(anchor, torch.tensor([4.0]))
    # centre (20 + 0.5 * 20, 40 - 0.25 * 40), sides 20 * 2 and 40 / 2; then the clamp, 1000 / 16 times as large or small
    raw = torch.tensor([[0.5, -0.25, math.log(2), -math.log(2)], [0, 0, 9, -9]])
    expected = torch.tensor([[10.0, 20, 50, 40], [20 - 625, 40 - 0.32, 20 + 625, 40 + 0.32]])
    torch.testing.assert_close(Deltas().decode(priors, raw), expected)
    # by its stds, what the network puts out is the smaller part
    torch.testing.assert_close(
        Deltas((0.1, 0.2)).decode(priors, raw[:1] / torch.tensor([0.1, 0.1, 0.2, 0.2])), expected[:1]
    )
    torch.testing.assert_close(Deltas((0.1, 0.2)).encode(priors, expected[:1])[0, :2], torch.tensor([5.0, -2.5]))
    assert Distances(by_stride=True).encode(priors, anchor).tolist() == [[2.5, 5, 2.5, 5]]
    assert Corners().encode(priors, anchor).tolist() == [[2.5, 5, 7.5, 15]]
    assert Corners().decode(priors, torch.tensor([[2.5, 5, 7.5, 15]])).tolist() == anchor.tolist()


@pytest.mark.parametrize("name", CODERS)
def test_what_is_encoded_is_decoded(name: str) -> None:
    """Of two images' boxes (2, P, 4) for priors (P,)."""
    coder: BoxCoder = CODERS[name]
    generator = torch.Generator().manual_seed(0)
    priors = PriorGenerator((8, 32), scales=(2.0, 4.0))(((4, 5), (1, 2)), CPU)
    corners = 300 * torch.rand(2, len(priors.boxes), 4, generator=generator) - 50
    boxes = torch.cat([corners[..., :2], corners[..., :2] + corners[..., 2:].abs() + 1], -1)
    raw = coder.encode(priors, boxes)
    assert raw.shape[-1] == coder.channels
    torch.testing.assert_close(coder.decode(priors, raw), boxes, rtol=1e-5, atol=1e-3)


def test_integral_decodes_the_distribution_that_its_loss_asks_for() -> None:
    # around (8, 16) with stride 8: distances 1.25, 2.5, 3, 15.75 in strides
    coder, priors = Integral(), priors_of(torch.zeros(1, 4), torch.tensor([8.0]), torch.tensor([[8.0, 16.0]]))
    box = torch.tensor([[-2.0, -4.0, 32.0, 142.0]])
    distances = coder.encode(priors, box)
    assert distances.tolist() == [[1.25, 2.5, 3, 15.75]]
    shares = torch.zeros(4, 17)
    shares[[0, 0, 1, 1, 2, 3, 3], [1, 2, 2, 3, 3, 15, 16]] = torch.tensor([0.75, 0.25, 0.5, 0.5, 1, 0.25, 0.75])
    torch.testing.assert_close(coder.decode(priors, shares.log().view(1, 68)), box)
    with torch.autocast("cpu", torch.bfloat16):  # 15.75 has more digits than bfloat16
        torch.testing.assert_close(coder.decode(priors, shares.log().view(1, 68)), box)
