"""CocoMetric's two engines against pycocotools called by its documented way."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from msil.metrics.coco import CocoMetric, fast_stats, pycocotools_curves, summary
from msil.metrics.matching import match_coco
from msil.metrics.precision import scores
from msil.metrics.record import EvaluationRecord

from .cases import by_pycocotools, coco_numbers, make, nothing, random_record, updated


def assert_same(ours: dict[str, float], expected: dict[str, float]) -> None:
    assert ours == pytest.approx({name: expected[name] for name in ours}, rel=0, abs=1e-8, nan_ok=True)


def unsorted(record: EvaluationRecord) -> EvaluationRecord:
    """The same truth with its images and boxes in another order, as data sets have them."""
    order = np.random.default_rng(0).permutation(len(record.image_ids))
    boxes = np.random.default_rng(1).permutation(len(record.truth_images))
    names = ("truth_boxes", "truth_areas", "truth_labels", "truth_ignored")
    return dataclasses.replace(
        record,
        **{name: getattr(record, name)[order] for name in ("image_ids", "file_names", "sizes")},
        **{name: getattr(record, name)[boxes] for name in names},
        truth_images=np.argsort(order)[record.truth_images[boxes]],
    )


@pytest.mark.parametrize("seed", range(6))
def test_both_engines_equal_pycocotools_called_directly(seed: int, capfd: pytest.CaptureFixture[str]) -> None:
    record = random_record(seed)
    expected = coco_numbers(record, count=12)
    assert 0.05 < expected["AP"] < 0.95, "a case at either end would show little"
    metric = updated(CocoMetric(unsorted(record)), record)
    capfd.readouterr()
    assert_same(metric.compute(), expected)
    assert list(metric.compute()) == list(expected)[:6]
    assert_same(metric.compute_final(), expected)
    assert list(metric.compute_final()) == list(expected)
    assert_same(fast_stats(metric.collected()), expected)
    assert capfd.readouterr() == ("", "")


def test_ap_by_class_whatever_the_order_of_the_classes() -> None:
    """pycocotools has them by ascending id; here the last id comes first."""
    record = random_record(2)
    last = len(record.classes) - 1
    flipped = dataclasses.replace(
        record,
        **{name: getattr(record, name)[::-1] for name in ("classes", "category_ids")},
        **{name: last - getattr(record, name) for name in ("truth_labels", "found_labels")},
    )
    precision = by_pycocotools(record).eval["precision"][..., 0, -1]
    found = {}
    for label, name in enumerate(record.classes.tolist()):
        own = precision[:, :, label]
        found[name] = pytest.approx(own[own > -1].mean()) if (own > -1).any() else None
    for one in (record, flipped):
        metric = updated(CocoMetric(one), one)
        metric.compute_final()
        assert metric.per_class == found and list(metric.per_class) == one.classes.tolist()


def test_more_detections_than_coco_counts() -> None:
    record = random_record(1)  # 130 of one class on the first image
    precision = by_pycocotools(record, max_dets=130).eval["precision"][..., 0, -1]
    metric = updated(CocoMetric(record, max_dets=130), record)
    found = metric.compute_final()
    assert found["AP"] == pytest.approx(precision[precision > -1].mean()) == metric.compute()["AP"]
    assert found["AP"] != updated(CocoMetric(record), record).compute_final()["AP"] and "AR130" in found
    assert scores(match_coco(record, 130))["AP"] == pytest.approx(found["AP"])


def test_only_the_images_seen_are_scored() -> None:
    record = random_record(1)
    names = ("found_images", "found_boxes", "found_scores", "found_labels")
    kept = record.found_images < 5
    seen = {name: getattr(record, name)[kept] for name in names}
    copies = (np.arange(12) < 5).astype(int)
    metric = updated(CocoMetric(record), record, range(5))
    assert_same(metric.compute_final(), coco_numbers(dataclasses.replace(record, **seen), copies, count=12))


def test_no_detection_is_0_and_no_ground_truth_is_nan() -> None:
    record = random_record(3)
    metric = CocoMetric(record)
    metric.update([nothing()] * 12, record.image_ids.tolist())
    assert metric.compute()["AP"] == 0.0 and metric.compute_final()["AR100"] == 0.0
    metric.reset()
    updated(metric, record, [10, 11])  # images without a box
    assert all(math.isnan(v) for v in [*metric.compute().values(), *metric.compute_final().values()])


def engines(record: EvaluationRecord) -> dict[str, float]:
    expected = summary(*pycocotools_curves(record))
    assert_same(fast_stats(record), expected)
    return expected


def test_crowds_and_boxes_without_size() -> None:
    truths = [(0, 0, [0, 0, 100, 100]), (0, 0, [10, 10, 20, 20]), (1, 1, [0, 0, 50, 50])]
    found = [(0, 0, [x, 10.0, x + 20, 30], 0.9 - x / 100) for x in (10.0, 40, 70)]
    engines(make(truths, [*found, (1, 1, [3.0, 3, 3, 9], 0.25), (1, 1, [0.0, 0, 50, 50], 0.5)], images=2, ignored=[0]))


def test_ious_of_the_thresholds_themselves() -> None:
    truths = [(k, 0, [0, 0, 100, 100]) for k in range(10)]
    found = [(k, 0, [0.0, 0, 100, 50 + 5 * k], 0.5) for k in range(10)]  # IoU 0.50, 0.55 .. 0.95
    record = make(truths, found, images=10)
    assert by_pycocotools(record).stats[0] > 0.3
    engines(record)
