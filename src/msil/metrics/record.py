"""evaluation.npz: what the reported evaluation of a run compared, so that every later question needs no training.

One compressed file a run: the boxes of the images and the detections on them, in the pixels of the image files.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from msil.errors import DataError
from msil.runs import write_bytes

RECORD_FILE = "evaluation.npz"


@dataclass(frozen=True)
class EvaluationRecord:
    """I images, K classes, G ground truth boxes, D detections.

    classes: (K,) str. category_ids: (K,) int64, those of the data's own files.
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

    def same_question(self, other: EvaluationRecord) -> bool:
        """Whether both were asked for the same boxes of the same classes on the same images."""
        return self.question() == other.question()

    def question(self) -> str:
        """A digest of everything but the detections and the files' names."""
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


def make_record(
    ground_truth: Mapping[str, Any],
    classes: Sequence[str],
    category_ids: Sequence[int],
    file_names: Mapping[int, str],
    *,
    image_ids: np.ndarray,
    owners: np.ndarray,
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
) -> EvaluationRecord:
    """From a COCO format dict and the detections of an evaluation.

    classes, category_ids: label i is classes[i] and category_ids[i]. file_names: of each image id, below the root.
    image_ids: (I,) ascending, the images evaluated. owners: (D,) ascending, each detection's image id.
    boxes: (D, 4) x1 y1 x2 y2. scores: (D,). labels: (D,).
    """
    position = {int(image_id): i for i, image_id in enumerate(image_ids)}
    label_of = {category_id: label for label, category_id in enumerate(category_ids)}
    size_of = {image["id"]: (image["height"], image["width"]) for image in ground_truth["images"]}
    truths = [a for a in ground_truth["annotations"] if a["image_id"] in position and a["category_id"] in label_of]
    truths.sort(key=lambda annotation: position[annotation["image_id"]])  # stable: the file's order inside an image
    return EvaluationRecord(
        classes=np.array(list(classes), dtype=np.str_),
        category_ids=np.array(list(category_ids), dtype=np.int64),
        image_ids=np.asarray(image_ids, dtype=np.int64),
        file_names=np.array([file_names[int(i)] for i in image_ids], dtype=np.str_),
        sizes=np.array([size_of[int(i)] for i in image_ids], dtype=np.int64).reshape(-1, 2),
        truth_images=np.array([position[a["image_id"]] for a in truths], dtype=np.int64),
        truth_boxes=np.array([a["bbox"] for a in truths], dtype=np.float64).reshape(-1, 4),
        truth_areas=np.array([a["area"] for a in truths], dtype=np.float64),
        truth_labels=np.array([label_of[a["category_id"]] for a in truths], dtype=np.int64),
        truth_ignored=np.array([bool(a["iscrowd"]) for a in truths], dtype=bool),
        found_images=np.searchsorted(image_ids, owners).astype(np.int64),
        found_boxes=np.asarray(boxes, dtype=np.float32).reshape(-1, 4),
        found_scores=np.asarray(scores, dtype=np.float32),
        found_labels=np.asarray(labels, dtype=np.int64),
    )


def write_record(run_dir: str | Path, record: EvaluationRecord) -> None:
    """Write run_dir/evaluation.npz whole or not at all. Integers take the fewest bytes that hold them."""
    arrays = {field.name: getattr(record, field.name) for field in fields(record)}
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **{name: _smallest(array) for name, array in arrays.items()})
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
    wide = {"i": np.int64, "u": np.int64}
    record = EvaluationRecord(**{name: a.astype(wide.get(a.dtype.kind, a.dtype)) for name, a in arrays.items()})
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


def _smallest(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind != "i" or not array.size:
        return array
    low, high = array.min(), array.max()
    # Beside a negative number the type must be signed, which has room for -high - 1 exactly if it has for high.
    types = [np.min_scalar_type(low), np.min_scalar_type(high if low >= 0 else min(low, -high - 1))]
    return array.astype(np.result_type(*types))
