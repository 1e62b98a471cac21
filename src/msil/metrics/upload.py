"""The file that COCO's evaluation server takes: detections on a split whose boxes are kept secret.

Format: https://cocodataset.org/#format-results and https://cocodataset.org/#upload.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np

from msil.metrics.record import EvaluationRecord
from msil.runs import replacing

SERVER_LIMIT = 100  # detections an image, over all classes
BOX_DECIMALS = 2  # a hundredth of a pixel, as COCO's own boxes
SCORE_DECIMALS = 8  # float32 scores above 1/8 stay distinct, so that rounding does not change their order
SMALLEST_SIDE = 0.01  # px


def upload_entries(
    record: EvaluationRecord,
    most: int | None = None,
    own_images: Mapping[int, int | str] | None = None,
    own_categories: Mapping[int, int | str] | None = None,
) -> list[dict[str, Any]]:
    """Detections in COCO's results format, by ascending image id, then in the detector's order.

    own_images, own_categories: id -> that of the data's file, where they differ.

    most: of an image; those with the highest scores are kept. None: all. Corners are rounded to 0.01 px;
    a side that this leaves nothing of is written as 0.01 px, since a box without area is no box to the server.
    """
    owners = record.found_images
    # Stable, image by image as the detections already are: of equal scores the earlier one is kept.
    order = np.lexsort((-record.found_scores, owners))
    places = np.arange(len(order)) - np.searchsorted(owners, owners)
    kept = np.sort(order if most is None else order[places < most])
    corners = record.found_boxes[kept].astype(np.float64).round(BOX_DECIMALS)
    sides = (corners[:, 2:] - corners[:, :2]).round(BOX_DECIMALS)  # 0.3 - 0.1 is 0.19999999999999998
    columns = {
        "image_id": record.image_ids[owners[kept]],
        "category_id": record.category_ids[record.found_labels[kept]],
        "bbox": np.concatenate([corners[:, :2], np.where(sides == 0, SMALLEST_SIDE, sides)], axis=1),
        "score": record.found_scores[kept].astype(np.float64).round(SCORE_DECIMALS),
    }
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    entries = [dict(zip(columns, row, strict=True)) for row in rows]
    for name, own in (("image_id", own_images or {}), ("category_id", own_categories or {})):
        for entry in entries if own else ():
            entry[name] = own.get(entry[name], entry[name])
    return entries


def write_upload(folder: str | Path, split: str, name: str, entries: Sequence[dict[str, Any]]) -> tuple[Path, Path]:
    """Write detections_<split>_<name>_results.json, one entry a line, and the zip of it that the server takes, both
    atomically. split, name: parts of a file's name. Returns the paths."""
    plain = Path(folder) / f"detections_{split}_{name}_results.json"
    packed = plain.with_suffix(".zip")
    with replacing(plain) as temporary, open(temporary, "x", encoding="ascii", newline="\n") as file:
        file.writelines(_lines(entries))
    with replacing(packed) as temporary, ZipFile(temporary, "x", ZIP_DEFLATED) as archive:
        archive.write(plain, plain.name)
    return plain, packed


def _lines(entries: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A json list, in parts: test-dev's two million entries as one string would take as much memory again."""
    yield "["
    for index, entry in enumerate(entries):
        yield ",\n" if index else "\n"
        yield json.dumps(entry, allow_nan=False)
    yield "\n]\n"
