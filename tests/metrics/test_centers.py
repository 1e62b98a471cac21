"""Quadrants of object centres, counted by hand."""

from __future__ import annotations

import dataclasses

import numpy as np

from msil.metrics.centers import PAPER_CLASSES, object_centers, quadrant_shares, shown_classes

from .cases import Truth, make


def test_points_fall_into_quadrants() -> None:
    points = np.array([[0.1, 0.2], [0.9, 0.4], [0.7, 0.1], [0.2, 0.8], [0.6, 0.51], [0.99, 0.9], [0.51, 0.99]])
    np.testing.assert_allclose(quadrant_shares(points), np.array([1, 2, 1, 3]) / 7)


def test_a_point_on_a_middle_line_is_shared() -> None:
    np.testing.assert_array_equal(quadrant_shares(np.array([[0.5, 0.1]])), [0.5, 0.5, 0, 0])
    np.testing.assert_array_equal(quadrant_shares(np.array([[0.9, 0.5]])), [0, 0.5, 0, 0.5])
    np.testing.assert_array_equal(quadrant_shares(np.array([[0.5, 0.5]])), [0.25] * 4)


def test_centers_by_class() -> None:
    truths: list[Truth] = [
        (0, 0, [10, 10, 20, 10]),  # centre 20, 15 of 100 x 50
        (1, 0, [20, 60, 10, 20]),  # centre 25, 70 of 40 x 80
        (1, 1, [0, 0, 40, 80]),  # fills its image
        (0, 1, [0, 0, 10, 10]),
    ]
    record = make(truths, [], images=2, classes=3, ignored=[3])
    found = object_centers(dataclasses.replace(record, sizes=np.array([[50, 100], [80, 40]])))
    assert list(found) == ["class 0", "class 1", "class 2"]
    np.testing.assert_allclose(found["class 0"], [[0.2, 0.3], [0.625, 0.875]])
    np.testing.assert_allclose(found["class 1"], [[0.5, 0.5]])
    assert len(found["class 2"]) == 0 and np.isnan(quadrant_shares(found["class 2"])).all()


def centers(**counts: int) -> dict[str, np.ndarray]:
    return {name: np.zeros((n, 2)) for name, n in counts.items()}


def test_shown_classes() -> None:
    many = centers(a=1, b=5, c=0, d=5, e=9)
    assert shown_classes(many) == ("e", "b", "d", "a")
    assert shown_classes(many, 2) == ("e", "b")
    assert shown_classes(many | centers(**dict.fromkeys(PAPER_CLASSES, 0))) == PAPER_CLASSES
    assert len(PAPER_CLASSES) == 9 and PAPER_CLASSES[0] == "bed" and PAPER_CLASSES[8] == "person"
