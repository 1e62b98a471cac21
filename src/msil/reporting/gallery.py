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
from msil.metrics.record import EvaluationRecord, corners
from msil.reporting.drawing import draw_boxes, jpeg_bytes

SIDE = 384  # pixels of a picture's long side


def image_scores(record: EvaluationRecord, score_thresh: float = 0.3, iou: float = 0.5) -> np.ndarray:
    """F1 of the detections of each image, 2 hits / (detections + truths): (I,) in [0, 1].

    Detections of at least score_thresh take, surest first, the free truth of their class that they overlap most, at
    that IoU or above. An ignored truth (crowd, difficult) need not be found, and a detection without a truth of its
    own that lies in one of its class, by that share of its area (COCO's rule), is left out. 1.0 where there is nothing
    to find and nothing was found.
    """
    scores = np.ones(len(record.image_ids))
    truth_boxes = corners(record.truth_boxes)
    truth_starts = np.searchsorted(record.truth_images, np.arange(len(scores) + 1))
    found_starts = np.searchsorted(record.found_images, np.arange(len(scores) + 1))
    for image in range(len(scores)):
        truths = np.arange(truth_starts[image], truth_starts[image + 1])
        found = np.arange(found_starts[image], found_starts[image + 1])
        found = found[record.found_scores[found] >= score_thresh]  # NaN compares false
        hits = detections = 0
        for label in np.unique(record.found_labels[found]):
            judged = found[record.found_labels[found] == label]
            judged = judged[np.argsort(-record.found_scores[judged], kind="stable")]
            asked = truths[record.truth_labels[truths] == label]
            ignored = record.truth_ignored[asked]
            boxes = record.found_boxes[judged].astype(np.float64)
            label_hits, left_out = _judge(boxes, truth_boxes[asked[~ignored]], truth_boxes[asked[ignored]], iou)
            hits += label_hits
            detections += len(judged) - left_out
        total = detections + int(np.count_nonzero(~record.truth_ignored[truths]))
        if total:
            scores[image] = 2 * hits / total
    return scores


def most_different(plain: EvaluationRecord, msil: EvaluationRecord, count: int = 12) -> np.ndarray:
    """Positions of the images whose `image_scores` differ most, largest difference first.

    At most count // 2 images where msil is better, and as many where it is worse; fewer where there are fewer, and the
    other side does not fill in. Of equal differences the image with more truths comes first, then the earlier one.
    Raises ValueError if the two answer different questions.
    """
    if not plain.same_question(msil):
        raise ValueError("the two evaluations were not asked for the same boxes of the same images")
    difference = image_scores(msil) - image_scores(plain)
    truths = np.bincount(plain.truth_images[~plain.truth_ignored], minlength=len(difference))
    # Rounded, so that 2/3 - 1/3 and 1/3 - 0 are the tie that they are.
    size = np.abs(difference).round(12)
    order = np.lexsort((-truths, -size))  # stable: image order last
    better, worse = order[difference[order] > 0], order[difference[order] < 0]
    chosen = np.concatenate([better[: count // 2], worse[: count // 2]])
    return order[np.isin(order, chosen)]


def gallery_pictures(
    index: int,
    image: Any,
    plain: EvaluationRecord,
    msil: EvaluationRecord,
    *,
    score_thresh: float = 0.3,
    side: int = SIDE,
) -> tuple[bytes, bytes, bytes]:
    """The image with its ground truth, with plain's detections, and with msil's of at least score_thresh, as JPEG.

    index: the image's position in both records. image: uint8 (3, H, W) RGB, as `read_gallery_image` gives it.
    side: long side in pixels. Ignored truths are drawn in a colour of their own and named so.
    """
    classes = [str(name) for name in plain.classes]
    mine = np.flatnonzero(plain.truth_images == index)
    labels = plain.truth_labels[mine] + len(classes) * plain.truth_ignored[mine]
    names = [*classes, *(f"{name} (ignored)" for name in classes)]
    pictures = [draw_boxes(image, corners(plain.truth_boxes[mine]), labels, names, side=side)]
    for record in (plain, msil):
        kept = np.flatnonzero((record.found_images == index) & (record.found_scores >= score_thresh))
        pictures.append(
            draw_boxes(
                image,
                record.found_boxes[kept],
                record.found_labels[kept],
                classes,
                scores=record.found_scores[kept],
                side=side,
            )
        )
    truth, first, second = (jpeg_bytes(picture) for picture in pictures)
    return truth, first, second


def read_gallery_image(root: str | Path, name: str, size: tuple[int, int] | None = None) -> Tensor:
    """An image of a record: uint8 (3, H, W) RGB, in whose pixels the record's boxes are.

    root: the data's folder. name: of the file below it, from record.file_names. size: (height, width) from
    record.sizes; where only the stored pixels have it, the boxes are meant for these, and the EXIF rotation is not
    applied (as msil.data reads them).
    Raises DataError for a file outside root (a record may come from anyone), of another size, missing or damaged.
    """
    relative, what = Path(name), f"image {name[:200]!r} of the evaluation"
    if relative.is_absolute() or ".." in relative.parts:
        raise DataError(f"{what} is not below {root}: make the evaluation again")
    try:
        path = (Path(root) / relative).resolve()
        inside = path.is_relative_to(Path(root).resolve())
        is_other = inside and path.exists() and not path.is_file()  # a folder, or a pipe that would be waited on
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a name that no file system can hold
        raise DataError(f"{what} cannot be looked up below {root} ({type(error).__name__}): mend its name") from None
    if not inside:
        raise DataError(f"{what} is a link that leaves {root}: put the file itself there")
    if is_other:
        raise DataError(f"{what} is no file below {root}: make the evaluation again")
    header = read_header(path)
    if size is None or tuple(size) == header.size:
        return read_image(path, header.orientation)
    if tuple(size) == header.stored_size:
        return read_image(path, 1)
    height, width = header.size
    raise DataError(
        f"image file {path} is {width} x {height} pixels, but was {size[1]} x {size[0]} when it was evaluated: "
        "give the data folder of that run"
    )


def _judge(boxes: np.ndarray, truths: np.ndarray, ignored: np.ndarray, iou: float) -> tuple[int, int]:
    """Of one image and class: the number of hits, and of detections to leave out. boxes by descending score."""
    overlaps = _overlaps(boxes, truths, of_box=False)
    inside = _overlaps(boxes, ignored, of_box=True).max(axis=1, initial=0.0) >= iou
    hits = left_out = 0
    for i in range(len(boxes)):
        best = int(overlaps[i].argmax()) if len(truths) else -1
        if best >= 0 and overlaps[i, best] >= iou:
            hits += 1
            overlaps[:, best] = -1.0  # taken
        elif inside[i]:
            left_out += 1
    return hits, left_out


def _overlaps(boxes: np.ndarray, others: np.ndarray, *, of_box: bool) -> np.ndarray:
    """(D, G) intersection over union of x1 y1 x2 y2 boxes, or over the box's own area."""
    corner = np.maximum(boxes[:, None, :2], others[None, :, :2])
    opposite = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    intersection = (opposite - corner).clip(min=0).prod(axis=2)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)[:, None]
    whole = areas if of_box else areas + (others[:, 2:] - others[:, :2]).prod(axis=1)[None] - intersection
    whole = np.broadcast_to(whole, intersection.shape)
    return np.divide(intersection, whole, out=np.zeros_like(intersection), where=(intersection > 0) & (whole > 0))
