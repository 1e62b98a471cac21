"""What kinds of errors a run makes and what each costs: TIDE (Bolya et al. 2020, arXiv 2008.08115, section 2.2).

A false positive is, by its highest IoU with an object of its own class and of the others, t_f = 0.5 and t_b = 0.1:

    Loc   own class in [t_b, t_f): the box is wrong
    Cls   another class at t_f or more: the class is wrong
    Dupe  own class at t_f or more, but a detection of a higher score has the object
    Bkg   at most t_b with any object
    Both  the rest: another class in (t_b, t_f), box and class are wrong

The paper's kinds overlap; the first that fits holds here, as in the authors' program. Miss are the objects that
nothing found and that no error of Cls or Loc lies on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from pycocotools import mask

from msil.metrics.coco import MAX_DETS
from msil.metrics.matching import ClassMatches, Matches
from msil.metrics.precision import scores
from msil.metrics.record import EvaluationRecord, to_xywh

KINDS = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")
FOREGROUND = 0.5  # t_f
BACKGROUND = 0.1  # t_b
SCORE_THRESH = 0.3  # of a detection in the confusion and in the gallery
_CLS, _LOC, _BOTH, _DUPE, _BKG = range(5)
_HIT, _IGNORED = -1, -2


class Breakdown(NamedTuple):
    """By KINDS. counts: errors. costs: how much AP50 (a fraction) grows if that kind alone is mended; nan without
    objects."""

    counts: dict[str, int]
    costs: dict[str, float]


class _Judged(NamedTuple):
    """D detections, ordered by image and there by descending score.

    images, labels: (D,) int64. scores: (D,) float32. kinds: (D,) int64, _HIT, _IGNORED or a position in KINDS.
    objects: (D,) int64, the object that a hit found and that an error of Cls or Loc lies on; otherwise -1.
    """

    images: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    kinds: np.ndarray
    objects: np.ndarray

    def kept(self, those: np.ndarray) -> _Judged:
        return _Judged(*(part[those] for part in self))


def breakdown(record: EvaluationRecord, max_dets: int = MAX_DETS) -> Breakdown:
    """Of the detections that COCO's AP50 counts: the best `max_dets` of each image and class.

    Ignored objects are neither found nor missed, and what lies on those of its own class is no error. An error is
    mended as the paper has it, with all others of its kind: of Cls and Loc the detection becomes a hit, and of several
    on one object only the best stays; detections of Both, Dupe and Bkg go; objects of Miss need not be found. An AP50
    without anything left to find is 1.
    """
    judged = _judge(record, max_dets)
    objects = ~record.truth_ignored
    lost = objects.copy()
    lost[judged.objects[judged.objects >= 0]] = False
    counts = {kind: int((judged.kinds == place).sum()) for place, kind in enumerate(KINDS[:-1])}
    counts["Miss"] = int(lost.sum())
    now = _ap50(record, judged, objects)
    costs = {}
    for place, kind in enumerate(KINDS[:-1]):
        mended = _turned(record, judged, place) if place in (_CLS, _LOC) else judged.kept(judged.kinds != place)
        costs[kind] = _ap50(record, mended, objects) - now
    costs["Miss"] = (_ap50(record, judged, objects & ~lost) if (objects & ~lost).any() else 1.0) - now
    return Breakdown(counts, costs)


def _judge(record: EvaluationRecord, max_dets: int) -> _Judged:
    found = by_score(record, np.arange(len(record.found_images)))
    groups = record.found_images * len(record.classes) + record.found_labels
    found = found[_place_in_group(groups[found]) < max_dets]
    labels = record.found_labels[found]
    kinds, objects = np.full(len(found), _BKG), np.full(len(found), -1)
    for here, there, ious in overlaps(record, found):
        same = labels[here][:, None] == record.truth_labels[there]
        ignored = record.truth_ignored[there]
        on_ignored = ((ious >= FOREGROUND) & same)[:, ignored].any(axis=1)
        # The last column is no object.
        counted = np.append(there[~ignored], -1)
        own, other = (np.pad(np.where(of, ious, 0.0)[:, ~ignored], ((0, 0), (0, 1))) for of in (same, ~same))
        taken = take_best(own, FOREGROUND)
        best_own, best_other = own.max(axis=1), other.max(axis=1)
        kinds[here] = np.select(
            [
                taken >= 0,
                on_ignored,
                (best_own >= BACKGROUND) & (best_own < FOREGROUND),
                best_other >= FOREGROUND,
                best_own >= FOREGROUND,
                best_other > BACKGROUND,
            ],
            [_HIT, _IGNORED, _LOC, _CLS, _DUPE, _BOTH],
            _BKG,
        )
        nearest = [taken, own.argmax(axis=1), other.argmax(axis=1)]
        objects[here] = counted[np.select([kinds[here] == kind for kind in (_HIT, _LOC, _CLS)], nearest, -1)]
    return _Judged(record.found_images[found], labels, record.found_scores[found], kinds, objects)


def _place_in_group(groups: np.ndarray) -> np.ndarray:
    """Of each element, how many of its group stand before it."""
    order = np.argsort(groups, kind="stable")
    places = np.empty(len(order), dtype=np.int64)
    places[order] = np.arange(len(order)) - np.searchsorted(groups[order], groups[order])
    return places


def _turned(record: EvaluationRecord, judged: _Judged, kind: int) -> _Judged:
    """All errors of the kind made hits of their objects; an object with several keeps the one of the highest score."""
    claims = np.flatnonzero((judged.kinds == _HIT) | (judged.kinds == kind))
    winners = claims[np.unique(judged.objects[claims], return_index=True)[1]]  # an image's detections are by score
    kept = ~np.isin(np.arange(len(judged.kinds)), claims)
    kept[winners] = True
    kinds, labels = judged.kinds.copy(), judged.labels.copy()
    kinds[winners] = _HIT
    labels[winners] = record.truth_labels[judged.objects[winners]]
    return judged._replace(labels=labels, kinds=kinds).kept(kept)


def _ap50(record: EvaluationRecord, judged: _Judged, objects: np.ndarray) -> float:
    """objects: (G,) bool, those to be found."""
    order = np.lexsort((-judged.scores, judged.labels))
    ends = np.searchsorted(judged.labels[order], np.arange(1, len(record.classes)))
    classes = []
    for label, chosen in enumerate(np.split(order, ends)):
        owners = record.truth_images[objects & (record.truth_labels == label)]
        classes.append(
            ClassMatches(
                judged.images[chosen],
                (judged.kinds[chosen] == _HIT)[None, None],
                (judged.kinds[chosen] == _IGNORED)[None, None],
                np.bincount(owners, minlength=len(record.image_ids))[None],
            )
        )
    matches = Matches("coco", ("all",), (FOREGROUND,), tuple(classes), len(record.image_ids))
    return float(np.asarray(scores(matches, metrics=("AP50",))["AP50"]))


def confusion(record: EvaluationRecord) -> np.ndarray:
    """Counts (K+1, K+1) int64. Row: class of the object, the last one background; column: class of the detection, the
    last one missed.

    Detections are matched with objects whatever their class. Ignored objects are left out, and so are detections that
    lie on nothing else. The last cell is 0.
    """
    classes = len(record.classes)
    found, objects, left_out = matched(record)
    rows = np.append(record.truth_labels, classes)[objects]  # of -1: background
    missed = ~record.truth_ignored
    missed[objects[objects >= 0]] = False
    counts = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    np.add.at(counts, (rows[~left_out], record.found_labels[found[~left_out]]), 1)
    counts[:classes, classes] = np.bincount(record.truth_labels[missed], minlength=classes)
    return counts


def matched(record: EvaluationRecord, *, by_class: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The detections of at least SCORE_THRESH, (D,) positions as from `by_score`; the object that each takes, (D,)
    int64, or -1; and whether it takes none but lies on an ignored one, (D,) bool.

    They take, by descending score, the free object of the highest IoU, if that is at least 0.5; by_class: of their own
    class alone. IoU with an ignored object is COCO's, the share of the detection that lies inside.
    """
    found = by_score(record, np.flatnonzero(record.found_scores >= SCORE_THRESH))  # NaN compares false
    objects, left_out = np.full(len(found), -1), np.zeros(len(found), dtype=bool)
    for here, there, ious in overlaps(record, found):
        if by_class:
            ious = np.where(record.found_labels[found[here], None] == record.truth_labels[there], ious, 0.0)
        ignored = record.truth_ignored[there]
        taken = take_best(ious[:, ~ignored], FOREGROUND)
        objects[here[taken >= 0]] = there[~ignored][taken[taken >= 0]]
        left_out[here] = (taken < 0) & (ious[:, ignored] >= FOREGROUND).any(axis=1)
    return found, objects, left_out


def by_score(record: EvaluationRecord, found: np.ndarray) -> np.ndarray:
    """Positions of detections, ordered by image and in each by descending score, equal scores as they were."""
    return found[np.lexsort((-record.found_scores[found], record.found_images[found]))]


def overlaps(record: EvaluationRecord, found: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each image with objects and with detections among `found` (D,), ordered by image: (here, there, ious).

    here: (d,) positions in `found`. there: (g,) positions of the image's objects. ious: (d, g) as pycocotools has them,
    with an ignored object the share of the detection that lies inside.
    """
    boxes = to_xywh(record.found_boxes[found])
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
