"""PASCAL VOC average precision by the rules of the VOC 2012 development kit (VOCevaldet.m, VOCap.m).

Boxes are continuous, x1 y1 x2 y2 with width x2 - x1. The kit works on 1-based inclusive pixels with width
x2 - x1 + 1; with 1 subtracted from x1 and y1 when the files are read, both give the same areas and IoUs.
"""

from __future__ import annotations

import numpy as np

from msil.metrics.detections import CollectedDetections, DetectionMetric, covered_ground_truth

MIN_OVERLAP = 0.5  # a detection matches at this IoU or above (VOCopts.minoverlap)


class VOCMetric(DetectionMetric):
    """VOC AP at IoU 0.5 over the images given to `update`.

    ground_truth: COCO format dict; annotations need bbox (x y w h, 0-based), image_id and category_id. Those with
        `difficult` 1 are neither to be found nor wrong to find; without the key a box is not difficult.
    category_ids: label i of the detections is category_ids[i].
    """

    def compute(self) -> dict[str, float]:
        """VOC_AP (area under the interpolated curve) and VOC_AP11 (11 points), means over the classes, in [0, 1].

        Classes without a ground truth box that counts are left out; nan if that leaves none. With several processes,
        all of them must call this. Raises as `collected`.
        """
        hits, num_truths = self._matched()
        return {
            "VOC_AP": _mean([average_precision(hits[c], num_truths[c]) for c in hits]),
            "VOC_AP11": _mean([average_precision_11(hits[c], num_truths[c]) for c in hits]),
        }

    def per_class(self) -> dict[int, float]:
        """AP (area under the curve) of every category id; nan without a ground truth box that counts.

        With several processes, all of them must call this. Raises as `collected`.
        """
        with self.sync_context():
            hits, num_truths = self._matched()
        return {c: average_precision(hits[c], num_truths[c]) for c in hits}

    def _matched(self) -> tuple[dict[int, np.ndarray], dict[int, int]]:
        found = self.collected()
        truths = covered_ground_truth(self.ground_truth, found.image_ids, self.category_ids)["annotations"]
        boxes: dict[tuple[int, int], list[list[float]]] = {}  # by category id and image id
        difficult: dict[tuple[int, int], list[bool]] = {}
        num_truths = dict.fromkeys(self.category_ids, 0)
        for annotation in truths:
            key = annotation["category_id"], annotation["image_id"]
            x, y, width, height = annotation["bbox"]
            boxes.setdefault(key, []).append([x, y, x + width, y + height])
            is_difficult = bool(annotation.get("difficult", 0))
            difficult.setdefault(key, []).append(is_difficult)
            num_truths[key[0]] += not is_difficult
        hits = {}
        for label, category_id in enumerate(self.category_ids):
            outcomes, scores = [], []
            for image_id, image_boxes, image_scores in _per_image(found, label):
                key = category_id, image_id
                truth_boxes = np.array(boxes.get(key, []), dtype=np.float64).reshape(-1, 4)
                outcome = match(image_boxes, truth_boxes, np.array(difficult.get(key, []), dtype=bool))
                outcomes.append(outcome[outcome >= 0])
                scores.append(image_scores[outcome >= 0])
            order = np.argsort(-np.concatenate([np.zeros(0), *scores]), kind="stable")
            hits[category_id] = np.concatenate([np.zeros(0, dtype=np.int64), *outcomes])[order] == 1
        return hits, num_truths


def box_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of every box (D, 4) with every other box (G, 4), both x1 y1 x2 y2: (D, G), 0 where they do not overlap."""
    top_left = np.maximum(boxes[:, None, :2], others[None, :, :2])
    bottom_right = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    intersection = (bottom_right - top_left).clip(min=0).prod(axis=2)
    areas, other_areas = ((b[:, 2:] - b[:, :2]).prod(axis=1) for b in (boxes, others))
    union = areas[:, None] + other_areas[None, :] - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=intersection > 0)


def match(boxes: np.ndarray, truths: np.ndarray, difficult: np.ndarray) -> np.ndarray:
    """Judge the detections of one image and class as VOCevaldet.m does.

    boxes: (D, 4), by descending score. truths: (G, 4). difficult: (G,) bool.
    Returns (D,) int64: 1 for a hit, 0 for a false positive, -1 for a match with a difficult box, which counts neither
    way. Each detection is compared with the truth of the highest IoU only (the first of equals), difficult or taken
    as that may be; a second match of the same truth is a false positive.
    """
    outcome = np.zeros(len(boxes), dtype=np.int64)
    if len(boxes) == 0 or len(truths) == 0:
        return outcome
    iou = box_iou(boxes, truths)
    nearest = iou.argmax(axis=1)
    matching = np.flatnonzero(iou.max(axis=1) >= MIN_OVERLAP)
    _, first = np.unique(nearest[matching], return_index=True)
    outcome[matching[first]] = 1
    outcome[matching[difficult[nearest[matching]]]] = -1
    return outcome


def average_precision(hits: np.ndarray, num_truths: int) -> float:
    """Area under the precision-recall curve, precision made monotone (VOC 2010 and later; VOCap.m).

    hits: (D,) bool, hit or false positive, by descending score over the whole set.
    num_truths: number of boxes to be found. Returns nan if it is 0.
    """
    if num_truths == 0:
        return float("nan")
    # Recall grows by 1 / num_truths at every hit and nowhere else, so that the area is a sum over the hits.
    return float(_interpolated_precision(hits)[hits].sum() / num_truths)


def average_precision_11(hits: np.ndarray, num_truths: int) -> float:
    """Mean of the interpolated precision at the recalls 0, 0.1 .. 1 (VOC 2007), arguments as `average_precision`."""
    if num_truths == 0:
        return float("nan")
    # Compared as integers: 3 hits of 10 do reach the recall 0.3, which 0.1 * 3 > 3 / 10 in floats would deny.
    starts = np.searchsorted(10 * np.cumsum(hits), np.arange(11) * num_truths, side="left")
    return float(np.append(_interpolated_precision(hits), 0.0)[starts].sum() / 11)


def _interpolated_precision(hits: np.ndarray) -> np.ndarray:
    # (D,): the highest precision at this rank or any later one.
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return np.maximum.accumulate(precision[::-1])[::-1]


def _per_image(found: CollectedDetections, label: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
    # Image id, boxes and scores of one class, by descending score inside an image.
    chosen = np.flatnonzero(found.labels == label)
    chosen = chosen[np.lexsort((-found.scores[chosen], found.owners[chosen]))]
    image_ids, starts = np.unique(found.owners[chosen], return_index=True)
    parts = np.split(chosen, starts[1:])
    return [(int(i), found.boxes[part], found.scores[part]) for i, part in zip(image_ids, parts, strict=False)]


def _mean(values: list[float]) -> float:
    counted = [value for value in values if not np.isnan(value)]
    return float(np.mean(counted)) if counted else float("nan")
