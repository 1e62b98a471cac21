"""VOC AP by hand, and against the development kit told as loops."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from msil.metrics.matching import judge_voc, match_voc
from msil.metrics.precision import per_class
from msil.metrics.voc import VOCMetric, average_precision_11

from .cases import Found, make, nothing, updated

CAR, DOG, CAT = 0, 1, 2


def test_eleven_points_by_hand() -> None:
    # 4 boxes to find; hit, miss, hit, miss, hit. Precision at the ranks: 1, 1/2, 2/3, 2/4, 3/5; recall: 1/4, 1/4,
    # 2/4, 2/4, 3/4. Made monotone from the right: 1, 2/3, 2/3, 3/5, 3/5; beyond recall 3/4 it is 0.
    # Recalls 0, .1, .2 -> 1; .3, .4, .5 -> 2/3; .6, .7 -> 3/5; .8, .9, 1 -> 0: (3 + 2 + 6/5) / 11.
    assert average_precision_11(np.array([1, 0, 1, 0, 1], dtype=bool), 4) == pytest.approx(6.2 / 11, abs=1e-12)
    assert average_precision_11(np.zeros(0, dtype=bool), 3) == average_precision_11(np.zeros(2, dtype=bool), 3) == 0.0


def test_recalls_on_the_eleven_points_are_reached() -> None:
    # 10 boxes, n hits, no miss: the points 0, .1, .. n/10 have precision 1: n + 1 of 11, for every n. In floats
    # 0.1 * 3 > 3 / 10 would lose one of them.
    for n in range(11):
        expected = (n + 1) / 11 if n else 0.0
        assert average_precision_11(np.ones(n, dtype=bool), 10) == pytest.approx(expected, abs=1e-12)


def test_an_iou_of_exactly_one_half_matches() -> None:
    # 10 x 10 against its left half of 5 x 10: 50 / 100 = 0.5, and the kit tests ovmax >= minoverlap.
    truths = np.array([[0.0, 0, 10, 10]])
    assert judge_voc(np.array([[0.0, 0, 5, 10]]), truths, np.array([False])).tolist() == [1]
    assert judge_voc(np.array([[0.0, 0, 4.99, 10]]), truths, np.array([False])).tolist() == [0]


def test_a_detection_is_judged_by_its_best_truth_only() -> None:
    # Truths A = x 0..10 and B = x 2..12, all 10 high. Detection 1 is A: hit. Detection 2 is x 0..11: IoU with A 10/11,
    # with B 9/12. It goes to A, which is taken: false, though B (IoU 0.75) is free and COCO would give it.
    truths = np.array([[0.0, 0, 10, 10], [2, 0, 10, 10]])
    boxes = np.array([[0.0, 0, 10, 10], [0, 0, 11, 10]])
    assert judge_voc(boxes, truths, np.array([False, False])).tolist() == [1, 0]


def kit_iou(a: np.ndarray, b: np.ndarray) -> float:
    """The kit's own arithmetic on 1-based inclusive corners."""
    iw = min(a[2], b[2]) - max(a[0], b[0]) + 1
    ih = min(a[3], b[3]) - max(a[1], b[1]) + 1
    if iw <= 0 or ih <= 0:
        return 0.0
    area_a, area_b = ((c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b))
    return iw * ih / (area_a + area_b - iw * ih)


def test_the_metric_by_hand() -> None:
    # Cars: images 0 and 1 one each, image 2 a difficult one. Dogs: two in image 0. Cats: a difficult one only.
    a, b = [10.0, 10, 50, 50], [100.0, 100, 150, 180]
    a_size, b_size = [10.0, 10, 40, 40], [100.0, 100, 50, 80]
    truths = [
        (0, CAR, a_size),
        (1, CAR, b_size),
        (2, CAR, a_size),
        (0, DOG, b_size),
        (0, DOG, a_size),
        (1, CAT, a_size),
    ]
    # Cars by score: .9 image 2 on the difficult box: dropped. .8 image 0 hit. .7 image 0 same box again: false.
    # .6 image 1 hit. Hits 1 0 1 of 2: precision 1, 1/2, 2/3; AP = 1/2 * 1 + 1/2 * 2/3 = 5/6.
    # 11 points: 0 .. .5 -> 1 (6 of them), .6 .. 1 -> 2/3 (5): (6 + 10/3) / 11 = 28/33.
    # Dogs: .9 image 0 on the car's place b: hit. .5 in image 1: false. Hits 1 0 of 2: AP = 1/2; 11 points: 6/11.
    # Cats: the one match is with a difficult box and nothing is to be found: nan, left out of the means.
    found: list[Found] = [
        (0, CAR, a, 0.8), (0, CAR, a, 0.7), (0, DOG, b, 0.9), (2, CAR, a, 0.9), (1, CAR, b, 0.6), (1, DOG, a, 0.5),
        (1, CAT, a, 0.4),
    ]  # fmt: skip
    record = make(truths, found, images=3, classes=3, ignored=[2, 5])
    metric = updated(VOCMetric(record), record, [0, 2, 1])
    assert per_class(match_voc(record), "VOC_AP") == pytest.approx([5 / 6, 1 / 2, math.nan], abs=1e-12, nan_ok=True)
    assert metric.compute() == pytest.approx(
        {"VOC_AP": (5 / 6 + 1 / 2) / 2, "VOC_AP11": (28 / 33 + 6 / 11) / 2}, rel=0, abs=1e-12
    )
    assert [None if value is None else round(value, 12) for value in metric.per_class.values()] == [
        round(5 / 6, 12), 0.5, None,
    ]  # fmt: skip


def test_only_images_seen_count_and_no_detection_is_0() -> None:
    box = [0.0, 0, 10, 10]
    metric = VOCMetric(make([(0, CAR, box), (1, CAR, box)], [], images=3))
    record = make([], [(0, CAR, box, 0.5)])
    updated(metric, record)
    assert metric.compute() == {"VOC_AP": 1.0, "VOC_AP11": 1.0}
    metric.update([nothing()], [20])  # one of two found: area 1/2, the points 0 .. .5 of 11
    assert metric.compute() == pytest.approx({"VOC_AP": 0.5, "VOC_AP11": 6 / 11}, abs=1e-12)
    metric.reset()
    metric.update([nothing(), nothing()], [10, 20])
    assert metric.compute() == {"VOC_AP": 0.0, "VOC_AP11": 0.0}
    metric.reset()
    metric.update([nothing()], [30])  # an image without boxes
    assert all(math.isnan(value) for value in metric.compute().values())


def kit_curve(results: list[tuple], truths: dict[int, list]) -> tuple[float, float]:
    """VOCevaldet.m and VOCap.m retold as plain loops on inclusive pixels, for one class.

    results: (score, image, inclusive box), in file order. truths: image -> [(inclusive box, difficult)].
    """
    to_find = sum(not difficult for boxes in truths.values() for _, difficult in boxes)
    taken: set[tuple[int, int]] = set()
    tp, fp, curve = 0, 0, []
    for _, image, box in sorted(results, key=lambda row: -row[0]):  # sorted() is stable
        best, best_iou = -1, -1.0
        for j, (truth_box, _) in enumerate(truths[image]):
            iou = kit_iou(np.array(box), np.array(truth_box))
            if iou > best_iou:
                best, best_iou = j, iou
        if best_iou >= 0.5:
            if truths[image][best][1]:
                continue
            is_hit = (image, best) not in taken
            taken.add((image, best))
        else:
            is_hit = False
        tp, fp = tp + is_hit, fp + (not is_hit)
        curve.append((Fraction(tp, to_find), Fraction(tp, tp + fp)))
    recalls = [Fraction(0), *(recall for recall, _ in curve)]
    area = sum((recalls[k + 1] - recalls[k]) * max(precision for _, precision in curve[k:]) for k in range(len(curve)))
    points = sum(max((p for r, p in curve if r >= Fraction(k, 10)), default=Fraction(0)) for k in range(11)) / 11
    return float(area), float(points)


@pytest.mark.parametrize("seed", range(5))
def test_random_cases_equal_the_kit_told_as_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truths: dict[int, list] = {}
    rows, ignored, results = [], [], []
    found: list[Found] = []
    for image in range(6):
        corners = rng.integers(1, 60, (5, 2))
        boxes = np.concatenate([corners, corners + rng.integers(5, 40, (5, 2))], axis=1)
        truths[image] = [(box.tolist(), bool(rng.random() < 0.3)) for box in boxes[: rng.integers(0, 6)]]
        for (x1, y1, x2, y2), difficult in truths[image]:
            ignored += [len(rows)] if difficult else []
            rows.append((image, DOG, [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]))
        moved = np.repeat(boxes, 3, axis=0) + rng.integers(-4, 5, (15, 4))
        scores = rng.integers(1, 9, 15) / 8  # many ties, exact in float32
        for score, (x1, y1, x2, y2) in zip(scores, moved.tolist(), strict=True):
            results.append((score, image, [x1, y1, x2, y2]))
            found.append((image, DOG, [x1 - 1.0, y1 - 1.0, x2, y2], score))
    record = make(rows, found, images=6, ignored=ignored)
    area, points = kit_curve(results, truths)
    assert 0.1 < area < 0.95
    metric = updated(VOCMetric(record), record)
    assert metric.compute() == pytest.approx({"VOC_AP": area, "VOC_AP11": points}, rel=0, abs=1e-12)
