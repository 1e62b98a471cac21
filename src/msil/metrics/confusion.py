"""Which class is taken for which: detections and objects paired by place alone, and counted by their classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from pycocotools import mask

from msil.metrics.record import EvaluationRecord


def confusion(record: EvaluationRecord, score_thresh: float = 0.3, iou: float = 0.5) -> np.ndarray:
    """Counts (K+1, K+1) int64. Row: class of the object, the last one background; column: class of the detection, the
    last one missed.

    Detections of at least `score_thresh` take, by descending score and whatever their class, the free object of the
    highest IoU, if that is at least `iou`. Ignored objects are left out, and so are detections that lie on nothing
    else: IoU with a crowd is COCO's, the share of the detection that lies inside. The last cell is 0.
    """
    classes = len(record.classes)
    found = by_score(record, np.flatnonzero(record.found_scores >= score_thresh))
    rows = np.full(len(found), classes)
    kept = np.ones(len(found), dtype=bool)
    missed = ~record.truth_ignored
    for here, there, ious in overlaps(record, found):
        ignored = record.truth_ignored[there]
        taken = take_best(ious[:, ~ignored], iou)
        objects = there[~ignored][taken[taken >= 0]]
        missed[objects] = False
        rows[here[taken >= 0]] = record.truth_labels[objects]
        kept[here] = (taken >= 0) | ~(ious[:, ignored] >= iou).any(axis=1)
    counts = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    np.add.at(counts, (rows[kept], record.found_labels[found[kept]]), 1)
    counts[:classes, classes] = np.bincount(record.truth_labels[missed], minlength=classes)
    return counts


def by_score(record: EvaluationRecord, found: np.ndarray) -> np.ndarray:
    """Positions of detections, ordered by image and in each by descending score, equal scores as they were."""
    return found[np.lexsort((-record.found_scores[found], record.found_images[found]))]


def overlaps(record: EvaluationRecord, found: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each image with objects and with detections among `found` (D,), ordered by image: (here, there, ious).

    here: (d,) positions in `found`. there: (g,) positions of the image's objects. ious: (d, g) as pycocotools has them,
    with an ignored object the share of the detection that lies inside.
    """
    boxes: Any = record.found_boxes[found].astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    owners = record.found_images[found]
    images = np.unique(owners)
    ends = [np.searchsorted(owners, images, side) for side in ("left", "right")]
    truth_ends = [np.searchsorted(record.truth_images, images, side) for side in ("left", "right")]
    for start, end, first, last in zip(*ends, *truth_ends, strict=True):
        if first < last:
            ignored = record.truth_ignored[first:last].astype(np.uint8)
            ious = mask.iou(boxes[start:end], record.truth_boxes[first:last], ignored)
            yield np.arange(start, end), np.arange(first, last), np.asarray(ious)


def take_best(ious: np.ndarray, least: float) -> np.ndarray:
    """Each detection in turn takes the free object of the highest IoU if that is at least `least`, as COCO does.

    ious: (d, g), `least` above 0. Returns (d,) int64, the column taken or -1; of equal IoUs the last.
    """
    taken = np.full(len(ious), -1, dtype=np.int64)
    free = ious[:, ::-1].copy()
    for row in np.flatnonzero((ious >= least).any(axis=1)):
        best = free[row].argmax()
        if free[row, best] >= least:
            taken[row] = ious.shape[1] - 1 - best
            free[:, best] = 0
    return taken
