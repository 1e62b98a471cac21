"""Regions, shares, maps at pixels and intervals, against counts and sums done by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from msil.metrics.energy import at_pixels, box_regions, energy_shares, image_mean, merge_levels


def shares_of(energy: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """Of a map that has a cell a pixel."""
    return energy_shares(energy, 1, 0.5, energy.shape, regions)


def regions_of(*boxes: list[float], size: tuple[int, int] = (10, 10)) -> np.ndarray:
    return box_regions(np.array(boxes), size)


def test_pixels_inside_and_near_the_border() -> None:
    regions = regions_of([2, 2, 8, 8])
    # Centres from 2.5 to 7.5: 6 x 6. Within 0.6 of the outline: the ring just inside (6 * 6 - 4 * 4) and the one just
    # outside without its corners (4 * 6), which are sqrt(0.5) = 0.71 away.
    assert regions[0].sum() == 36 and regions[0][2:8, 2:8].all()
    assert regions[1].sum() == 20 + 24
    assert regions[1][1, 2] and not regions[1][1, 1] and not regions[1][3, 3]


def test_boxes_are_joined_and_may_leave_the_image() -> None:
    whole = regions_of([-5, -5, 5, 10], [3, 0, 20, 30], [-30, -30, -20, -20], [40, 40, 50, 50])
    assert whole[0].all()
    # Of the first box only the right side (x = 5, reach 1) runs through the image, of the second the left (x = 3,
    # reach 1.7) and, at y = 0, the top.
    row = whole[1][6]
    np.testing.assert_array_equal(np.flatnonzero(row), [1, 2, 3, 4, 5])  # 1.5 ... 4.5 near 3, 4.5 and 5.5 near 5
    assert whole[1][0, 9] and not whole[1][5, 9]


def test_shares_of_known_maps() -> None:
    regions = regions_of([2, 2, 8, 8])
    flat = np.full((10, 10), 7.0)
    assert shares_of(flat, regions) == pytest.approx((0.36, 0.44))
    for place, expected in (((5, 5), (1, 0)), ((2, 4), (1, 1)), ((1, 4), (0, 1)), ((0, 0), (0, 0))):
        delta = np.zeros((10, 10))
        delta[place] = 3
        assert tuple(shares_of(delta, regions)) == expected
    # 1 everywhere and 3 more at one point inside: (36 + 3) / (100 + 3).
    delta = np.ones((10, 10))
    delta[5, 5] = 4
    assert shares_of(delta, regions)[0] == pytest.approx(39 / 103)
    assert shares_of(np.zeros((10, 10)), regions) == pytest.approx((0.36, 0.44))


def test_maps_at_pixels_as_torch_interpolates() -> None:
    cells = np.random.default_rng(0).random((3, 5)).astype(np.float32)
    whole = F.interpolate(torch.from_numpy(cells)[None, None], scale_factor=8, mode="bilinear")[0, 0].numpy()
    # Without padding all of it, with padding the part that the image fills.
    np.testing.assert_allclose(at_pixels(cells, 8, 0.5, (24, 40), (24, 40)), whole, atol=1e-6)
    np.testing.assert_allclose(at_pixels(cells, 8, 0.5, (20, 33), (20, 33)), whole[:20, :33], atol=1e-6)


def test_a_cell_stands_at_its_point() -> None:
    ramp = np.array([[0.0, 1.0, 2.0]])
    # Offset 0: points at x = 0, 4, 8, pixel centres at 0.5, 1.5, ...
    np.testing.assert_allclose(at_pixels(ramp, 4, 0.0, (1, 12), (1, 12))[0, :9], (np.arange(9) + 0.5).clip(0, 8) / 4)
    # Offset 0.5: points at 2, 6, 10; before the first its value holds.
    np.testing.assert_allclose(at_pixels(ramp, 4, 0.5, (1, 12), (1, 12))[0, :4], [0, 0, 0.125, 0.375])
    # An image of twice the input's size has its pixels half as far apart.
    np.testing.assert_allclose(at_pixels(ramp, 4, 0.0, (1, 12), (1, 24))[0, :4], [0.0625, 0.1875, 0.3125, 0.4375])
    np.testing.assert_array_equal(at_pixels(np.array([[3.0]]), 128, 0.0, (2, 2), (2, 2)), np.full((2, 2), 3.0))


def test_shares_are_those_of_the_map_at_pixels() -> None:
    generator = np.random.default_rng(1)
    regions = regions_of([3, 4, 17, 20], [10, 2, 30, 9], size=(30, 50))
    for offset, stride, shape in ((0.5, 8, (8, 12)), (0.0, 16, (4, 6)), (0.0, 64, (1, 1))):
        cells = generator.random(shape)
        pixels = at_pixels(cells, stride, offset, (58, 96), (30, 50))
        expected = [pixels[region].sum() / pixels.sum() for region in regions]
        np.testing.assert_allclose(energy_shares(cells, stride, offset, (58, 96), regions), expected, rtol=1e-12)


def test_levels_count_the_same_in_the_merged_map() -> None:
    merged = merge_levels([np.zeros((2, 2)), np.array([[4.0, 0], [0, 0]])])
    np.testing.assert_allclose(merged, [[0.625, 0.125], [0.125, 0.125]])  # halves of 1/4 each and of 1


def test_interval_of_a_mean_over_images() -> None:
    flat = image_mean(np.full(7, 0.25))
    assert (flat.estimate, flat.low, flat.high) == (0.25, 0.25, 0.25)
    # 100 ones among 400: a standard error of sqrt(0.25 * 0.75 / 400) = 0.02165, and 1.96 of them on each side.
    interval = image_mean(np.arange(400) % 4 == 0, samples=4000)
    assert interval.estimate == 0.25
    assert interval.low == pytest.approx(0.25 - 0.0424, abs=0.004)
    assert interval.high == pytest.approx(0.25 + 0.0424, abs=0.004)
    assert image_mean(np.arange(400) % 4 == 0, samples=4000) == interval
    with pytest.raises(ValueError, match="at least one"):
        image_mean(np.zeros(0))
