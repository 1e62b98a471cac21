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
Counts = dict[bytes, tuple[np.ndarray, np.ndarray]]  # kept detections -> (B, D) how often each counts, and their sums


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


def per_class(matches: Matches) -> dict[str, np.ndarray]:
    """AP and AP50 (VOC_AP of VOC matches) of every class, (K,), nan where a class has no object."""
    names = ("VOC_AP",) if matches.rule == "voc" else ("AP", "AP50")
    return {name: _class_values(matches, name, np.ones((1, matches.images)))[:, 0] for name in names}


def precision_recall(matches: Matches, iou: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Recalls (101,) and each class's interpolated precision at them (K, 101), nan where a class has no object."""
    place = matches.ious.index(iou)
    precisions = np.full((len(matches.classes), len(RECALLS)), np.nan)
    for label, one in enumerate(matches.classes):
        total = one.truths[0].sum()
        if total:
            ones = np.ones((1, matches.images))
            envelope, true_positives = _envelope(one, 0, place, ones, {})
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
            seen: Counts = {}
            sums = [_average(one, matches, place, iou, weights[rows], totals[rows], seen) for iou in ious]
            values[label, rows] = np.mean(sums, axis=0)
    return values


def _average(
    one: ClassMatches, matches: Matches, area: int, iou: int, weights: np.ndarray, totals: np.ndarray, seen: Counts
) -> np.ndarray:
    envelope, true_positives = _envelope(one, area, iou, weights, seen)
    recalls = true_positives / totals[:, None]
    if matches.rule == "voc":
        steps = np.diff(recalls, axis=1, prepend=0.0)  # the area under the curve
    else:
        # Each hit holds the recalls of the grid between the hit before and itself.
        reached = np.searchsorted(RECALLS, recalls.ravel(), side="right").reshape(recalls.shape)
        steps = np.diff(reached, axis=1, prepend=0) / len(RECALLS)
    return (envelope * steps).sum(axis=1)


def _envelope(
    one: ClassMatches, area: int, iou: int, weights: np.ndarray, seen: Counts
) -> tuple[np.ndarray, np.ndarray]:
    """At each hit, by descending score: the highest precision there or later, and the true positives so far, (B, H).

    seen: counts of these weights at the last IoU, which the next one shares unless it ignores other detections.
    """
    hits, ignored = one.hits[area, iou], one.ignored[area, iou]
    kept = np.flatnonzero(~ignored)
    if kept.tobytes() not in seen:
        seen.clear()
        counts = np.take(weights, one.images[kept], axis=1)  # indexing would give columns first, slow to sum along rows
        seen[kept.tobytes()] = counts, np.cumsum(counts, axis=1)
    counts, positives = seen[kept.tobytes()]
    at_hits = np.flatnonzero(hits[kept])
    positives = np.take(positives, at_hits, axis=1)
    true_positives = np.cumsum(np.take(counts, at_hits, axis=1), axis=1)
    # A hit of an image that counts no time may stand before all others: 0 of 0, which is no precision.
    precision = np.divide(true_positives, positives, out=np.zeros_like(positives), where=positives > 0)
    return np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1], true_positives


def nan_mean(values: np.ndarray) -> np.ndarray:
    """Over the first axis, nan (a class without objects) left out; nan where nothing is left, without a warning."""
    counted = ~np.isnan(values)
    total = np.where(counted, values, 0.0).sum(axis=0)
    return np.divide(total, counted.sum(axis=0), out=np.full_like(total, np.nan), where=counted.any(axis=0))
