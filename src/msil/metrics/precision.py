"""Average precision of judged detections, over the images as they are or as a resample counts them.

An image that counts w times adds w to every sum. pycocotools on w copies of the image ranks the copies of a detection
one after the other, at the same score; since precision only rises inside such a run of hits, its end decides, and AP is
the same. (Where different detections have equal scores, pycocotools goes copy by copy instead, and may differ.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from msil.metrics.matching import ClassMatches, Matches

# Metric: area, and the IoUs that it is a mean over (None: all).
METRICS: dict[str, tuple[str, float | None]] = {
    "AP": ("all", None),
    "AP50": ("all", 0.5),
    "AP75": ("all", 0.75),
    "APs": ("small", None),
    "APm": ("medium", None),
    "APl": ("large", None),
    "VOC_AP": ("all", 0.5),
}
RECALLS = np.linspace(0.0, 1.0, 101)  # pycocotools' own
_BLOCK = 4_000_000  # numbers held at a time


def scores(
    matches: Matches, weights: np.ndarray | None = None, metrics: Sequence[str] | None = None
) -> dict[str, float | np.ndarray]:
    """AP, AP50, AP75, APs, APm, APl of COCO matches, VOC_AP of VOC's: fractions, nan where no object counts.

    weights: (B, I) whole numbers, how often each image counts; then the values are arrays (B,). None: once each.
    metrics: those wanted. Raises ValueError for one that these matches do not give.
    """
    known = [name for name in METRICS if (name == "VOC_AP") == (matches.rule == "voc")]
    wanted = known if metrics is None else metrics
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: {matches.rule} matches give {', '.join(known)} alone")
    rows = np.ones((1, matches.images)) if weights is None else np.asarray(weights, dtype=np.float64)
    found: dict[str, float | np.ndarray] = {}
    for name in wanted:
        values = nan_mean(_class_values(matches, name, rows))
        found[name] = float(values[0]) if weights is None else values
    return found


def per_class(matches: Matches, metric: str) -> np.ndarray:
    """The metric of every class, (K,), nan where a class has no object."""
    return _class_values(matches, metric, np.ones((1, matches.images)))[:, 0]


def precision_recall(matches: Matches, iou: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Recalls (101,) and each class's interpolated precision at them (K, 101), nan where a class has no object."""
    place = matches.ious.index(iou)
    precisions = np.full((len(matches.classes), len(RECALLS)), np.nan)
    for label, one in enumerate(matches.classes):
        total = one.truths[0].sum()
        if total:
            ones = np.ones((1, matches.images))
            envelope, true_positives = _envelope(one, 0, place, ones, _running(one, ones))
            starts = np.searchsorted(true_positives[0] / total, RECALLS, side="left")
            precisions[label] = np.append(envelope[0], 0.0)[starts]
    return RECALLS, precisions


def _class_values(matches: Matches, metric: str, weights: np.ndarray) -> np.ndarray:
    """AP of every class, mean over IoUs: (K, B), nan where no object counts."""
    area, iou = METRICS[metric]
    place = matches.areas.index(area)
    ious = range(len(matches.ious)) if iou is None else [matches.ious.index(iou)]
    values = np.full((len(matches.classes), len(weights)), np.nan)
    for label, one in enumerate(matches.classes):
        totals = weights @ one.truths[place]
        counted = np.flatnonzero(totals > 0)
        step = max(1, _BLOCK // max(1, len(one.images)))
        for start in range(0, len(counted), step):
            rows = counted[start : start + step]
            running = _running(one, weights[rows])
            curves = [_envelope(one, place, iou, weights[rows], running) for iou in ious]
            sums = [_average(*curve, totals[rows], matches.rule) for curve in curves]
            values[label, rows] = np.mean(sums, axis=0)
    return values


def _average(envelope: np.ndarray, true_positives: np.ndarray, totals: np.ndarray, rule: str) -> np.ndarray:
    recalls = true_positives / totals[:, None]
    if rule == "voc":
        steps = np.diff(recalls, axis=1, prepend=0.0)  # the area under the curve
    else:
        # Each hit holds the recalls of the grid between the hit before and itself.
        reached = np.searchsorted(RECALLS, recalls.ravel(), side="right").reshape(recalls.shape)
        steps = np.diff(reached, axis=1, prepend=0) / len(RECALLS)
    return (envelope * steps).sum(axis=1)


def _running(one: ClassMatches, weights: np.ndarray) -> np.ndarray:
    """How many detections come up to each one, ignored ones too: (B, D). The same for all areas and IoUs."""
    return np.cumsum(weights[:, one.images], axis=1)


def _envelope(
    one: ClassMatches, area: int, iou: int, weights: np.ndarray, running: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """At each hit, by descending score: the highest precision there or later, and the true positives so far, (B, H)."""
    at_hits, ignored = np.flatnonzero(one.hits[area, iou]), np.flatnonzero(one.ignored[area, iou])
    skipped = np.cumsum(weights[:, one.images[ignored]], axis=1)
    skipped = np.pad(skipped, ((0, 0), (1, 0)))[:, np.searchsorted(ignored, at_hits)]
    positives = running[:, at_hits] - skipped
    true_positives = np.cumsum(weights[:, one.images[at_hits]], axis=1)
    # A hit of an image that counts no time may stand before all others: 0 of 0, which is no precision.
    precision = np.divide(true_positives, positives, out=np.zeros_like(positives), where=positives > 0)
    return np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1], true_positives


def nan_mean(values: np.ndarray) -> np.ndarray:
    """Over the first axis, NaN (a class without objects) left out; NaN where nothing is left."""
    counted = ~np.isnan(values)
    total = np.where(counted, values, 0.0).sum(axis=0)
    return np.divide(total, counted.sum(axis=0), out=np.full_like(total, np.nan), where=counted.any(axis=0))
