"""95 % intervals of differences of a metric, by resampling what another experiment would have drawn anew.

A percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 6 and 13) over two
things at once: the images, the same ones for all runs of a comparison (paired), and the seeds of each row. With n
seeds the mean of a resample scatters by only (n - 1) / n of the variance that n seeds have, so that part is widened by
sqrt(n / (n - 1)). With few seeds an interval is still too narrow, and with one it leaves out the variance of seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from msil.metrics.matching import Matches
from msil.metrics.precision import scores

LEVEL = 0.95
SAMPLES = 1000
# Of so few images an interval is too narrow to tell luck: of a normal mean by 6 % at 30 images, by 30 % at 6 (Student's
# quantile and the deviation's n - 1), and of an AP, whose classes lie in some of the images, by more.
FEW_IMAGES = 30


class Interval(NamedTuple):
    """A number and the ends of its 95 % interval."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Resampled:
    """One run's metric: estimate, as it is; values: (B,) over resamples of the images."""

    estimate: float
    values: np.ndarray


def resample(run: Matches, metric: str, *, samples: int = SAMPLES) -> Resampled:
    """The resampled images are the same for every run of as many."""
    weights = image_weights(run.images, samples, _generators()[0])
    values = np.asarray(scores(run, weights, metrics=(metric,))[metric])
    return Resampled(float(scores(run, metrics=(metric,))[metric]), values)


def difference_of(ours: Sequence[Resampled], others: Sequence[Resampled]) -> Interval:
    """The mean over `ours` minus that over `others`, two rows with one run a seed.

    All runs were evaluated on the same boxes of the same images (record.question), or nothing is paired.
    """
    choices = _generators()[1]
    first, second = (row_means(np.stack([one.values for one in row]), choices) for row in (ours, others))
    estimates = [np.mean([one.estimate for one in row]) for row in (ours, others)]
    return interval(float(estimates[0] - estimates[1]), first - second)


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


def _generators() -> tuple[np.random.Generator, np.random.Generator]:
    """Of the images and of the seeds: apart, so that every pair of rows sees the same images."""
    images, choices = np.random.default_rng(0).spawn(2)
    return images, choices


def interval(estimate: float, resampled: np.ndarray) -> Interval:
    """The percentile interval of resampled values (B,), of which nan is left out."""
    counted = resampled[~np.isnan(resampled)]  # a resample may hold no object at all
    if not len(counted):
        return Interval(estimate, float("nan"), float("nan"))
    low, high = np.quantile(counted, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(estimate, float(low), float(high))
