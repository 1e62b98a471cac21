"""The file that COCO's evaluation server takes: detections on a split whose boxes are kept secret.

Format: https://cocodataset.org/#format-results and https://cocodataset.org/#upload.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import numpy as np

from msil.errors import ConfigError
from msil.metrics.detections import CollectedDetections, DetectionMetric
from msil.runs import replacing

MAX_PER_IMAGE = 100  # over all classes; the server counts no more
BOX_DECIMALS = 2  # a hundredth of a pixel, as COCO's own boxes
SCORE_DECIMALS = 8  # float32 scores above 1/8 stay distinct, so that rounding does not change their order
SMALLEST_SIDE = 0.01  # px
EARLIEST = (1980, 1, 1, 0, 0, 0)  # that a zip can hold


class DetectionCollector(DetectionMetric):
    """Collects detections where there is nothing to score them against."""

    def compute(self) -> dict[str, float]:
        """No numbers: {}."""
        return {}


def upload_entries(found: CollectedDetections, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Detections in COCO's results format, by ascending image id, then in the detector's order.

    category_ids: label i is category_ids[i].

    Of an image with more than 100 detections those with the highest scores are kept. Corners are rounded to 0.01 px;
    a side that this leaves nothing of is written as 0.01 px, since a box without area is no box to the server.
    """
    kept = _best(found)
    corners = found.boxes[kept].astype(np.float64).round(BOX_DECIMALS)
    sides = (corners[:, 2:] - corners[:, :2]).round(BOX_DECIMALS)  # 0.3 - 0.1 is 0.19999999999999998
    sides = np.where(sides == 0, SMALLEST_SIDE, sides)
    rows = zip(
        found.owners[kept].tolist(),
        found.labels[kept].tolist(),
        np.concatenate([corners[:, :2], sides], axis=1).tolist(),
        found.scores[kept].astype(np.float64).round(SCORE_DECIMALS).tolist(),
        strict=True,
    )
    return [
        {"image_id": image_id, "category_id": int(category_ids[label]), "bbox": bbox, "score": score}
        for image_id, label, bbox, score in rows
    ]


def write_upload(folder: str | Path, split: str, name: str, entries: Sequence[dict[str, Any]]) -> tuple[Path, Path]:
    """Write detections_<split>_<name>_results.json, one entry a line, and the zip of it that the server takes.

    Both are written whole or not at all, and the same entries give the same bytes. Returns their paths.
    Raises ConfigError for a split or name that is not of letters, digits, '-', '_' and '.'.
    """
    for what, text in (("split", split), ("name", name)):
        if not re.fullmatch(r"[A-Za-z0-9._-]+", text):
            raise ConfigError(
                f"the upload's {what} {text!r} must be of letters, digits, '-', '_' and '.', since it is part of a file"
                " name: choose another."
            )
    plain = Path(folder) / f"detections_{split}_{name}_results.json"
    packed = plain.with_suffix(".zip")
    with replacing(plain) as temporary, open(temporary, "x", encoding="ascii", newline="\n") as file:
        file.writelines(_lines(entries))
    with replacing(packed) as temporary, ZipFile(temporary, "x", ZIP_DEFLATED) as archive:
        # The file's own time, system and permissions would make every zip another.
        member = ZipInfo(plain.name, EARLIEST)
        member.compress_type, member.create_system, member.external_attr = ZIP_DEFLATED, 3, 0o644 << 16
        member.file_size = plain.stat().st_size
        with open(plain, "rb") as source, archive.open(member, "w") as target:
            shutil.copyfileobj(source, target)
    return plain, packed


def _best(found: CollectedDetections) -> np.ndarray:
    """Indices, ascending, of each image's MAX_PER_IMAGE highest scores; the earlier one where scores tie."""
    order = np.lexsort((-found.scores, found.owners))  # stable; image by image, since the images already are in order
    starts = np.searchsorted(found.owners, found.owners)
    return np.sort(order[np.arange(len(order)) - starts < MAX_PER_IMAGE])


def _lines(entries: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A json list, in parts: test-dev's two million entries as one string would take as much memory again."""
    yield "["
    for index, entry in enumerate(entries):
        yield ",\n" if index else "\n"
        yield json.dumps(entry, allow_nan=False)
    yield "\n]\n"
