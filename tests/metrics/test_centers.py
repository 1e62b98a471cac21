"""Quadrants of object centres, counted by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from msil.metrics.centers import PAPER_CLASSES, Centers, object_centers, quadrant_counts, shown_classes


def test_points_fall_into_quadrants() -> None:
    points = np.array([[0.1, 0.2], [0.9, 0.4], [0.7, 0.1], [0.2, 0.8], [0.6, 0.51], [0.99, 0.9], [0.51, 0.99]])
    np.testing.assert_array_equal(quadrant_counts(points), [1, 2, 1, 3])
    np.testing.assert_array_equal(quadrant_counts(np.zeros((0, 2))), [0, 0, 0, 0])


def test_a_point_on_a_middle_line_is_shared() -> None:
    np.testing.assert_array_equal(quadrant_counts(np.array([[0.5, 0.1]])), [0.5, 0.5, 0, 0])
    np.testing.assert_array_equal(quadrant_counts(np.array([[0.9, 0.5]])), [0, 0.5, 0, 0.5])
    np.testing.assert_array_equal(quadrant_counts(np.array([[0.5, 0.5]])), [0.25] * 4)


def test_a_mirrored_image_has_mirrored_counts() -> None:
    points = np.random.default_rng(0).integers(0, 9, (200, 2)) / 8
    counts = quadrant_counts(points)
    np.testing.assert_array_equal(quadrant_counts(points * [-1, 1] + [1, 0]), counts[[1, 0, 3, 2]])
    np.testing.assert_array_equal(quadrant_counts(points * [1, -1] + [0, 1]), counts[[2, 3, 0, 1]])
    assert counts.sum() == 200


def annotation(image_id: int, category_id: int, bbox: list[float], iscrowd: int = 0) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "iscrowd": iscrowd}


def test_centers_by_class() -> None:
    truth = {
        "images": [{"id": 4, "width": 100, "height": 50}, {"id": 9, "width": 40, "height": 80}],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}, {"id": 8, "name": "emu"}],
        "annotations": [
            annotation(4, 3, [10, 10, 20, 10]),  # centre 20, 15 of 100 x 50
            annotation(9, 3, [20, 60, 10, 20]),  # centre 25, 70 of 40 x 80
            annotation(9, 7, [0, 0, 40, 80]),  # fills its image
            annotation(4, 7, [0, 0, 10, 10], iscrowd=1),
        ],
    }
    found = object_centers(truth)
    assert list(found) == ["cat", "dog", "emu"]
    np.testing.assert_allclose(found["cat"].points, [[0.2, 0.3], [0.625, 0.875]])
    np.testing.assert_allclose(found["cat"].shares, [0.5, 0, 0, 0.5])
    np.testing.assert_allclose(found["dog"].shares, [0.25] * 4)
    assert len(found["emu"].points) == 0 and np.isnan(found["emu"].shares).all()


def centers(**counts: int) -> dict[str, Centers]:
    return {name: Centers(np.zeros((n, 2)), np.array([n, 0.0, 0, 0])) for name, n in counts.items()}


def test_shown_classes() -> None:
    many = centers(a=1, b=5, c=0, d=5, e=9)
    assert shown_classes(many) == ("e", "b", "d", "a")
    assert shown_classes(many, 2) == ("e", "b")
    assert shown_classes(many | centers(**dict.fromkeys(PAPER_CLASSES, 0))) == PAPER_CLASSES
    assert len(PAPER_CLASSES) == 9 and PAPER_CLASSES[0] == "bed" and PAPER_CLASSES[8] == "person"


@pytest.mark.parametrize("missing", PAPER_CLASSES[:2])
def test_the_paper_s_classes_must_all_be_there(missing: str) -> None:
    there = [name for name in PAPER_CLASSES if name != missing]
    assert shown_classes(centers(a=3, **dict.fromkeys(there, 0))) == ("a",)
