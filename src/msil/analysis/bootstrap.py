"""95 % intervals of a metric and of differences, by resampling what another experiment would have drawn anew.

A percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 6 and 13) over two
things at once: the images, the same ones for all runs of a comparison (paired), and the seeds of each row. With n
seeds the mean of a resample scatters by only (n - 1) / n of the variance that n seeds have, so that part is widened by
sqrt(n / (n - 1)). With few seeds an interval is still too narrow, and with one it knows nothing of the seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from msil.analysis.matching import Matches
from msil.analysis.precision import scores

LEVEL = 0.95
SAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """A number and the ends of its 95 % interval."""

    estimate: float
    low: float
    high: float


def mean_interval(runs: Sequence[Matches], metric: str, *, samples: int = SAMPLES, seed: int = 0) -> Interval:
    """The mean of `metric` over runs of one row, one a seed. Raises ValueError for runs of different questions."""
    _check(runs)
    images, choices = _generators(seed)
    weights = image_weights(runs[0].images, samples, images)
    return _interval(
        _means([_value(run, metric) for run in runs]), row_means(_resampled(runs, weights, metric), choices)
    )


def difference_interval(
    ours: Sequence[Matches], others: Sequence[Matches], metric: str, *, samples: int = SAMPLES, seed: int = 0
) -> Interval:
    """The mean over `ours` minus that over `others`, two rows with one run a seed, on the same resampled images.

    Raises ValueError for runs that were not asked for the same boxes of the same images.
    """
    _check(ours, others)
    images, choices = _generators(seed)
    weights = image_weights(ours[0].images, samples, images)
    estimate = _means([_value(run, metric) for run in ours]) - _means([_value(run, metric) for run in others])
    first, second = (row_means(_resampled(runs, weights, metric), choices) for runs in (ours, others))
    return _interval(estimate, first - second)


def image_weights(images: int, samples: int, generator: np.random.Generator) -> np.ndarray:
    """How often each image counts in each resample: (samples, images), rows that sum to `images`."""
    return generator.multinomial(images, np.full(images, 1 / images), size=samples)


def row_means(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Of one row, the mean over its seeds in each resample, the seeds drawn anew: (n, B) -> (B,); see the top."""
    seeds, samples = values.shape
    means = values.mean(axis=0)
    if seeds == 1:
        return means
    chosen = generator.integers(seeds, size=(seeds, samples))
    drawn = np.take_along_axis(values, chosen, axis=0).mean(axis=0)
    return means + (drawn - means) * np.sqrt(seeds / (seeds - 1))


def _generators(seed: int) -> tuple[np.random.Generator, np.random.Generator]:
    """Of the images and of the seeds: apart, so that every pair of rows sees the same images."""
    images, choices = np.random.default_rng(seed).spawn(2)
    return images, choices


def _resampled(runs: Sequence[Matches], weights: np.ndarray, metric: str) -> np.ndarray:
    return np.stack([np.asarray(scores(run, weights, metrics=(metric,))[metric]) for run in runs])


def _value(run: Matches, metric: str) -> float:
    return float(scores(run, metrics=(metric,))[metric])


def _means(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _interval(estimate: float, resampled: np.ndarray) -> Interval:
    counted = resampled[~np.isnan(resampled)]  # a resample may hold no object at all
    if not len(counted):
        return Interval(estimate, float("nan"), float("nan"))
    low, high = np.quantile(counted, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(estimate, float(low), float(high))


def _check(*rows: Sequence[Matches]) -> None:
    if not all(rows):
        raise ValueError("an interval needs at least one run of each row")
    if len({run.question for row in rows for run in row}) > 1:
        raise ValueError("the runs were not evaluated on the same boxes of the same images, so nothing is paired")
