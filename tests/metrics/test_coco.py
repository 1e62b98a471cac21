from __future__ import annotations

import contextlib
import copy
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from msil.detection.structures import Detections
from msil.metrics.coco import STATS, CocoMetric
from msil.metrics.fast import fast_stats

from .coco_cases import CATEGORY_IDS, jittered, nothing, random_ground_truth

COCO128 = Path(__file__).resolve().parents[2] / "../shared/data/coco128"


def results_of(found: dict[int, Detections], category_ids: tuple[int, ...]) -> list[dict]:
    """A COCO result file, written independently of the metric: xyxy -> xywh in doubles."""
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[int(label)],
            "bbox": [float(b[0]), float(b[1]), float(b[2]) - float(b[0]), float(b[3]) - float(b[1])],
            "score": float(score),
        }
        for image_id, detections in found.items()
        for b, score, label in zip(detections.boxes, detections.scores, detections.labels, strict=True)
    ]


def by_pycocotools(truth: Any, results: list[dict], image_ids: list[int]) -> dict[str, float]:
    """The oracle: pycocotools by its documented way, loadRes and params.imgIds."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.params.imgIds = image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(STATS, (math.nan if s == -1 else float(s) for s in evaluation.stats), strict=True))


def as_coco(ground_truth: dict, first_id: int = 1) -> COCO:
    truth: Any = COCO()  # its type hints do not know that the data set may be a plain dict
    truth.dataset = copy.deepcopy(ground_truth)
    for number, annotation in enumerate(truth.dataset["annotations"], start=first_id):
        annotation["id"] = number
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def evaluated(metric: CocoMetric, found: dict[int, Detections], image_ids: list[int], batch: int = 3) -> CocoMetric:
    for start in range(0, len(image_ids), batch):
        ids = image_ids[start : start + batch]
        metric.update([found[i] for i in ids], ids)
    return metric


def assert_same(ours: dict[str, float], expected: dict[str, float]) -> None:
    assert ours == pytest.approx({name: expected[name] for name in ours}, rel=0, abs=1e-8, nan_ok=True)


@pytest.mark.parametrize("seed", range(6))
def test_both_engines_equal_pycocotools_called_directly(seed):
    ground_truth = random_ground_truth(seed)
    found = jittered(ground_truth, CATEGORY_IDS, seed)
    image_ids = [image["id"] for image in ground_truth["images"]]
    results = results_of(found, CATEGORY_IDS)
    expected = by_pycocotools(as_coco(ground_truth), results, image_ids)
    assert 0.05 < expected["AP"] < 0.95, "a case at either end would show little"
    metric = evaluated(CocoMetric(ground_truth, CATEGORY_IDS), found, image_ids)
    assert_same(metric.compute(), expected)
    assert list(metric.compute()) == ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    assert_same(metric.compute_final(), expected)
    assert list(metric.compute_final()) == list(STATS)


@pytest.mark.parametrize("seed", range(6))
def test_the_fast_engine_agrees_in_all_twelve_numbers(seed):
    ground_truth = random_ground_truth(seed)
    found = jittered(ground_truth, CATEGORY_IDS, seed)
    image_ids = [image["id"] for image in ground_truth["images"]]
    metric = evaluated(CocoMetric(ground_truth, CATEGORY_IDS), found, image_ids)
    expected = by_pycocotools(as_coco(ground_truth), results_of(found, CATEGORY_IDS), image_ids)
    fast = fast_stats(ground_truth, metric.collected(), CATEGORY_IDS)
    assert_same(dict(zip(STATS, (math.nan if s == -1 else s for s in fast), strict=True)), expected)


def test_an_annotation_id_of_0_counts():
    # One perfect detection of the only box: every AP that is defined is 1. pycocotools itself gives 0 here, since it
    # marks a match by the annotation's id and 0 means "unmatched".
    ground_truth = {
        "images": [{"id": 5, "width": 64, "height": 64, "file_name": "a.png"}],
        "categories": [{"id": 7, "name": "thing"}],
        "annotations": [
            {"id": 0, "image_id": 5, "category_id": 7, "bbox": [4, 4, 20, 20], "area": 400.0, "iscrowd": 0}
        ],
    }
    found = {5: Detections(torch.tensor([[4.0, 4, 24, 24]]), torch.tensor([0.9]), torch.tensor([0]))}
    assert by_pycocotools(as_coco(ground_truth, first_id=0), results_of(found, (7,)), [5])["AP"] == 0
    metric = evaluated(CocoMetric(ground_truth, (7,)), found, [5])
    expected = {"AP": 1.0, "AP50": 1.0, "AP75": 1.0, "APs": 1.0, "APm": math.nan, "APl": math.nan}
    recalls = {"AR1": 1.0, "AR10": 1.0, "AR100": 1.0, "ARs": 1.0, "ARm": math.nan, "ARl": math.nan}
    assert metric.compute() == pytest.approx(expected, nan_ok=True)
    assert metric.compute_final() == pytest.approx(expected | recalls, nan_ok=True)


def test_only_the_images_seen_are_scored():
    ground_truth = random_ground_truth(1)
    found = jittered(ground_truth, CATEGORY_IDS, 1)
    seen = [image["id"] for image in ground_truth["images"]][:5]
    results = results_of({i: found[i] for i in seen}, CATEGORY_IDS)
    metric = evaluated(CocoMetric(ground_truth, CATEGORY_IDS), found, seen)
    expected = by_pycocotools(as_coco(ground_truth), results, seen)
    assert_same(metric.compute(), expected)
    assert_same(metric.compute_final(), expected)
    everywhere = by_pycocotools(as_coco(ground_truth), results, [image["id"] for image in ground_truth["images"]])
    assert everywhere["AP"] < expected["AP"]


def test_images_without_detections_lower_the_recall():
    ground_truth = random_ground_truth(2)
    found = jittered(ground_truth, CATEGORY_IDS, 2)
    image_ids = [image["id"] for image in ground_truth["images"]]
    found.update({i: nothing() for i in image_ids[::2]})
    metric = evaluated(CocoMetric(ground_truth, CATEGORY_IDS), found, image_ids)
    expected = by_pycocotools(as_coco(ground_truth), results_of(found, CATEGORY_IDS), image_ids)
    assert_same(metric.compute_final(), expected)


def test_no_detection_at_all_is_0_and_no_ground_truth_is_nan():
    ground_truth = random_ground_truth(3)
    image_ids = [image["id"] for image in ground_truth["images"]]
    metric = evaluated(CocoMetric(ground_truth, CATEGORY_IDS), {i: nothing() for i in image_ids}, image_ids)
    assert metric.compute()["AP"] == 0.0 and metric.compute_final()["AR100"] == 0.0
    metric.reset()
    empty = image_ids[-2:]  # images without a box
    evaluated(metric, jittered(ground_truth, CATEGORY_IDS, 3), empty)
    assert all(math.isnan(v) for v in [*metric.compute().values(), *metric.compute_final().values()])


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_before_any_update_everything_is_nan():
    metric = CocoMetric(random_ground_truth(0), CATEGORY_IDS)
    assert all(math.isnan(v) for v in [*metric.compute().values(), *metric.compute_final().values()])


def test_a_subset_of_the_classes_is_scored_on_its_own():
    ground_truth = random_ground_truth(4)
    subset = (18, 3)
    only = {
        **ground_truth,
        "categories": [c for c in ground_truth["categories"] if c["id"] in subset],
        "annotations": [a for a in ground_truth["annotations"] if a["category_id"] in subset],
    }
    found = jittered(only, subset, 4)
    image_ids = [image["id"] for image in ground_truth["images"]]
    expected = by_pycocotools(as_coco(only), results_of(found, subset), image_ids)
    metric = evaluated(CocoMetric(ground_truth, subset), found, image_ids)
    assert_same(metric.compute_final(), expected)


def test_prints_nothing_and_leaves_the_ground_truth_alone(capfd):
    ground_truth = random_ground_truth(5)
    before = copy.deepcopy(ground_truth)
    image_ids = [image["id"] for image in ground_truth["images"]]
    metric = evaluated(CocoMetric(ground_truth, CATEGORY_IDS), jittered(ground_truth, CATEGORY_IDS, 5), image_ids)
    metric.compute()
    metric.compute_final()
    assert capfd.readouterr() == ("", "")
    assert ground_truth == before


@pytest.mark.skipif(not COCO128.exists(), reason="the COCO128 files are not beside this repository")
@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_real_coco_files(split):
    path = COCO128 / f"annotations/instances_{split}.json"
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
    ground_truth = json.loads(path.read_text())
    category_ids = tuple(category["id"] for category in ground_truth["categories"])
    found = jittered(ground_truth, category_ids, 0)
    image_ids = [image["id"] for image in ground_truth["images"]]
    expected = by_pycocotools(truth, results_of(found, category_ids), image_ids)
    assert 0.05 < expected["AP"] < 0.95
    metric = evaluated(CocoMetric(ground_truth, category_ids), found, image_ids, batch=16)
    assert_same(metric.compute(), expected)
    assert_same(metric.compute_final(), expected)
