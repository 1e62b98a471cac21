"""COCO average precision: faster-coco-eval during training, pycocotools for the numbers that are reported."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
from faster_coco_eval import COCOeval_faster
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from msil.metrics.detections import DetectionMetric, named
from msil.metrics.record import AnnotatedSplit, EvaluationRecord, to_xywh

APS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
MAX_DETS = 100  # of COCO

Curves = tuple[np.ndarray, np.ndarray]  # pycocotools' precision (T, R, K, A, M) and recall (T, K, A, M)


class CocoMetric(DetectionMetric):
    """COCO AP over the images given to `update`, at most `max_dets` detections an image and class.

    Scores that tie are ranked by ascending image id, then by the detector's order, as pycocotools does. With several
    processes, all of them must call a method; each raises as `collected`.
    """

    def __init__(self, truth: AnnotatedSplit, max_dets: int = MAX_DETS) -> None:
        super().__init__(truth)
        self.max_dets = max_dets

    def compute(self) -> dict[str, float]:
        """AP, AP50, AP75, APs, APm, APl over all processes, in [0, 1]; nan where no ground truth box is counted."""
        stats = fast_stats(self.collected(), self.max_dets)
        return {name: stats[name] for name in APS}

    def compute_final(self) -> dict[str, float]:
        """All 12 numbers, of pycocotools' matching, in [0, 1]; nan where no ground truth box is counted."""
        with self.sync_context():
            precision, recall = pycocotools_curves(self.collected(), self.max_dets)
        places = np.argsort(np.argsort(list(self.truth.category_ids)))  # pycocotools' classes are by ascending id
        values = [_mean(precision[:, :, place, 0, -1]) for place in places]
        self.per_class = named(self.truth.classes, values)
        return summary(precision, recall, self.max_dets)


def pycocotools_curves(record: EvaluationRecord, max_dets: int = MAX_DETS) -> Curves:
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints every step and has no switch for it
        evaluation = coco_evaluation(record, max_dets)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"], evaluation.eval["recall"]


def summary(precision: np.ndarray, recall: np.ndarray, max_dets: int = MAX_DETS) -> dict[str, float]:
    """pycocotools' 12 numbers of its tables, precision (T, R, K, A, M) and recall (T, K, A, M), over 10 IoUs, 4 areas
    and the limits 1, 10 and max_dets. Its own summarize has -1 for every limit but 100."""
    areas = ("s", "m", "l")
    return {
        "AP": _mean(precision[..., 0, -1]),
        "AP50": _mean(precision[0, ..., 0, -1]),
        "AP75": _mean(precision[5, ..., 0, -1]),
        **{f"AP{area}": _mean(precision[..., place, -1]) for place, area in enumerate(areas, start=1)},
        **{f"AR{limit}": _mean(recall[..., 0, place]) for place, limit in enumerate((1, 10, max_dets))},
        **{f"AR{area}": _mean(recall[..., place, -1]) for place, area in enumerate(areas, start=1)},
    }


def _mean(values: np.ndarray) -> float:
    """Of pycocotools' numbers, in which -1 marks what has no object."""
    return float(values[values > -1].mean()) if (values > -1).any() else float("nan")


def coco_evaluation(record: EvaluationRecord, max_dets: int = MAX_DETS) -> COCOeval:
    """pycocotools' evaluation of a record, before `evaluate`. What is ignored is a crowd, VOC's difficult boxes too."""
    boxes = to_xywh(record.found_boxes)
    truths = _entries(
        record, record.truth_images, record.truth_labels, bbox=record.truth_boxes, area=record.truth_areas,
        iscrowd=record.truth_ignored.astype(int),
    )  # fmt: skip
    found = _entries(
        record, record.found_images, record.found_labels, bbox=boxes, area=boxes[:, 2] * boxes[:, 3],
        score=record.found_scores.astype(np.float64), iscrowd=np.zeros(len(boxes), dtype=int),
    )  # fmt: skip
    apis: list[Any] = [COCO(), COCO()]  # the constructor reads files only, and loadRes takes no empty list
    with contextlib.redirect_stdout(io.StringIO()):
        for api, entries in zip(apis, (truths, found), strict=True):
            api.dataset = {
                "images": [{"id": one} for one in record.image_ids.tolist()],
                "categories": [{"id": one} for one in record.category_ids.tolist()],
                "annotations": entries,
            }
            api.createIndex()
        evaluation = COCOeval(apis[0], apis[1], "bbox")
    evaluation.params.maxDets = [1, 10, max_dets]
    return evaluation


def _entries(
    record: EvaluationRecord, owners: np.ndarray, labels: np.ndarray, **columns: np.ndarray
) -> list[dict[str, Any]]:
    """COCO's annotations; ids are from 1, since pycocotools takes a match with annotation 0 for no match."""
    image_ids, category_ids = record.image_ids[owners], record.category_ids[labels]
    columns = {"id": np.arange(1, len(owners) + 1), "image_id": image_ids, "category_id": category_ids, **columns}
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def fast_stats(record: EvaluationRecord, max_dets: int = MAX_DETS) -> dict[str, float]:
    """The 12 numbers of `summary` by faster-coco-eval."""
    return summary(*fast_curves(record, max_dets), max_dets)


def fast_curves(record: EvaluationRecord, max_dets: int = MAX_DETS) -> Curves:
    # Its C++ reads every box from a Python dict and keeps a record of every pair of an image and a class, also of those
    # without a box. So classes are evaluated one after the other, each over the images in which it occurs.
    curves = []
    for label in range(len(record.classes)):
        evaluation = _ClassEvaluation(record, label, max_dets)
        evaluation.evaluate()
        curves.append(evaluation.eval)
    precision = np.concatenate([curve["precision"] for curve in curves], axis=2)
    return precision, np.concatenate([curve["recall"] for curve in curves], axis=1)


class _ClassEvaluation(COCOeval_faster):
    """COCOeval_faster of one class, over arrays instead of its COCO objects; the result of `evaluate` is in `eval`."""

    def __init__(self, record: EvaluationRecord, label: int, max_dets: int) -> None:
        super().__init__(iouType="bbox")
        truths = np.flatnonzero(record.truth_labels == label)
        found = np.flatnonzero(record.found_labels == label)
        # By image, then by score: those that tie keep the detector's order, as with pycocotools' stable sort.
        found = found[np.lexsort((-record.found_scores[found], record.found_images[found]))]
        images = np.union1d(record.truth_images[truths], record.found_images[found])
        self.params.imgIds, self.params.catIds = list(range(len(images))), [0]
        self.params.maxDets = [1, 10, max_dets]
        truth_owners, found_owners = (
            np.searchsorted(images, owners) for owners in (record.truth_images[truths], record.found_images[found])
        )
        truth_boxes, found_boxes = record.truth_boxes[truths], to_xywh(record.found_boxes[found])
        crowd = record.truth_ignored[truths].astype(int)
        columns = (truth_owners, record.truth_areas[truths], crowd)
        for number, (owner, area, ignored) in enumerate(zip(*(one.tolist() for one in columns), strict=True), start=1):
            self.gt_dataset.append(owner, 0, {"id": number, "area": area, "iscrowd": ignored, "ignore": ignored})
        columns = (found_owners, found_boxes[:, 2] * found_boxes[:, 3], record.found_scores[found].astype(np.float64))
        for number, (owner, area, score) in enumerate(zip(*(one.tolist() for one in columns), strict=True), start=1):
            self.dt_dataset.append(owner, 0, {"id": number, "area": area, "score": score})
        # By image: the detections, of the highest scores first, the objects, and whether these are crowds.
        starts = np.arange(1, len(images))
        parts = ((found_boxes, found_owners), (truth_boxes, truth_owners), (crowd, truth_owners))
        self.parts = [np.split(part, np.searchsorted(owners, starts)) for part, owners in parts]

    def _prepare(self) -> None:
        """The data sets have been filled."""

    def computeIoU(self, imgId: int, catId: int) -> list[list[float]]:
        """(D, G) of one image."""
        boxes, truths, crowd = (part[imgId] for part in self.parts)
        if not len(boxes) or not len(truths):
            return []
        ious: Any = mask.iou(boxes[: self.params.maxDets[-1]], truths, crowd.tolist())
        return ious.tolist()
