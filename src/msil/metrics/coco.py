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


def to_coco(truth: AnnotatedSplit) -> dict[str, list[dict[str, Any]]]:
    """COCO's dict of a record or of Annotations.

    Its annotations have ids from 1 (pycocotools takes a match with annotation 0 for no match), bbox as in the data's
    files and not clipped, area, and iscrowd 0 or 1: 1 for VOC's difficult boxes too.
    """
    sizes = zip(truth.image_ids.tolist(), truth.sizes.tolist(), truth.file_names, strict=True)
    names = zip(truth.category_ids, truth.classes, strict=True)
    return {
        "images": [{"id": i, "height": h, "width": w, "file_name": str(name)} for i, (h, w), name in sizes],
        "categories": [{"id": int(category_id), "name": str(name)} for category_id, name in names],
        "annotations": _entries(
            truth, truth.truth_images, truth.truth_labels, bbox=truth.truth_boxes, area=truth.truth_areas,
            iscrowd=truth.truth_ignored.astype(int),
        ),
    }  # fmt: skip


def coco_evaluation(record: EvaluationRecord, max_dets: int = MAX_DETS) -> COCOeval:
    """pycocotools' evaluation of a record, before `evaluate`."""
    truth = to_coco(record)
    boxes = to_xywh(record.found_boxes)
    found = _entries(
        record, record.found_images, record.found_labels, bbox=boxes, area=boxes[:, 2] * boxes[:, 3],
        score=record.found_scores.astype(np.float64), iscrowd=np.zeros(len(boxes), dtype=int),
    )  # fmt: skip
    apis: list[Any] = [COCO(), COCO()]  # the constructor reads files only, and loadRes takes no empty list
    with contextlib.redirect_stdout(io.StringIO()):
        for api, entries in zip(apis, (truth["annotations"], found), strict=True):
            api.dataset = truth | {"annotations": entries}
            api.createIndex()
        evaluation = COCOeval(apis[0], apis[1], "bbox")
    evaluation.params.maxDets = [1, 10, max_dets]
    return evaluation


def _entries(
    truth: AnnotatedSplit, owners: np.ndarray, labels: np.ndarray, **columns: np.ndarray
) -> list[dict[str, Any]]:
    image_ids, category_ids = truth.image_ids[owners], np.asarray(truth.category_ids)[labels]
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
        evaluation = _ClassEvaluation(record, label)
        evaluation.params.maxDets = [1, 10, max_dets]
        evaluation.evaluate()
        curves.append(evaluation.eval)
    precision = np.concatenate([curve["precision"] for curve in curves], axis=2)
    return precision, np.concatenate([curve["recall"] for curve in curves], axis=1)


class _ClassEvaluation(COCOeval_faster):
    """COCOeval_faster of one class, over arrays instead of its COCO objects; the result of `evaluate` is in `eval`."""

    def __init__(self, record: EvaluationRecord, label: int) -> None:
        super().__init__(iouType="bbox")
        truths = np.flatnonzero(record.truth_labels == label)
        found = np.flatnonzero(record.found_labels == label)
        # By image, then by score: those that tie keep the detector's order, as with pycocotools' stable sort.
        found = found[np.lexsort((-record.found_scores[found], record.found_images[found]))]
        self.crowd, self.areas = record.truth_ignored[truths].astype(int), record.truth_areas[truths]
        self.truth_boxes, self.found_boxes = record.truth_boxes[truths], to_xywh(record.found_boxes[found])
        self.scores = record.found_scores[found].astype(np.float64)
        images = np.union1d(record.truth_images[truths], record.found_images[found])
        self.truth_owners, self.truth_bounds = _positions(record.truth_images[truths], images)
        self.found_owners, self.found_bounds = _positions(record.found_images[found], images)
        self.params.imgIds = list(range(len(images)))
        self.params.catIds = [0]

    def _prepare(self) -> None:
        """Fills the C++ data sets."""
        columns = (self.truth_owners, self.areas.tolist(), self.crowd.tolist())
        for number, (owner, area, crowd) in enumerate(zip(*columns, strict=True), start=1):
            self.gt_dataset.append(owner, 0, {"id": number, "area": area, "iscrowd": crowd, "ignore": crowd})
        areas = self.found_boxes[:, 2] * self.found_boxes[:, 3]
        columns = (self.found_owners, areas.tolist(), self.scores.tolist())
        for number, (owner, area, score) in enumerate(zip(*columns, strict=True), start=1):
            self.dt_dataset.append(owner, 0, {"id": number, "area": area, "score": score})

    def computeIoU(self, imgId: int, catId: int) -> list[list[float]]:
        """(D, G) of one image, the highest scores first."""
        truths, found = (slice(*bounds[imgId : imgId + 2]) for bounds in (self.truth_bounds, self.found_bounds))
        if truths.start == truths.stop or found.start == found.stop:
            return []
        boxes = self.found_boxes[found][: self.params.maxDets[-1]]
        ious: Any = mask.iou(boxes, self.truth_boxes[truths], self.crowd[truths].tolist())
        return ious.tolist()


def _positions(owners: np.ndarray, images: np.ndarray) -> tuple[list[int], list[int]]:
    """Each owner's position in `images`, both ascending, and where each image's rows of `owners` begin, and the end."""
    bounds = np.append(np.searchsorted(owners, images), len(owners))
    return np.searchsorted(images, owners).tolist(), bounds.tolist()
