"""AP of judged detections against pycocotools, on images as they are and as a resample counts them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from msil.metrics.matching import match_coco, match_voc
from msil.metrics.precision import per_class, precision_recall, scores

from .cases import by_pycocotools, coco_numbers, make, random_record

IMAGES = 12


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
    for metric, expected in (("AP", table.mean(axis=(0, 1))), ("AP50", table[0].mean(axis=0))):
        assert np.allclose(per_class(matches, metric), expected, rtol=0, atol=1e-9, equal_nan=True)


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


def test_only_what_the_rule_gives_can_be_asked() -> None:
    matches = match_coco(HAND)
    assert list(scores(matches, metrics=("AP75", "APs"))) == ["AP75", "APs"]
    with pytest.raises(ValueError, match="VOC_AP: coco matches give AP, AP50"):
        scores(matches, metrics=("AP", "VOC_AP"))
    with pytest.raises(ValueError, match="AP50: voc matches give VOC_AP alone"):
        scores(match_voc(HAND), metrics=("AP50",))
