"""Kinds of errors and confusions by hand, against loops and pycocotools."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from msil.metrics.breakdown import KINDS, breakdown, confusion, take_best
from msil.metrics.record import EvaluationRecord

from .cases import Found, coco_numbers, make, random_record

BOX = [0.0, 0, 10, 10]
FAR = [300.0, 300, 310, 310]


def counted(**found: int) -> dict[str, int]:
    return {kind: found.get(kind, 0) for kind in KINDS}


def costs(**found: float) -> dict[str, float]:
    return {kind: pytest.approx(found.get(kind, 0.0), abs=1e-12) for kind in KINDS}  # pyright: ignore


def test_class_by_hand() -> None:
    # Class 0: its object is not found, AP50 0. Class 1: wrong at 0.75, right at 0.5: precision 1/2. Mean 1/4.
    # With the class corrected both are 1.
    record = make([(0, 0, BOX), (1, 1, BOX)], [(0, 1, BOX, 0.75), (1, 1, BOX, 0.5)], images=2)
    found = breakdown(record)
    assert list(found.counts) == list(found.costs) == ["Cls", "Loc", "Both", "Dupe", "Bkg", "Miss"]
    assert found.counts == counted(Cls=1)  # the object is no Miss, since the error of Cls lies on it
    assert found.costs == costs(Cls=0.75)


def test_nothing_found_costs_everything() -> None:
    found = breakdown(make([(0, 0, BOX), (1, 1, BOX)], [], images=2))
    assert found.counts == counted(Miss=2)
    assert found.costs == costs(Miss=1.0)


def test_without_objects_nothing_can_be_lost() -> None:
    for record in (make([], [(0, 0, BOX, 0.5)]), make([(0, 0, BOX)], [(0, 0, FAR, 0.5)], ignored=[0])):
        found = breakdown(record)
        assert found.counts == counted(Bkg=1)
        assert all(math.isnan(cost) for cost in found.costs.values())
    assert breakdown(make([], [], images=0)).counts == counted()


@pytest.mark.parametrize(
    ("box", "label", "kind"),
    [
        # The object of class 0 is BOX; a box of its width and height h inside it has the IoU h / 10.
        ([0, 0, 10, 5.0], 0, None),  # 0.5: right
        ([0, 0, 10, 4.99], 0, "Loc"),
        ([0, 0, 10, 1.0], 0, "Loc"),  # 0.1
        ([0, 0, 10, 0.99], 0, "Bkg"),
        ([0, 0, 10, 5.0], 1, "Cls"),  # 0.5
        ([0, 0, 10, 4.99], 1, "Both"),
        ([0, 0, 10, 1.01], 1, "Both"),
        ([0, 0, 10, 1.0], 1, "Bkg"),  # 0.1
        (FAR, 0, "Bkg"),
    ],
)
def test_borders_of_the_kinds(box: list[float], label: int, kind: str | None) -> None:
    counts = breakdown(make([(0, 0, BOX)], [(0, label, box, 0.5)])).counts
    assert {name for name in KINDS[:-1] if counts[name]} == ({kind} if kind else set())
    assert counts["Miss"] == (kind in ("Both", "Bkg"))


def test_ignored_objects_are_neither_missed_nor_wrong_to_find() -> None:
    truths = [(0, 0, [0, 0, 100, 100]), (1, 0, BOX)]
    found: list[Found] = [
        (0, 0, [10, 10, 20, 20], 0.75),  # inside the crowd of its class: no error, though the IoU is 0.01
        (0, 0, [10, 10, 20, 20], 0.75),  # so often as it likes
        (0, 1, [0, 0, 100, 100], 0.75),  # on the crowd of another class, which is no object
        (0, 0, [90, 0, 140, 100], 0.75),  # a fifth inside (IoU 10/140): not on the crowd, and on no object
        (1, 0, BOX, 0.5),
    ]
    result = breakdown(make(truths, found, images=2, ignored=[0]))
    assert result.counts == counted(Bkg=2)
    assert result.costs == costs(Bkg=0.5)  # class 0: wrong, right: 1/2; class 1 has no object


def highest(ious: dict[int, float]) -> int:
    return max(ious, key=lambda g: ious[g])


def by_definition(record: EvaluationRecord) -> tuple[list[str], list[int]]:
    """Each detection's kind ("" if none) and the object that it is or should have been, by plain loops."""
    truth_boxes = record.truth_boxes.copy()
    truth_boxes[:, 2:] += truth_boxes[:, :2]

    def common(a, b) -> tuple[float, float, float]:
        width = min(a[2], b[2]) - max(a[0], b[0])
        height = min(a[3], b[3]) - max(a[1], b[1])
        inside = max(width, 0) * max(height, 0)
        return inside, (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])

    kinds, objects = [""] * len(record.found_images), [-1] * len(record.found_images)
    order = sorted(range(len(kinds)), key=lambda d: -record.found_scores[d])
    seen: dict[tuple[int, int], int] = {}
    taken: set[int] = set()
    iou: dict[int, dict[int, float]] = {}
    for d in order:
        key = int(record.found_images[d]), int(record.found_labels[d])
        seen[key] = seen.get(key, 0) + 1
        if seen[key] > 100:
            kinds[d] = "left out"
            continue
        box = record.found_boxes[d].astype(float).tolist()
        iou[d] = {}
        for g in np.flatnonzero(record.truth_images == key[0]).tolist():
            inside, own, other = common(box, truth_boxes[g])
            iou[d][g] = inside / own if record.truth_ignored[g] else inside / (own + other - inside)
        same = {g: one for g, one in iou[d].items() if record.truth_labels[g] == key[1]}
        free = {g: one for g, one in same.items() if g not in taken and not record.truth_ignored[g] and one >= 0.5}
        if free:
            objects[d] = highest(free)
            taken.add(objects[d])
        elif any(one >= 0.5 for g, one in same.items() if record.truth_ignored[g]):
            kinds[d] = "ignored"
        else:
            kinds[d] = "?"
    for d in order:
        if kinds[d] != "?":
            continue
        real = {g: one for g, one in iou[d].items() if not record.truth_ignored[g]}
        own = {g: one for g, one in real.items() if record.truth_labels[g] == record.found_labels[d]}
        other = {g: one for g, one in real.items() if g not in own}
        best_own, best_other = max(own.values(), default=0.0), max(other.values(), default=0.0)
        if 0.1 <= best_own < 0.5:
            kinds[d], objects[d] = "Loc", highest(own)
        elif best_other >= 0.5:
            kinds[d], objects[d] = "Cls", highest(other)
        elif best_own >= 0.5:
            kinds[d] = "Dupe"
        else:
            kinds[d] = "Bkg" if best_other <= 0.1 else "Both"
    return kinds, objects


def mended(record: EvaluationRecord, kind: str, kinds: list[str], objects: list[int]) -> EvaluationRecord:
    """The record that somebody who makes no errors of this kind would have, for pycocotools to judge."""
    if kind == "Miss":
        kept = record.truth_ignored | np.isin(np.arange(len(record.truth_images)), objects)
        names = ("truth_images", "truth_boxes", "truth_areas", "truth_labels", "truth_ignored")
        return dataclasses.replace(record, **{name: getattr(record, name)[kept] for name in names})
    kept = np.array([one != kind for one in kinds])
    boxes, labels = record.found_boxes.copy(), record.found_labels.copy()
    if kind in ("Cls", "Loc"):
        for g in {objects[d] for d in range(len(kinds)) if kinds[d] == kind}:
            rivals = [d for d in range(len(kinds)) if objects[d] == g and kinds[d] in ("", kind)]
            best = max(rivals, key=lambda d: (record.found_scores[d], -d))
            kept[rivals] = False
            kept[best] = True
            if kinds[best] == kind:
                x, y, width, height = record.truth_boxes[g]
                boxes[best], labels[best] = [x, y, x + width, y + height], record.truth_labels[g]
    return dataclasses.replace(
        record, found_boxes=boxes[kept], found_labels=labels[kept], found_images=record.found_images[kept],
        found_scores=record.found_scores[kept],
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_random_records_against_loops_and_pycocotools(seed: int) -> None:
    record = random_record(seed)
    kinds, objects = by_definition(record)
    found = breakdown(record)
    lost = set(np.flatnonzero(~record.truth_ignored).tolist()) - set(objects)
    assert found.counts == {**{kind: kinds.count(kind) for kind in KINDS}, "Miss": len(lost)}
    assert min(found.counts.values()) > 0  # the case has every kind
    # Without what is beyond 100, so that a mended class does not let others in.
    judged = np.array([kind != "left out" for kind in kinds])
    parts = ("found_images", "found_boxes", "found_scores", "found_labels")
    record = dataclasses.replace(record, **{name: getattr(record, name)[judged] for name in parts})
    kinds = [one for one in kinds if one != "left out"]
    objects = [one for one, kept in zip(objects, judged, strict=True) if kept]
    now = coco_numbers(record)["AP50"]
    for kind in KINDS:
        better = coco_numbers(mended(record, kind, kinds, objects))["AP50"]
        assert found.costs[kind] == pytest.approx(better - now, abs=1e-9), kind
        assert found.costs[kind] >= 0, kind


def test_confusion_by_hand() -> None:
    truths = [(0, 0, BOX), (0, 1, [20, 0, 10, 10]), (1, 1, BOX), (1, 2, FAR), (2, 0, [100, 100, 50, 50])]
    truths.append((2, 0, [200, 200, 90, 90]))
    found: list[Found] = [
        (0, 0, BOX, 0.75),  # class 0 for class 0
        (0, 1, BOX, 0.5),  # the object is taken: background for class 1
        (0, 2, [20, 0, 30, 6], 0.5),  # IoU 0.6: class 1 for class 2
        (1, 1, [0, 0, 10, 5], 0.5),  # IoU 0.5 exactly: class 1 for class 1
        (1, 1, [0, 0, 10, 10], 0.25),  # below the threshold
        (1, 0, [500, 500, 600, 600], 0.875),  # background for class 0
        (2, 1, [200, 200, 210, 210], 0.875),  # inside a crowd: left out
    ]  # missed: class 2 of image 1, class 0 of image 2
    assert confusion(make(truths, found, images=3, classes=3, ignored=[5])).tolist() == [
        [1, 0, 0, 1],
        [0, 1, 1, 0],
        [0, 0, 0, 1],
        [1, 1, 0, 0],
    ]


def test_take_best_takes_the_last_of_equals_as_pycocotools_does() -> None:
    ious = np.array([[0.6, 0.6, 0.2], [0.6, 0.7, 0.6], [0.9, 0.4, 0.5], [0.4, 0.9, 0.5]])
    assert take_best(ious, 0.5).tolist() == [1, 2, 0, -1]
    assert ious[0, 1] == 0.6  # not written to
    assert take_best(np.zeros((2, 0)), 0.5).tolist() == [-1, -1]
