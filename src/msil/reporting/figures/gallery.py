"""Validation images on which two detectors differ most, drawn side by side.

Half of them are those where MSIL does better and half where it does worse, whatever the share of each among all the
images: a gallery of the largest gains alone would flatter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from msil.data.images import read_header, read_image
from msil.errors import DataError
from msil.metrics.breakdown import SCORE_THRESH, matched
from msil.metrics.record import AnnotatedSplit, EvaluationRecord, corners
from msil.reporting.figures.pictures import draw_boxes

SIDE = 384  # pixels of a picture's long side
GAP = 12  # white ones to the right of it


def image_scores(record: EvaluationRecord) -> np.ndarray:
    """F1 of the detections of each image, 2 hits / (detections + truths): (I,) in [0, 1].

    Detections are matched with truths of their class. An ignored truth (crowd, difficult) need not be found, and a
    detection that lies on nothing else is left out. 1.0 where there is nothing to find and nothing was found.
    """
    images = len(record.image_ids)
    found, objects, left_out = matched(record, by_class=True)
    hits, detections = (
        np.bincount(record.found_images[found[those]], minlength=images) for those in (objects >= 0, ~left_out)
    )
    truths = np.bincount(record.truth_images[~record.truth_ignored], minlength=images)
    total = detections + truths
    return np.divide(2 * hits, total, out=np.ones(images), where=total > 0)


def most_different(plain: EvaluationRecord, msil: EvaluationRecord, count: int = 12) -> np.ndarray:
    """Positions of the images whose `image_scores` differ most, largest difference first.

    At most count // 2 images where msil is better, and as many where it is worse; fewer where there are fewer, and the
    other side does not fill in. Of equal differences the image with more truths comes first, then the earlier one.
    The two were asked for the same boxes (record.question).
    """
    difference = image_scores(msil) - image_scores(plain)
    truths = np.bincount(plain.truth_images[~plain.truth_ignored], minlength=len(difference))
    # Rounded, so that 2/3 - 1/3 and 1/3 - 0 are the tie that they are.
    order = np.lexsort((-truths, -np.abs(difference).round(12)))  # stable: image order last
    better, worse = order[difference[order] > 0], order[difference[order] < 0]
    return order[np.isin(order, np.concatenate([better[: count // 2], worse[: count // 2]]))]


def gallery_picture(index: int, image: Any, *records: EvaluationRecord) -> np.ndarray:
    """Side by side the image with its ground truth, and with each record's detections of at least SCORE_THRESH.

    index: the image's position in the records. image: uint8 (3, H, W) RGB, as `read_gallery_image` gives it.
    Returns uint8 (H', W', 3).
    """
    classes = [str(name) for name in records[0].classes]
    pictures = [truth_picture(index, image, records[0])]
    for record in records:
        kept = np.flatnonzero((record.found_images == index) & (record.found_scores >= SCORE_THRESH))
        found = (record.found_boxes[kept], record.found_labels[kept])
        pictures.append(draw_boxes(image, *found, classes, scores=record.found_scores[kept], side=SIDE))
    gap = ((0, 0), (0, GAP), (0, 0))
    return np.concatenate([np.pad(picture, gap, constant_values=255) for picture in pictures], axis=1)


def truth_picture(index: int, image: Any, truth: AnnotatedSplit) -> np.ndarray:
    """An image with its ground truth, uint8 (H', W', 3); index and image as in `gallery_picture`. Ignored boxes are
    drawn in a colour of their own and named so."""
    mine = np.flatnonzero(truth.truth_images == index)
    labels = truth.truth_labels[mine] + len(truth.classes) * truth.truth_ignored[mine]
    names = [*truth.classes, *(f"{name} (ignored)" for name in truth.classes)]
    return draw_boxes(image, corners(truth.truth_boxes[mine]), labels, names, side=SIDE)


def read_gallery_image(root: str | Path, name: str, size: tuple[int, int], bits: int = 16) -> Tensor:
    """An image of a record: uint8 (3, H, W) RGB, in whose pixels the record's boxes are.

    root: the data's folder. name: of the file below it, from record.file_names. size: (height, width) from
    record.sizes; where only the stored pixels have it, the boxes are meant for these, and the EXIF rotation is not
    applied (as msil.data reads them). bits: see read_image.
    Raises DataError for a file outside root (a record may come from anyone), of another size, missing or damaged.
    """
    try:
        path = (Path(root) / name).resolve()
        # A folder, or a pipe that would be waited on, is no file either.
        usable = path.is_relative_to(Path(root).resolve()) and ".." not in Path(name).parts and path.is_file()
    except (OSError, ValueError, RuntimeError):  # a loop of links, a name that no file system can hold
        usable = False
    if not usable or Path(name).is_absolute():
        raise DataError(f"image {name[:200]!r} of the evaluation is no file below {root}: give the data of that run")
    header = read_header(path)
    if tuple(size) in (header.size, header.stored_size):
        return read_image(path, header.orientation if tuple(size) == header.size else 1, bits)
    height, width = header.size
    raise DataError(
        f"image file {path} is {width} x {height} pixels, but was {size[1]} x {size[0]} when it was evaluated: "
        "give the data folder of that run"
    )
