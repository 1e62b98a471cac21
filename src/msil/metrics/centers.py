"""Where in the image the centres of a class's boxes lie: the counts behind Figure 5."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from msil.metrics.record import AnnotatedSplit

QUADRANTS = ("upper left", "upper right", "lower left", "lower right")

# The classes that the paper's Figure 5 shows, (a) to (i).
PAPER_CLASSES = (
    "bed", "hair drier", "skis", "microwave", "bicycle", "dining table", "umbrella", "mouse", "person",
)  # fmt: skip


def quadrant_shares(points: np.ndarray) -> np.ndarray:
    """(4,) the shares of points (N, 2), as from `object_centers`, that lie in each of QUADRANTS; nan without points.

    A point exactly on a middle line counts half on either side, and one in the very middle a quarter everywhere: boxes
    that fill their image are common, and any one side that got them would look preferred.
    """
    after = np.heaviside(points - 0.5, 0.5)  # 0 before the middle line, 0.5 on it, 1 behind it
    right, lower = after[:, 0], after[:, 1]
    left, upper = 1 - right, 1 - lower
    counts = [(x * y).sum() for x, y in ((left, upper), (right, upper), (left, lower), (right, lower))]
    return np.array(counts) / len(points) if len(points) else np.full(4, np.nan)


def object_centers(truth: AnnotatedSplit) -> dict[str, np.ndarray]:
    """The middles of every class's boxes as the file has them, in the order of the labels.

    (N, 2) float64, x and y in fractions of the image's width and height, 0 at the left and at the top. Ignored boxes
    (COCO's crowds, which are not one object, and VOC's difficult ones) are left out.
    """
    middles = truth.truth_boxes[:, :2] + truth.truth_boxes[:, 2:] / 2
    points = middles / truth.sizes[truth.truth_images][:, ::-1]
    return {
        str(name): points[(truth.truth_labels == label) & ~truth.truth_ignored]
        for label, name in enumerate(truth.classes)
    }


def shown_classes(centers: Mapping[str, np.ndarray], count: int = 9) -> tuple[str, ...]:
    """The paper's nine, where the data has classes of all these names as COCO does; else the `count` classes with the
    most objects, most first, ties in the data's order, and none without objects."""
    if all(name in centers for name in PAPER_CLASSES):
        return PAPER_CLASSES
    by_count = sorted(centers, key=lambda name: -len(centers[name]))
    return tuple(name for name in by_count[:count] if len(centers[name]))
