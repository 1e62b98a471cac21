"""Where in the image the centres of a class's boxes lie: the counts behind Figure 5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from msil.metrics.record import AnnotatedSplit

QUADRANTS = ("upper left", "upper right", "lower left", "lower right")

# The classes that the paper's Figure 5 shows, (a) to (i).
PAPER_CLASSES = (
    "bed", "hair drier", "skis", "microwave", "bicycle", "dining table", "umbrella", "mouse", "person",
)  # fmt: skip


@dataclass(frozen=True)
class Centers:
    """The centres of one class's boxes.

    points: (N, 2) float64, x and y in fractions of the image's width and height, 0 at the left and at the top.
    counts: (4,) float64, by QUADRANTS; their sum is N.
    """

    points: np.ndarray
    counts: np.ndarray

    @property
    def shares(self) -> np.ndarray:
        """(4,) fractions of the boxes; nan for a class without any."""
        return self.counts / len(self.points) if len(self.points) else np.full(4, np.nan)


def quadrant_counts(points: np.ndarray) -> np.ndarray:
    """(4,) float64: how many points (N, 2), as in Centers, lie in each of QUADRANTS.

    A point exactly on a middle line counts half on either side, and one in the very middle a quarter everywhere: boxes
    that fill their image are common, and any one side that got them would look preferred.
    """
    points = np.asarray(points, dtype=float).reshape(-1, 2)
    after = np.heaviside(points - 0.5, 0.5)  # 0 before the middle line, 0.5 on it, 1 behind it
    right, lower = after[:, 0], after[:, 1]
    return np.array([
        ((1 - right) * (1 - lower)).sum(), (right * (1 - lower)).sum(), ((1 - right) * lower).sum(),
        (right * lower).sum(),
    ])  # fmt: skip


def object_centers(truth: AnnotatedSplit) -> dict[str, Centers]:
    """Of every class, in the order of the labels.

    A centre is the middle of the box as the file has it. Ignored boxes (COCO's crowds, which are not one object, and
    VOC's difficult ones) are left out.
    """
    middles = truth.truth_boxes[:, :2] + truth.truth_boxes[:, 2:] / 2
    points = middles / truth.sizes[truth.truth_images][:, ::-1]
    found = {}
    for label, name in enumerate(truth.classes):
        own = points[(truth.truth_labels == label) & ~truth.truth_ignored]
        found[str(name)] = Centers(own, quadrant_counts(own))
    return found


def shown_classes(centers: Mapping[str, Centers], count: int = 9) -> tuple[str, ...]:
    """The paper's nine, where the data has classes of all these names as COCO does; else the `count` classes with the
    most objects, most first, ties in the data's order, and none without objects."""
    if all(name in centers for name in PAPER_CLASSES):
        return PAPER_CLASSES
    by_count = sorted(centers, key=lambda name: -len(centers[name].points))
    return tuple(name for name in by_count[:count] if len(centers[name].points))
