"""The fast path on cases made to go wrong, against pycocotools itself."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from msil.detection.structures import Detections
from msil.metrics import coco
from msil.metrics.coco import CocoMetric
from msil.metrics.fast import ClassEvaluation, fast_stats

from .coco_cases import CATEGORY_IDS, jittered, random_ground_truth

Box = tuple[float, float, float, float]


def truth_of(boxes: dict[int, list[tuple[int, Box, int]]], image_ids: list[int] | None = None) -> dict[str, Any]:
    """Ground truth of (category id, xywh, iscrowd) by image id, categories 1 and 2."""
    annotations = [
        {"id": 0, "image_id": image, "category_id": c, "bbox": list(xywh), "area": xywh[2] * xywh[3], "iscrowd": crowd}
        for image, rows in boxes.items()
        for c, xywh, crowd in rows
    ]
    return {
        "images": [{"id": i, "width": 640, "height": 480, "file_name": f"{i}.jpg"} for i in image_ids or boxes],
        "categories": [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}],
        "annotations": annotations,
    }


def found_of(rows: list[tuple[int, Box, float]]) -> Detections:
    """Detections of (label, xyxy, score)."""
    return Detections(
        torch.tensor([row[1] for row in rows], dtype=torch.float32).reshape(-1, 4),
        torch.tensor([row[2] for row in rows], dtype=torch.float32),
        torch.tensor([row[0] for row in rows], dtype=torch.int64),
    )


def assert_both_agree(ground_truth: dict[str, Any], found: dict[int, Detections]) -> dict[str, float]:
    metric = CocoMetric(ground_truth, [category["id"] for category in ground_truth["categories"]])
    metric.update(list(found.values()), list(found))
    expected = metric.compute_final()
    assert metric.statistics(final=False) == pytest.approx(expected, rel=0, abs=1e-8, nan_ok=True)
    return expected


def test_a_class_with_more_detections_than_count() -> None:
    # 150 detections of class 1 in image 3, all of the same score: the first 100 count, and the 101st is the only hit
    far = [(0, (300.0, 300, 310, 310), 0.5)] * 100
    late = found_of([*far, (0, (0.0, 0, 40, 40), 0.5), *far[:49]])
    numbers = assert_both_agree(truth_of({3: [(1, (0, 0, 40, 40), 0)]}), {3: late})
    assert numbers["AR100"] == 0
    early = found_of([*far[:99], (0, (0.0, 0, 40, 40), 0.5), *far[:50]])
    numbers = assert_both_agree(truth_of({3: [(1, (0, 0, 40, 40), 0)]}), {3: early})
    assert numbers["AR100"] == 1 and numbers["AR10"] == 0


def test_tied_scores_rank_by_image_id_whatever_the_order_of_updates() -> None:
    # Image 2 hits, image 9 does not: the hit is ranked first, and precision is 1 at every recall up to 1/2.
    ground_truth = truth_of({9: [(1, (0, 0, 50, 50), 0)], 2: [(1, (0, 0, 50, 50), 0)]})
    hit, miss = found_of([(0, (0.0, 0, 50, 50), 0.5)]), found_of([(0, (200.0, 200, 250, 250), 0.5)])
    numbers = assert_both_agree(ground_truth, {9: miss, 2: hit})
    assert numbers["AP50"] == pytest.approx(51 / 101)  # recalls 0 .. 0.5 of 101


def test_a_crowd_takes_any_number_and_counts_for_none() -> None:
    inside = [(0, (10.0 * i, 10, 10.0 * i + 8, 18), 0.9) for i in range(5)]
    ground_truth = truth_of({1: [(1, (0, 0, 100, 100), 1), (1, (200, 200, 50, 50), 0)]})
    numbers = assert_both_agree(ground_truth, {1: found_of([*inside, (0, (200.0, 200, 250, 250), 0.1)])})
    assert numbers["AP"] == pytest.approx(1)


def test_overlaps_and_areas_that_lie_on_a_limit() -> None:
    # IoU exactly 0.5 (10 x 5 in 10 x 10) and 0.75; areas exactly 32^2 and 96^2, which count on both sides.
    ground_truth = truth_of(
        {1: [(1, (0, 0, 10, 10), 0), (1, (50, 50, 32, 32), 0)], 2: [(2, (0, 0, 96, 96), 0), (2, (200, 0, 8, 8), 0)]}
    )
    found = {
        1: found_of([(0, (0.0, 0, 10, 5), 0.9), (0, (50.0, 50, 82, 82), 0.8)]),
        2: found_of([(1, (0.0, 0, 96, 96), 0.9), (1, (200.0, 0, 208, 6), 0.8)]),
    }
    numbers = assert_both_agree(ground_truth, found)
    assert numbers["AP50"] == pytest.approx(1) and numbers["APl"] == pytest.approx(1)


def test_image_ids_that_no_double_holds() -> None:
    first = 2**60 + 1
    boxes: dict[int, list[tuple[int, Box, int]]] = {first + i: [(1, (0, 0, 50, 50), 0)] for i in range(3)}
    found = {first + i: found_of([(0, (0.0, 0, 50, 50), 0.5)] if i != 1 else []) for i in range(3)}
    assert assert_both_agree(truth_of(boxes), found)["AR100"] == pytest.approx(2 / 3)


def test_a_class_that_is_nowhere_and_one_that_is_only_detected() -> None:
    ground_truth = truth_of({1: [(2, (0, 0, 50, 50), 0)]})
    assert assert_both_agree(ground_truth, {1: found_of([(1, (0.0, 0, 50, 50), 0.5)])})["AP"] == pytest.approx(1)
    both = found_of([(0, (0.0, 0, 50, 50), 0.9), (1, (0.0, 0, 50, 50), 0.5)])
    assert assert_both_agree(ground_truth, {1: both})["AP"] == pytest.approx(1)


def test_one_evaluation_leaves_nothing_for_the_next() -> None:
    ground_truth = random_ground_truth(0)
    metric = CocoMetric(ground_truth, CATEGORY_IDS)
    numbers = []
    for seed, images in ((0, slice(None)), (1, slice(5)), (0, slice(None))):
        found = jittered(ground_truth, CATEGORY_IDS, seed)
        chosen = list(found)[images]
        metric.update([found[i] for i in chosen], chosen)
        fast = metric.compute()
        assert fast == pytest.approx({k: v for k, v in metric.compute_final().items() if k in fast}, abs=1e-8)
        numbers.append(fast)
        metric.reset()
    assert numbers[0] == numbers[2] != numbers[1]


def test_what_is_made_for_the_c_plus_plus_is_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """One dict of three numbers a detection, of one class at a time, and no pair of an image and a class without a
    box; pycocotools' dicts are not made."""
    ground_truth = random_ground_truth(3)
    metric = CocoMetric(ground_truth, CATEGORY_IDS)
    found = jittered(ground_truth, CATEGORY_IDS, 3)
    metric.update(list(found.values()), list(found))
    made, pairs = [], []
    real = ClassEvaluation._prepare

    def spy(self: ClassEvaluation) -> None:
        real(self)
        pairs.append(len(self.params.imgIds))
        made.append([d for i in self.params.imgIds for d in self.dt_dataset.get(i, 0)])

    monkeypatch.setattr(ClassEvaluation, "_prepare", spy)
    monkeypatch.setattr(coco, "coco_results", None)
    assert metric.compute()["AP"] > 0
    collected = metric.collected()
    assert [len(dicts) for dicts in made] == np.bincount(collected.labels, minlength=len(CATEGORY_IDS)).tolist()
    assert all(d.keys() == {"id", "area", "score"} for dicts in made for d in dicts)
    boxes = {(CATEGORY_IDS.index(a["category_id"]), a["image_id"]) for a in ground_truth["annotations"]}
    with_boxes = boxes | set(zip(collected.labels.tolist(), collected.owners.tolist(), strict=True))
    assert sum(pairs) == len(with_boxes)


def test_nothing_evaluated_of_any_class_is_no_number() -> None:
    ground_truth = truth_of({1: [(1, (0, 0, 50, 50), 0)]}, image_ids=[1, 2])
    metric = CocoMetric(ground_truth, (1, 2))
    metric.update([found_of([])], [2])
    assert fast_stats(ground_truth, metric.collected(), (1, 2)) == [-1.0] * 12
    assert all(math.isnan(value) for value in metric.compute().values())
