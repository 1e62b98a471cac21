"""Detections matched with the ground truth once; AP over any resample of the images is computed from the matches."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask

from msil.metrics.coco import MAX_DETS, coco_evaluation
from msil.metrics.record import EvaluationRecord, to_xywh

COCO_AREAS = ("all", "small", "medium", "large")
COCO_IOUS = tuple(np.linspace(0.5, 0.95, 10).round(2).tolist())
VOC_IOU = 0.5  # a detection matches at this IoU or above (VOCopts.minoverlap)


@dataclass(frozen=True)
class ClassMatches:
    """The detections of one class by descending score; of equal ones the earlier image first. A areas, T IoUs.

    images: (D,) int64, position of each detection's image. hits, ignored: (A, T, D) bool; a detection that is neither
    is a false positive. truths: (A, I) int64, the objects of each image that count.
    """

    images: np.ndarray
    hits: np.ndarray
    ignored: np.ndarray
    truths: np.ndarray


@dataclass(frozen=True)
class Matches:
    """rule: "coco" or "voc". areas: (A,), ious: (T,). classes: one a class. images: I."""

    rule: str
    areas: tuple[str, ...]
    ious: tuple[float, ...]
    classes: tuple[ClassMatches, ...]
    images: int


def match_coco(record: EvaluationRecord, max_dets: int = MAX_DETS) -> Matches:
    """By COCO's rule (pycocotools does the matching): 10 IoUs, 4 areas, `max_dets` detections an image and class."""
    position = {image_id: i for i, image_id in enumerate(record.image_ids.tolist())}
    classes = []
    evaluation = coco_evaluation(record, max_dets)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints every step and has no switch for it
        for category_id in record.category_ids.tolist():  # one at a time: it keeps a dict an image and area
            evaluation.params.catIds = [category_id]
            evaluation.evaluate()
            classes.append(_class_matches(evaluation.evalImgs, position))
    return Matches("coco", COCO_AREAS, COCO_IOUS, tuple(classes), len(position))


def match_voc(record: EvaluationRecord) -> Matches:
    """By VOC's rule at IoU 0.5 (`judge_voc`), all sizes."""
    classes = []
    for label in range(len(record.classes)):
        found = np.flatnonzero(record.found_labels == label)
        found = found[np.lexsort((-record.found_scores[found], record.found_images[found]))]
        truths = np.flatnonzero(record.truth_labels == label)
        outcomes = np.zeros(len(found), dtype=np.int64)
        images, starts = np.unique(record.found_images[found], return_index=True)
        for image, here in zip(images, np.split(np.arange(len(found)), starts[1:]), strict=False):
            there = truths[slice(*np.searchsorted(record.truth_images[truths], (image, image + 1)))]
            boxes = to_xywh(record.found_boxes[found[here]])
            outcomes[here] = judge_voc(boxes, record.truth_boxes[there], record.truth_ignored[there])
        order = np.argsort(-record.found_scores[found], kind="stable")
        counted = truths[~record.truth_ignored[truths]]
        classes.append(
            ClassMatches(
                record.found_images[found][order],
                (outcomes == 1)[order][None, None],
                (outcomes == -1)[order][None, None],
                np.bincount(record.truth_images[counted], minlength=len(record.image_ids))[None],
            )
        )
    return Matches("voc", ("all",), (VOC_IOU,), tuple(classes), len(record.image_ids))


def judge_voc(boxes: np.ndarray, truths: np.ndarray, difficult: np.ndarray) -> np.ndarray:
    """Judge the detections of one image and class as VOCevaldet.m does.

    boxes: (D, 4) x y width height, float64, by descending score. truths: (G, 4). difficult: (G,) bool.
    Returns (D,) int64: 1 for a hit, 0 for a false positive, -1 for a match with a difficult box, which counts neither
    way. Each detection is compared with the truth of the highest IoU only (the first of equals), difficult or taken
    as that may be; a second match of the same truth is a false positive.
    """
    outcome = np.zeros(len(boxes), dtype=np.int64)
    if len(boxes) == 0 or len(truths) == 0:
        return outcome
    iou = np.asarray(mask.iou(boxes, truths, [0] * len(truths)))
    nearest = iou.argmax(axis=1)
    matching = np.flatnonzero(iou.max(axis=1) >= VOC_IOU)
    _, first = np.unique(nearest[matching], return_index=True)
    outcome[matching[first]] = 1
    outcome[matching[difficult[nearest[matching]]]] = -1
    return outcome


def _class_matches(judged: Sequence[Any], position: dict[int, int]) -> ClassMatches:
    """judged: pycocotools' evalImgs of one class, by area, then by image."""
    areas, ious, images = len(COCO_AREAS), len(COCO_IOUS), len(position)
    truths = np.zeros((areas, images), dtype=np.int64)
    owners, scores, hits, ignored = [], [], [], []
    for i in range(images):
        found = [judged[area * images + i] for area in range(areas)]
        if found[0] is None:  # neither objects nor detections, whatever the area
            continue
        truths[:, i] = [np.count_nonzero(np.asarray(one["gtIgnore"]) == 0) for one in found if one is not None]
        scores.append(np.asarray(found[0]["dtScores"], dtype=np.float64))
        owners.append(np.full(len(scores[-1]), position[int(found[0]["image_id"])]))
        matched = np.stack([one["dtMatches"] != 0 for one in found if one is not None])
        skipped = np.stack([one["dtIgnore"] for one in found if one is not None]).astype(bool)
        hits.append(matched & ~skipped)
        ignored.append(skipped)
    nothing = np.zeros((areas, ious, 0), dtype=bool)
    order = np.argsort(-np.concatenate([np.zeros(0), *scores]), kind="stable")
    return ClassMatches(
        np.concatenate([np.zeros(0, dtype=np.int64), *owners])[order],
        np.concatenate([nothing, *hits], axis=2)[:, :, order],
        np.concatenate([nothing, *ignored], axis=2)[:, :, order],
        truths,
    )
