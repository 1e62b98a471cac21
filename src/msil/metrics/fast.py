"""COCO's 12 numbers by faster-coco-eval, fed from arrays.

Its C++ reads every box from a Python dict and keeps a record of every pair of an image and a class, also of those
without a box. So classes are evaluated one after the other, each over the images in which it occurs: a dict holds
nothing but what the C++ reads, and lives as long as its class is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from faster_coco_eval import COCOeval_faster
from pycocotools import mask

from msil.metrics.detections import CollectedDetections

CLASS = 0  # stands for the one class that is evaluated


@dataclass(frozen=True)
class Truths:
    """The boxes of one class that are to be found, G of them, by ascending image id.

    owners: (G,) int64, each box's image id. xywh: (G, 4) float64, pixels. areas: (G,) float64, px^2, of the object's
    outline. crowd: (G,) int64, 0 or 1.
    """

    owners: np.ndarray
    xywh: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray


@dataclass(frozen=True)
class Found:
    """The detections of one class, D of them, by ascending image id, then descending score.

    owners: (D,) int64, each one's image id. xywh: (D, 4) float64, pixels. scores: (D,) float64.
    """

    owners: np.ndarray
    xywh: np.ndarray
    scores: np.ndarray


def fast_stats(ground_truth: dict[str, Any], found: CollectedDetections, category_ids: Sequence[int]) -> list[float]:
    """The 12 numbers of pycocotools, over the images that were evaluated; -1 where no ground truth box is counted.

    ground_truth: COCO format dict, not written to. category_ids: label i of the detections is category_ids[i].
    """
    truths = truths_by_class(ground_truth, found.image_ids, category_ids)
    curves = []
    for one, detections in zip(truths, found_by_class(found, len(category_ids)), strict=True):
        evaluation = ClassEvaluation(one, detections)
        evaluation.evaluate()
        curves.append(evaluation.eval)
    whole = COCOeval_faster(iouType="bbox")
    whole.eval = {
        "precision": np.concatenate([curve["precision"] for curve in curves], axis=2),  # (T, R, K, A, M)
        "recall": np.concatenate([curve["recall"] for curve in curves], axis=1),  # (T, K, A, M)
    }
    whole.summarize()
    return [float(value) for value in whole.stats]


class ClassEvaluation(COCOeval_faster):
    """COCOeval_faster of one class, over arrays instead of its COCO objects; the result of `evaluate` is in `eval`."""

    def __init__(self, truths: Truths, found: Found) -> None:
        super().__init__(iouType="bbox")
        images = np.union1d(truths.owners, found.owners)
        self.truths, self.found = truths, found
        self.truth_owners, self.truth_rows = _positions(truths.owners, images)
        self.found_owners, self.found_rows = _positions(found.owners, images)
        self.params.imgIds = list(range(len(images)))  # positions in `images`: the C++ takes ids as doubles
        self.params.catIds = [CLASS]

    def _prepare(self) -> None:
        """Fills the C++ data sets."""
        columns = (self.truth_owners, self.truths.areas.tolist(), self.truths.crowd.tolist())
        for number, (owner, area, crowd) in enumerate(zip(*columns, strict=True), start=1):
            self.gt_dataset.append(owner, CLASS, {"id": number, "area": area, "iscrowd": crowd, "ignore": crowd})
        areas = self.found.xywh[:, 2] * self.found.xywh[:, 3]
        columns = (self.found_owners, areas.tolist(), self.found.scores.tolist())
        for number, (owner, area, score) in enumerate(zip(*columns, strict=True), start=1):
            self.dt_dataset.append(owner, CLASS, {"id": number, "area": area, "score": score})

    def computeIoU(self, imgId: int, catId: int) -> list[list[float]]:
        """(D, G) of one image, the highest scores first."""
        truths, found = self.truth_rows[imgId], self.found_rows[imgId]
        if truths.start == truths.stop or found.start == found.stop:
            return []
        boxes = self.found.xywh[found][: self.params.maxDets[-1]]
        ious: Any = mask.iou(boxes, self.truths.xywh[truths], self.truths.crowd[truths].tolist())
        return ious.tolist()


def truths_by_class(ground_truth: dict[str, Any], image_ids: np.ndarray, category_ids: Sequence[int]) -> list[Truths]:
    """Of a COCO format dict, what lies in the given images (ascending ids), one for each of `category_ids`."""
    images = set(image_ids.tolist())
    chosen: dict[int, list[dict[str, Any]]] = {category_id: [] for category_id in category_ids}
    for annotation in ground_truth["annotations"]:
        if annotation["image_id"] in images and annotation["category_id"] in chosen:
            chosen[annotation["category_id"]].append(annotation)
    truths = []
    for category_id in category_ids:
        annotations = sorted(chosen[category_id], key=lambda annotation: annotation["image_id"])
        truths.append(
            Truths(
                np.array([annotation["image_id"] for annotation in annotations], dtype=np.int64),
                np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64).reshape(-1, 4),
                np.array([annotation["area"] for annotation in annotations], dtype=np.float64),
                np.array([annotation["iscrowd"] for annotation in annotations], dtype=np.int64),
            )
        )
    return truths


def found_by_class(found: CollectedDetections, num_classes: int) -> list[Found]:
    """One for each label; scores that tie keep the detector's order, as with pycocotools' stable sort."""
    order = np.lexsort((-found.scores, found.owners, found.labels))
    ends = np.searchsorted(found.labels[order], np.arange(num_classes), side="right")
    classes = []
    for rows in np.split(order, ends[:-1]):
        corners = found.boxes[rows]
        xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
        classes.append(Found(found.owners[rows], xywh, found.scores[rows]))
    return classes


def _positions(owners: np.ndarray, images: np.ndarray) -> tuple[list[int], list[slice]]:
    """Each owner's position in `images`, both ascending, and each image's rows of `owners`."""
    bounds = np.append(np.searchsorted(owners, images), len(owners)).tolist()
    return np.searchsorted(images, owners).tolist(), [slice(*pair) for pair in pairwise(bounds)]
