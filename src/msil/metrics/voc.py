"""PASCAL VOC average precision by the rules of the VOC 2012 development kit (VOCevaldet.m, VOCap.m).

Boxes are continuous, x1 y1 x2 y2 with width x2 - x1. The kit works on 1-based inclusive pixels with width
x2 - x1 + 1; with 1 subtracted from x1 and y1 when the files are read, both give the same areas and IoUs.
"""

from __future__ import annotations

import numpy as np

from msil.metrics.detections import DetectionMetric, named
from msil.metrics.matching import match_voc
from msil.metrics.precision import per_class, scores


class VOCMetric(DetectionMetric):
    """VOC AP at IoU 0.5 over the images given to `update`; ignored boxes are VOC's difficult ones.

    With several processes, all of them must call `compute`, which raises as `collected`.
    """

    def compute(self) -> dict[str, float]:
        """VOC_AP (area under the interpolated curve) and VOC_AP11 (11 points), means over the classes, in [0, 1].

        Classes without a ground truth box that counts are left out; nan if that leaves none.
        """
        matches = match_voc(self.collected())
        self.per_class = named(self.truth.classes, per_class(matches, "VOC_AP").tolist())
        points = []
        for one in matches.classes:
            if total := int(one.truths.sum()):
                points.append(average_precision_11(one.hits[0, 0][~one.ignored[0, 0]], total))
        return {
            "VOC_AP": float(scores(matches)["VOC_AP"]),
            "VOC_AP11": float(np.mean(points)) if points else float("nan"),
        }


def average_precision_11(hits: np.ndarray, num_truths: int) -> float:
    """Mean of the interpolated precision at the recalls 0, 0.1 .. 1 (VOC 2007).

    hits: (D,) bool, hit or false positive, by descending score over the whole set. num_truths: boxes to be found, >= 1.
    """
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    interpolated = np.maximum.accumulate(precision[::-1])[::-1]
    # Compared as integers: 3 hits of 10 do reach the recall 0.3, which 0.1 * 3 > 3 / 10 in floats would deny.
    starts = np.searchsorted(10 * np.cumsum(hits), np.arange(11) * num_truths, side="left")
    return float(np.append(interpolated, 0.0)[starts].sum() / 11)
