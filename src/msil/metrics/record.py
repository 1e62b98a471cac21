"""evaluation.npz: the boxes and the detections that the reported evaluation of a run compared.

It also is the one form in which metrics are computed: of what `DetectionMetric` has collected, and of a finished run.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from msil.errors import DataError
from msil.runs import RECORD as RECORD_FILE
from msil.runs import write_bytes

if TYPE_CHECKING:
    from msil.data.annotations import Annotations


# What is to be found; both have the fields that are needed under the same names.
AnnotatedSplit: TypeAlias = "Annotations | EvaluationRecord"


@dataclass(frozen=True)
class EvaluationRecord:
    """I images, K classes, G ground truth boxes, D detections.

    classes: (K,) str. category_ids: (K,) int64, as in Annotations.
    image_ids: (I,) int64, ascending. file_names: (I,) str, below the data's root. sizes: (I, 2) int64, height, width.
    truth_images, found_images: (G,), (D,) int64, positions in image_ids, ascending.
    truth_boxes: (G, 4) float64, x y width height as the data's files have them. truth_areas: (G,) float64, px^2.
    truth_labels, found_labels: (G,), (D,) int64, positions in classes.
    truth_ignored: (G,) bool, crowds in COCO, difficult boxes in VOC: neither to be found nor wrong to find.
    found_boxes: (D, 4) float32, x1 y1 x2 y2. found_scores: (D,) float32.
    Inside an image, detections keep the detector's order.
    """

    classes: np.ndarray
    category_ids: np.ndarray
    image_ids: np.ndarray
    file_names: np.ndarray
    sizes: np.ndarray
    truth_images: np.ndarray
    truth_boxes: np.ndarray
    truth_areas: np.ndarray
    truth_labels: np.ndarray
    truth_ignored: np.ndarray
    found_images: np.ndarray
    found_boxes: np.ndarray
    found_scores: np.ndarray
    found_labels: np.ndarray

    def question(self) -> str:
        """A digest of everything but the detections and the files' names: equal where the same was to be found."""
        digest = hashlib.sha256()
        for field in fields(self):
            if not field.name.startswith("found_") and field.name != "file_names":
                array = np.ascontiguousarray(getattr(self, field.name))
                text = "\0".join(array.tolist()) if array.dtype.kind == "U" else ""
                digest.update(f"{field.name}{array.shape}{text}".encode())
                digest.update(b"" if text else array.tobytes())
        return digest.hexdigest()


def corners(boxes: np.ndarray) -> np.ndarray:
    """(N, 4) x y width height -> x1 y1 x2 y2."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def to_xywh(boxes: np.ndarray) -> np.ndarray:
    """(N, 4) x1 y1 x2 y2, float32 or float64 -> x y width height, float64, as pycocotools takes boxes."""
    boxes = boxes.astype(np.float64)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def make_record(
    truth: AnnotatedSplit,
    image_ids: np.ndarray,
    owners: np.ndarray,
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
) -> EvaluationRecord:
    """image_ids: (I,) ascending, the images evaluated. owners: (D,) each detection's image id. boxes: (D, 4) float32
    x1 y1 x2 y2. scores: (D,) float32. labels: (D,) int64."""
    images = np.flatnonzero(np.isin(truth.image_ids, image_ids))
    images = images[np.argsort(truth.image_ids[images])]
    position = np.full(len(truth.image_ids), -1)
    position[images] = np.arange(len(images))
    truth_images = position[truth.truth_images]
    order = np.argsort(truth_images, kind="stable")  # the file's order inside an image
    truths = order[truth_images[order] >= 0]
    found = np.argsort(owners, kind="stable")  # the detector's order inside an image
    return EvaluationRecord(
        classes=np.array(list(truth.classes), dtype=np.str_),
        category_ids=np.array(list(truth.category_ids), dtype=np.int64),
        image_ids=image_ids,
        file_names=np.array(list(truth.file_names), dtype=np.str_)[images],
        sizes=np.asarray(truth.sizes[images], dtype=np.int64),
        truth_images=truth_images[truths],
        truth_boxes=truth.truth_boxes[truths],
        truth_areas=truth.truth_areas[truths],
        truth_labels=truth.truth_labels[truths],
        truth_ignored=truth.truth_ignored[truths],
        found_images=np.searchsorted(image_ids, owners[found]),
        found_boxes=boxes[found],
        found_scores=scores[found],
        found_labels=labels[found],
    )


def write_record(run_dir: str | Path, record: EvaluationRecord) -> None:
    """Write run_dir/evaluation.npz atomically."""
    content = io.BytesIO()
    arrays = {field.name: getattr(record, field.name) for field in fields(record)}
    np.savez_compressed(content, allow_pickle=False, **arrays)
    write_bytes(Path(run_dir) / RECORD_FILE, content.getvalue())


def read_record(run_dir: str | Path) -> EvaluationRecord:
    """Raises DataError for a file that is missing, damaged or not of this kind; never runs code from it."""
    path = Path(run_dir) / RECORD_FILE
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {field.name: archive[field.name] for field in fields(EvaluationRecord)}
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: run the command of that run again after deleting its folder.") from error
    except Exception as error:  # of a damaged file, numpy, zipfile, zlib and tokenize raise what they please
        raise DataError(f"{path} cannot be read as the evaluation of a run: {error}.") from error
    integers = {name: a.astype(np.int64) for name, a in arrays.items() if a.dtype.kind in "iu"}
    record = EvaluationRecord(**{**arrays, **integers})
    _check(path, record)
    return record


def _check(path: Path, record: EvaluationRecord) -> None:
    images, classes = record.image_ids.size, record.classes.size
    truths, found = record.truth_images.size, record.found_images.size
    expected = {
        "classes": ("U", (classes,)), "category_ids": ("i", (classes,)),
        "image_ids": ("i", (images,)), "file_names": ("U", (images,)), "sizes": ("i", (images, 2)),
        "truth_images": ("i", (truths,)), "truth_boxes": ("f", (truths, 4)), "truth_areas": ("f", (truths,)),
        "truth_labels": ("i", (truths,)), "truth_ignored": ("b", (truths,)),
        "found_images": ("i", (found,)), "found_boxes": ("f", (found, 4)), "found_scores": ("f", (found,)),
        "found_labels": ("i", (found,)),
    }  # fmt: skip
    arrays = {name: getattr(record, name) for name in expected}
    wrong = [name for name, form in expected.items() if (arrays[name].dtype.kind, arrays[name].shape) != form]
    if not wrong:
        limits = {"truth_images": images, "found_images": images, "truth_labels": classes, "found_labels": classes}
        wrong = [name for name, limit in limits.items() if ((arrays[name] < 0) | (arrays[name] >= limit)).any()]
        wrong += [name for name in ("truth_images", "found_images") if (np.diff(arrays[name]) < 0).any()]
        wrong += ["image_ids"] if (np.diff(record.image_ids) <= 0).any() else []
    if wrong:
        raise DataError(f"{path} does not fit together: {', '.join(wrong)} cannot belong to {images} images.")
