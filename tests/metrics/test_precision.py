from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from msil.detection.structures import Detections
from msil.metrics import precision
from msil.metrics.coco import CocoMetric
from msil.metrics.matching import match_coco, match_voc
from msil.metrics.precision import per_class, precision_recall, scores
from msil.metrics.record import EvaluationRecord
from msil.metrics.voc import VOCMetric

from .cases import by_pycocotools, coco_numbers, make, random_record

IMAGES = 12


def metric_inputs(
    record: EvaluationRecord, copies: np.ndarray | None = None
) -> tuple[dict[str, Any], list[Detections], list[int]]:
    """The record as CocoMetric and VOCMetric take it; each copy of an image has an id of its own."""
    numbers = np.ones(len(record.image_ids), dtype=int) if copies is None else copies
    images, annotations, detections = [], [], []
    for image, number in enumerate(numbers):
        for copy in range(number):
            image_id = 1000 * (image + 1) + copy
            images.append({"id": image_id, "width": 480, "height": 480})
            for i in np.flatnonzero(record.truth_images == image):
                crowd = int(record.truth_ignored[i])
                annotations.append({
                    "id": len(annotations) + 1, "image_id": image_id, "bbox": record.truth_boxes[i].tolist(),
                    "category_id": int(record.category_ids[record.truth_labels[i]]), "difficult": crowd,
                    "iscrowd": crowd, "area": float(record.truth_areas[i]),
                })  # fmt: skip
            here = record.found_images == image
            parts = (record.found_boxes[here], record.found_scores[here], record.found_labels[here])
            detections.append(Detections(*(torch.from_numpy(part) for part in parts)))
    categories = [{"id": int(c), "name": str(c)} for c in record.category_ids]
    return (
        {"images": images, "categories": categories, "annotations": annotations},
        detections,
        [image["id"] for image in images],
    )


def voc_metric(record: EvaluationRecord, copies: np.ndarray | None = None) -> VOCMetric:
    truth, detections, image_ids = metric_inputs(record, copies)
    metric = VOCMetric(truth, record.category_ids.tolist())
    metric.update(detections, image_ids)
    return metric


def agree(found: dict[str, Any], expected: dict[str, float], place: int | None = None) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        ours = found[name] if place is None else found[name][place]
        assert ours == pytest.approx(value, abs=1e-9, rel=0, nan_ok=True), name


@pytest.mark.parametrize("seed", range(6))
def test_coco_scores_are_those_of_pycocotools(seed: int) -> None:
    record = random_record(seed)
    counts = np.bincount(record.found_images, minlength=IMAGES)
    assert counts[0] > 100 and counts[-1] == 0 and record.truth_ignored.any()  # the case is what it says
    agree(scores(match_coco(record)), coco_numbers(record))


@pytest.mark.parametrize("seed", range(3))
def test_coco_scores_are_those_that_a_run_reports(seed: int) -> None:
    record = random_record(seed)
    truth, detections, image_ids = metric_inputs(record)
    metric = CocoMetric(truth, record.category_ids.tolist())
    metric.update(detections, image_ids)
    final = metric.compute_final()
    found = scores(match_coco(record))
    agree(found, {name: final[name] for name in found})


def test_nothing_found_is_zero() -> None:
    record = make([(0, 0, [0, 0, 10, 10]), (0, 1, [0, 0, 200, 200])], [])
    assert scores(match_coco(record), metrics=("AP", "APs", "APl")) == {"AP": 0.0, "APs": 0.0, "APl": 0.0}
    assert scores(match_voc(record)) == {"VOC_AP": 0.0}


@pytest.mark.parametrize("seed", range(4))
def test_coco_weights_are_images_that_are_there_so_many_times(seed: int) -> None:
    # Equal scores inside one image would be ranked a b a b in the copies; between images they may be equal.
    record = random_record(seed, ties=False)
    assert len(np.unique(record.found_scores)) < len(record.found_scores)
    rng = np.random.default_rng(seed)
    weights = np.stack([rng.multinomial(IMAGES, np.full(IMAGES, 1 / IMAGES)), rng.integers(0, 4, IMAGES)])
    weights = np.concatenate([weights, np.ones((1, IMAGES), dtype=int)])
    found = scores(match_coco(record), weights)
    for place, copies in enumerate(weights):
        agree(found, coco_numbers(record, copies), place)


def test_coco_weights_of_zero_are_images_that_are_not_there() -> None:
    # Also with ties everywhere, since nothing is there twice.
    record = random_record(7)
    weights = (np.random.default_rng(0).random((4, IMAGES)) < 0.5).astype(int)
    found = scores(match_coco(record), weights)
    for place, copies in enumerate(weights):
        agree(found, coco_numbers(record, copies), place)


@pytest.mark.parametrize("seed", range(6))
def test_voc_scores_are_those_of_the_metric(seed: int) -> None:
    record = random_record(seed)
    metric = voc_metric(record)
    matches = match_voc(record)
    agree(scores(matches), {"VOC_AP": metric.compute()["VOC_AP"]})
    expected = metric.per_class()
    (found,) = per_class(matches).values()
    assert np.allclose(found, [expected[int(c)] for c in record.category_ids], rtol=0, atol=1e-12, equal_nan=True)
    assert np.isnan(found[-1])  # the class without objects


def test_voc_weights_are_images_that_are_there_so_many_times() -> None:
    # All-point AP sees every hit of a run of copies; the highest precision at or after each is that of the run's end.
    record = random_record(3, ties=False)
    weights = np.random.default_rng(1).integers(0, 4, (4, IMAGES))
    found = scores(match_voc(record), weights)
    for place, copies in enumerate(weights):
        agree(found, {"VOC_AP": voc_metric(record, copies).compute()["VOC_AP"]}, place)


@pytest.mark.parametrize("seed", range(3))
def test_classes_and_curves_are_those_of_pycocotools(seed: int) -> None:
    record = random_record(seed)
    evaluation = by_pycocotools(record)
    table: Any = evaluation.eval["precision"]  # (T, R, K, A, M), -1 where a class has no object
    table = np.where(table[:, :, :, 0, 2] == -1, np.nan, table[:, :, :, 0, 2])
    matches = match_coco(record)
    for place, iou in ((0, 0.5), (5, 0.75), (9, 0.95)):
        recalls, precisions = precision_recall(matches, iou)
        assert recalls.tolist() == evaluation.params.recThrs.tolist()
        assert np.allclose(precisions, table[place].T, rtol=0, atol=1e-9, equal_nan=True)
    found = per_class(matches)
    assert list(found) == ["AP", "AP50"]
    assert np.allclose(found["AP"], table.mean(axis=(0, 1)), rtol=0, atol=1e-9, equal_nan=True)
    assert np.allclose(found["AP50"], table[0].mean(axis=0), rtol=0, atol=1e-9, equal_nan=True)


# Two objects of class 0 in image 0, one in image 1; right, wrong, right, right by descending score.
HAND = make(
    [(0, 0, [0, 0, 10, 10]), (0, 0, [20, 0, 10, 10]), (1, 0, [0, 0, 10, 10])],
    [
        (0, 0, [0, 0, 10, 10], 0.875),
        (1, 0, [50, 50, 60, 60], 0.75),
        (0, 0, [20, 0, 30, 10], 0.5),
        (1, 0, [0, 0, 10, 10], 0.25),
    ],
    images=2,
)


def test_by_hand() -> None:
    # Recall 1/3 at precision 1, 2/3 at 2/3, 1 at 3/4; made monotone: 1, 3/4, 3/4.
    # Grid 0 .. 1 in hundredths: 0.00 .. 0.33 (34 points) at 1, the other 67 at 3/4.
    coco = scores(match_coco(HAND))
    assert coco["AP50"] == pytest.approx((34 + 67 * 0.75) / 101, abs=1e-12)
    assert coco["AP"] == pytest.approx((34 + 67 * 0.75) / 101, abs=1e-12)  # the boxes are exact
    assert coco["APs"] == coco["AP"] and math.isnan(coco["APm"]) and math.isnan(coco["APl"])  # type: ignore
    recalls, precisions = precision_recall(match_coco(HAND))
    assert precisions[0].tolist() == pytest.approx([1.0] * 34 + [0.75] * 67) and np.isnan(precisions[1]).all()
    assert recalls[[0, 50, 100]].tolist() == [0, 0.5, 1]
    # VOC: the area itself, 1/3 * 1 + 2/3 * 3/4.
    assert scores(match_voc(HAND)) == {"VOC_AP": pytest.approx(1 / 3 + 2 / 3 * 0.75, abs=1e-12)}


def test_weights_by_hand() -> None:
    # Image 0 alone: all right, 1. Image 1 alone: wrong, right: precision 1/2 at all recalls.
    # Image 0 twice, image 1 once: 2 right, 1 wrong, 2 right, 1 right; of 5: recall 2/5 at 1, 4/5 at 4/5, 1 at 5/6,
    # monotone 1, 5/6, 5/6. Nothing at all: nan.
    weights = np.array([[1, 0], [0, 1], [0, 3], [2, 1], [0, 0]])
    voc = scores(match_voc(HAND), weights)["VOC_AP"]
    assert np.allclose(voc, [1, 0.5, 0.5, 2 / 5 + 3 / 5 * 5 / 6, np.nan], rtol=0, atol=1e-12, equal_nan=True)
    # COCO: the grid's 41 points up to 0.4 at 1, the other 60 at 5/6.
    coco = scores(match_coco(HAND), weights)["AP50"]
    assert np.allclose(coco, [1, 0.5, 0.5, (41 + 60 * 5 / 6) / 101, np.nan], rtol=0, atol=1e-12, equal_nan=True)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    matches = match_coco(random_record(2))
    weights = np.random.default_rng(0).integers(0, 3, (7, IMAGES))
    whole = scores(matches, weights)
    monkeypatch.setattr(precision, "_BLOCK", 300)  # one or two resamples of the largest class at a time
    for name, values in scores(matches, weights).items():
        assert np.allclose(values, whole[name], rtol=0, atol=1e-12, equal_nan=True)


def test_only_what_the_rule_gives_can_be_asked() -> None:
    matches = match_coco(HAND)
    assert list(scores(matches, metrics=("AP75", "APs"))) == ["AP75", "APs"]
    with pytest.raises(ValueError, match="VOC_AP: coco matches give AP, AP50"):
        scores(matches, metrics=("AP", "VOC_AP"))
    with pytest.raises(ValueError, match="AP50: voc matches give VOC_AP alone"):
        scores(match_voc(HAND), metrics=("AP50",))


def test_no_class_with_an_object_is_nan() -> None:
    record = make([(0, 0, [0, 0, 10, 10])], [(0, 0, [0, 0, 10, 10], 0.5)], ignored=[0])
    assert all(math.isnan(float(value)) for value in scores(match_coco(record)).values())
    assert math.isnan(float(scores(match_voc(record))["VOC_AP"]))
