from __future__ import annotations

import numpy as np
import pytest

from msil.metrics.confusion import confusion, take_best
from msil.metrics.voc import box_iou

from .cases import Found, make, random_record

BOX = [0.0, 0, 10, 10]
FAR = [300.0, 300, 310, 310]


def test_by_hand() -> None:
    truths = [(0, 0, BOX), (0, 1, [20, 0, 10, 10]), (1, 1, BOX), (1, 2, FAR), (2, 0, [100, 100, 50, 50])]
    found: list[Found] = [
        (0, 0, BOX, 0.75),  # class 0 for class 0
        (0, 1, BOX, 0.5),  # the object is taken: background for class 1
        (0, 2, [20, 0, 30, 6], 0.5),  # IoU 0.6: class 1 for class 2
        (1, 1, [0, 0, 10, 5], 0.5),  # IoU 0.5 exactly: class 1 for class 1
        (1, 1, [0, 0, 10, 10], 0.25),  # below the threshold
        (1, 0, [500, 500, 600, 600], 0.875),  # background for class 0
    ]  # missed: class 2 of image 1, class 0 of image 2
    assert confusion(make(truths, found, images=3, classes=3)).tolist() == [
        [1, 0, 0, 1],
        [0, 1, 1, 0],
        [0, 0, 0, 1],
        [1, 1, 0, 0],
    ]


def test_the_better_score_chooses_first_whatever_its_class() -> None:
    found: list[Found] = [(0, 0, BOX, 0.5), (0, 1, [0, 0, 10, 6], 0.75)]
    assert confusion(make([(0, 0, BOX)], found)).tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0]]


def test_a_taken_object_leaves_the_next_best() -> None:
    # The second overlaps the first object more (IoU 10/10 against 7/13) but that is taken.
    truths = [(0, 0, BOX), (0, 1, [0, 3, 10, 10])]
    assert confusion(make(truths, [(0, 0, BOX, 0.75), (0, 0, BOX, 0.5)])).tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 0]]


def test_thresholds_are_met_by_equal_values() -> None:
    truths, found = [(0, 0, BOX)], [(0, 0, [0.0, 0, 10, 7.5], 0.3)]  # 0.3 as float32 is above 0.3
    counts = [confusion(make(truths, found), *limits)[0, 0] for limits in ((0.3, 0.75), (0.31, 0.75), (0.3, 0.76))]
    assert counts == [1, 0, 0]


def test_ignored_objects_and_what_lies_on_them_alone_are_left_out() -> None:
    truths = [(0, 0, [0, 0, 100, 100]), (0, 1, BOX)]
    found: list[Found] = [
        (0, 1, BOX, 0.75),  # on the object, and inside the crowd
        (0, 0, [50, 50, 60, 60], 0.5),  # inside the crowd alone
        (0, 1, [50, 50, 60, 60], 0.5),  # whatever its class
        (0, 1, [90, 0, 140, 100], 0.5),  # a fifth of it inside: background
    ]
    assert confusion(make(truths, found, ignored=[0])).tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 0]]


def test_nothing_is_counted_of_nothing() -> None:
    for record in (make([], []), make([], [], images=0), make([], [(0, 1, BOX, 0.1)])):
        counts = confusion(record)
        assert counts.shape == (3, 3) and counts.dtype == np.int64 and not counts.any()
    assert confusion(make([(0, 1, BOX)], [])).tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 0]]
    assert confusion(make([], [(0, 1, BOX, 0.5)])).tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 0]]


def test_take_best_takes_the_last_of_equals_as_pycocotools_does() -> None:
    ious = np.array([[0.6, 0.6, 0.2], [0.6, 0.7, 0.6], [0.9, 0.4, 0.5], [0.4, 0.9, 0.5]])
    assert take_best(ious, 0.5).tolist() == [1, 2, 0, -1]
    assert ious[0, 1] == 0.6  # not written to
    assert take_best(np.zeros((2, 0)), 0.5).tolist() == [-1, -1]


@pytest.mark.parametrize("seed", range(4))
def test_random_records_against_loops(seed: int) -> None:
    record = random_record(seed)
    classes = len(record.classes)
    expected = np.zeros((classes + 1, classes + 1), dtype=int)
    left = set(np.flatnonzero(~record.truth_ignored).tolist())
    corners = np.concatenate([record.truth_boxes[:, :2], record.truth_boxes[:, :2] + record.truth_boxes[:, 2:]], axis=1)
    ious = box_iou(record.found_boxes.astype(float), corners)
    for d in sorted(range(len(record.found_images)), key=lambda d: -record.found_scores[d]):
        if record.found_scores[d] < np.float32(0.4):
            continue
        here = np.flatnonzero(record.truth_images == record.found_images[d]).tolist()
        free = [g for g in here if g in left and ious[d, g] >= 0.5]
        if free:
            best = max(free, key=lambda g: ious[d, g])
            left.remove(best)
            expected[record.truth_labels[best], record.found_labels[d]] += 1
            continue
        x1, y1, x2, y2 = record.found_boxes[d].astype(float)
        crowds = corners[[g for g in here if record.truth_ignored[g]]]
        inside = [
            max(min(x2, g[2]) - max(x1, g[0]), 0) * max(min(y2, g[3]) - max(y1, g[1]), 0) for g in crowds
        ]  # fmt: skip
        if not any(one >= 0.5 * (x2 - x1) * (y2 - y1) for one in inside):
            expected[classes, record.found_labels[d]] += 1
    for g in left:
        expected[record.truth_labels[g], classes] += 1
    assert confusion(record, score_thresh=0.4).tolist() == expected.tolist()
    assert confusion(record)[:-1].sum() == (~record.truth_ignored).sum()  # every object is in one cell
