"""Records for the tests of this folder, by hand and at random, and what pycocotools says of them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from msil.detection.structures import Detections
from msil.metrics.detections import DetectionMetric
from msil.metrics.record import EvaluationRecord

Truth = tuple[int, int, Sequence[float]]  # image, class, x y width height
Found = tuple[int, int, Sequence[float], float]  # image, class, x1 y1 x2 y2, score


def make(
    truths: Sequence[Truth],
    found: Sequence[Found] = (),
    *,
    images: int = 1,
    classes: int | Sequence[str] = 2,
    ignored: Sequence[int] = (),
    size: int = 480,
) -> EvaluationRecord:
    """ignored: positions in `truths`. Image ids are 10, 20, ..., category ids 1, 4, ...: with gaps, as in COCO.
    size: pixels a side of all images."""
    names = [f"class {label}" for label in range(classes)] if isinstance(classes, int) else classes
    truth_flags = np.isin(np.arange(len(truths)), ignored)
    order = sorted(range(len(truths)), key=lambda i: truths[i][0])
    boxes = np.array([truths[i][2] for i in order], dtype=np.float64).reshape(-1, 4)
    found = sorted(found, key=lambda row: row[0])
    return EvaluationRecord(
        classes=np.array(names),
        category_ids=np.arange(len(names)) * 3 + 1,
        image_ids=np.arange(1, images + 1) * 10,
        file_names=np.array([f"{i}.jpg" for i in range(images)], dtype=np.str_),
        sizes=np.full((images, 2), size),
        truth_images=np.array([truths[i][0] for i in order], dtype=np.int64),
        truth_boxes=boxes,
        truth_areas=boxes[:, 2] * boxes[:, 3],
        truth_labels=np.array([truths[i][1] for i in order], dtype=np.int64),
        truth_ignored=truth_flags[order],
        found_images=np.array([row[0] for row in found], dtype=np.int64),
        found_boxes=np.array([row[2] for row in found], dtype=np.float32).reshape(-1, 4),
        found_scores=np.array([row[3] for row in found], dtype=np.float32),
        found_labels=np.array([row[1] for row in found], dtype=np.int64),
    )


def random_record(seed: int, images: int = 12, *, classes: int = 5, ties: bool = True) -> EvaluationRecord:
    """Crowds, boxes of all sizes with masks' areas, moved, doubled, mislabelled and false detections; the last two
    images without objects, the last one without detections too, the last class without objects, and 130 detections of
    one class on the first image. ties: scores that many detections share, inside of images and between them; without
    them only detections of different images do."""
    rng = np.random.default_rng(seed)
    truths: list[Truth] = []
    found: list[Found] = []
    for image in range(images - 2):
        for _ in range(rng.integers(1, 9)):
            width, height = np.exp(rng.uniform(np.log(6), np.log(250), 2))
            x, y = rng.uniform(0, 300, 2)
            truths.append((image, int(rng.integers(classes - 1)), [x, y, width, height]))
    for image, label, (x, y, width, height) in truths:
        for _ in range(130 if image == 0 and not found else rng.choice([0, 1, 1, 2, 4])):
            shift = rng.normal(0, rng.choice([0.04, 0.08, 0.25]), 4) * [width, height, width, height]
            moved = np.sort((np.array([x, y, x + width, y + height]) + shift).reshape(2, 2), axis=0).ravel()
            guess = label if image == 0 or rng.random() < 0.85 else int(rng.integers(classes))
            found.append((image, guess, moved.tolist(), 0.0))
    for image in range(images - 1):
        for _ in range(rng.integers(1, 5)):
            x, y, width, height = rng.uniform(5, 150, 4)
            found.append((image, int(rng.integers(classes)), [x, y, x + width, y + height], 0.0))
    found.sort(key=lambda row: row[0])
    owners = [row[0] for row in found]
    if ties:
        scores = rng.uniform(0.05, 1, len(found)).round(1)
    else:
        scores = np.concatenate([rng.permutation(400)[: owners.count(image)] / 400 for image in range(images)])
    found = [(*row[:3], float(score)) for row, score in zip(found, scores, strict=True)]
    crowds = np.flatnonzero(rng.random(len(truths)) < 0.15)
    record = make(truths, found, images=images, classes=classes, ignored=crowds.tolist())
    record.truth_areas[:] *= rng.uniform(0.4, 1, len(truths))
    return record


def by_pycocotools(
    record: EvaluationRecord,
    copies: Sequence[int] | None = None,
    results: str | None = None,
    max_dets: int = 100,
) -> COCOeval:
    """Evaluated and accumulated. copies: how often each image is in the data, each copy under an id of its own.
    results: a file of detections in place of the record's."""
    numbers = np.ones(len(record.image_ids), dtype=int) if copies is None else copies
    ids = record.image_ids.tolist()
    names = [
        (i, ids[i] if copies is None else 1000 * (i + 1) + copy)
        for i, number in enumerate(numbers)
        for copy in range(number)
    ]
    categories = record.category_ids.tolist()
    truths: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for image, image_id in names:
        for i in np.flatnonzero(record.truth_images == image):
            truths.append({
                "id": len(truths) + 1, "image_id": image_id, "category_id": categories[record.truth_labels[i]],
                "bbox": record.truth_boxes[i].tolist(), "area": float(record.truth_areas[i]),
                "iscrowd": int(record.truth_ignored[i]),
            })  # fmt: skip
        for i in np.flatnonzero(record.found_images == image):
            x1, y1, x2, y2 = (float(one) for one in record.found_boxes[i])
            rows.append({
                "image_id": image_id, "category_id": categories[record.found_labels[i]],
                "bbox": [x1, y1, x2 - x1, y2 - y1], "score": float(record.found_scores[i]),
            })  # fmt: skip
    truth: Any = COCO()
    truth.dataset = {
        "images": [{"id": image_id, "width": 480, "height": 480} for _, image_id in names],
        "categories": [{"id": one} for one in categories],
        "annotations": truths,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results or rows), "bbox")
        evaluation.params.maxDets = [1, 10, max_dets]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def coco_numbers(record: EvaluationRecord, copies: Sequence[int] | None = None, count: int = 6) -> dict[str, float]:
    """pycocotools' first numbers, nan for its -1."""
    stats = by_pycocotools(record, copies).stats[:count]
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")[:count]
    return {name: float("nan") if one == -1 else float(one) for name, one in zip(names, stats, strict=True)}


def updated(metric: DetectionMetric, record: EvaluationRecord, images: Sequence[int] | None = None) -> Any:
    """The metric, given the record's detections of the images at these positions (all), three at a time."""
    chosen = list(range(len(record.image_ids)) if images is None else images)
    for start in range(0, len(chosen), 3):
        batch = chosen[start : start + 3]
        metric.update([detections_of(record, image) for image in batch], record.image_ids[batch].tolist())
    return metric


def detections_of(record: EvaluationRecord, image: int) -> Detections:
    here = record.found_images == image
    parts = (record.found_boxes[here], record.found_scores[here], record.found_labels[here])
    return Detections(*(torch.from_numpy(part) for part in parts))


def nothing() -> Detections:
    return Detections(torch.zeros((0, 4)), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
