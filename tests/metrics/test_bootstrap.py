"""Intervals by hand, and resamples against the textbook's variances."""

from __future__ import annotations

import math

import numpy as np
import pytest

from msil.metrics.bootstrap import Interval, difference_of, resample, row_means
from msil.metrics.matching import match_coco

from .cases import Found, Truth, make

BOX = [0.0, 0, 10, 10]
TRUTHS: list[Truth] = [(0, 0, BOX), (1, 0, BOX)]


def run(found: list[int], *more: Found):
    """Two images with one object each: finds those of the images `found`."""
    return match_coco(make(TRUTHS, [*[(image, 0, BOX, 0.75) for image in found], *more], images=2))


def difference_interval(ours: list, others: list, metric: str) -> Interval:
    return difference_of(*([resample(run, metric) for run in runs] for runs in (ours, others)))


def test_two_images_by_hand() -> None:
    # Resamples of two images: (2, 0) and (0, 2), one in four each, and (1, 1). The run finds image 0's object alone:
    # AP50 1, 0 and 51/101 (recall 1/2 covers the grid's 0.00 .. 0.50). Against one that finds none, always 0, the 2.5 %
    # and 97.5 % are 0 and 1.
    found = difference_interval([run([0])], [run([])], "AP50")
    assert (found.estimate, found.low, found.high) == pytest.approx((51 / 101, 0, 1), abs=1e-12)
    # Against one that finds both (always 1): 0, -1 and -50/101.
    found = difference_interval([run([0])], [run([0, 1])], "AP50")
    assert (found.estimate, found.low, found.high) == pytest.approx((-50 / 101, -1, 0), abs=1e-12)


def test_rows_are_compared_on_the_same_resampled_images() -> None:
    # Other detections but the same AP on every choice of images: a wrong one below all hits costs nothing. On images of
    # their own, the difference would be between -1 and 1.
    other = run([0], (1, 0, [50, 50, 60, 60], 0.125))
    assert difference_interval([run([0])], [other], "AP50") == Interval(0.0, 0.0, 0.0)


@pytest.mark.parametrize("values", [[0.31, 0.4], [0.3, 0.35, 0.43], [0.5, 0.1, 0.2, 0.9, 0.4]])
def test_a_widened_resample_scatters_as_the_mean_of_so_many_seeds(values: list[float]) -> None:
    # The mean of n values drawn anew has the variance v / n, with v = sum (x - mean)^2 / n the variance of drawing one.
    # Widened by n / (n - 1) it is s^2 / n, s^2 = sum (x - mean)^2 / (n - 1): the textbook's variance of a mean.
    n, samples = len(values), 100_000
    drawn = row_means(np.tile(np.array(values)[:, None], samples), np.random.default_rng(1))
    expected = np.var(values, ddof=1) / n
    assert drawn.shape == (samples,)
    assert abs(drawn.mean() - np.mean(values)) < 5 * math.sqrt(expected / samples)
    # A sample variance has about the variance (mu4 - variance^2) / samples; of a mean of n independent draws
    # mu4 = variance^2 (3 + (k - 3) / n), k the kurtosis of one draw.
    centred = np.array(values) - np.mean(values)
    kurtosis = np.mean(centred**4) / np.mean(centred**2) ** 2
    tolerance = 5 * expected * math.sqrt((2 + (kurtosis - 3) / n) / samples)
    assert abs(drawn.var() - expected) < max(tolerance, 10 * expected / samples)  # n = 2: the leading term may be small
    # The values unwidened would be told apart: (n - 1) / n of it is at least 20 % off.
    assert tolerance < 0.1 * expected


def test_resamples_without_an_object_are_left_out() -> None:
    # All objects lie in image 0, so that a quarter of the resamples, (0, 2), has none.
    record = make([(0, 0, BOX)], [(0, 0, BOX, 0.5)], images=2)
    nothing = make([(0, 0, BOX)], [], images=2)
    assert difference_interval([match_coco(record)], [match_coco(nothing)], "AP50") == Interval(1.0, 1.0, 1.0)
    # No medium object anywhere.
    nowhere = difference_interval([match_coco(record)], [match_coco(nothing)], "APm")
    assert math.isnan(nowhere.estimate) and math.isnan(nowhere.low) and math.isnan(nowhere.high)
