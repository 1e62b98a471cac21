"""What CocoDataset and VOCDataset have in common once their files are read: flat arrays, and the views of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from msil.data.audit import CheckedBoxes, check_boxes, check_images, check_inside
from msil.data.images import read_image
from msil.detection.structures import Target
from msil.errors import DataError

Array = NDArray[Any]


@dataclass
class ImageList:
    """N images. root: the data set's folder. ids: unique. names: paths below `folder`. sizes: (height, width) that the
    annotations give, or None. where: what a message calls each image's entry."""

    root: Path
    folder: Path
    ids: list[int]
    names: list[str]
    sizes: list[tuple[int, int] | None]
    where: list[str]


@dataclass
class BoxList:
    """A boxes. image: (A,) int64 index of the image. xywh: (A, 4) float64, x1 y1 width height in pixels, 0-based.
    labels: (A,) int64 in [0, K). areas: (A,) float64 px^2. ignored: (A,) bool, crowd (COCO) or difficult (VOC).
    name: box index -> its id and file, for messages."""

    image: Array
    xywh: Array
    labels: Array
    areas: Array
    ignored: Array
    name: Callable[[int], str]


class AnnotatedImages(Dataset[tuple[Tensor, Target]]):
    """Images on disk with their boxes in memory: about 70 bytes a box and no Python object each.

    dataset[i] -> ((3, H, W) uint8 RGB, Target): the original pixels, turned upright by the file's EXIF orientation, and
        the boxes to train on, clipped to the image. Raises DataError if the file was damaged after the audit.
    classes: label i is classes[i]. category_ids: label -> category id in `ground_truth()`.
    annotated: False for a split that comes without boxes, as COCO's test sets do: to detect in, not to train on or to
        score against. An annotated split may hold images without boxes too.
    """

    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    annotated: bool

    def __init__(
        self,
        images: ImageList,
        boxes: BoxList | None,
        classes: tuple[str, ...],
        category_ids: tuple[int, ...],
        *,
        source: str,
        train_on_ignored: bool,
        strict: bool,
    ) -> None:
        """Audits images and boxes. boxes: None if the split is not annotated. source: the annotations' path, for
        messages."""
        self.classes = classes
        self.category_ids = category_ids
        self.annotated = boxes is not None
        self._folder = images.folder
        self._names = images.names
        self._ids = np.array(images.ids, dtype=np.int64)
        paths = [images.folder / name for name in images.names]
        check_inside(paths, images.folder, images.root)
        self._sizes, self._orientations = check_images(paths, images.sizes, images.where)
        if boxes is None:
            boxes, checked = _no_boxes(), CheckedBoxes(np.zeros(0, bool), np.zeros(0, bool), np.zeros((0, 4)))
        else:
            checked = check_boxes(boxes.xywh, boxes.areas, self._sizes[boxes.image], source, boxes.name, strict)
        order = np.argsort(boxes.image, kind="stable")
        order = order[checked.kept[order]]
        self._starts = np.searchsorted(boxes.image[order], np.arange(len(images.ids) + 1))
        self._xywh = boxes.xywh[order]
        self._labels = boxes.labels[order]
        self._areas = boxes.areas[order]
        self._ignored = boxes.ignored[order]
        trained = checked.trained[order] & (train_on_ignored | ~self._ignored)
        self._trained_starts = np.append(0, np.cumsum(trained))[self._starts]
        self._trained_boxes = checked.clipped[order][trained].astype(np.float32)
        self._trained_labels = self._labels[trained]

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        size = self.image_size(index)
        image = read_image(self.path(index), int(self._orientations[index]))
        if tuple(image.shape[1:]) != size:
            raise DataError(f"image file {self.path(index)} is no longer of the size that it had at the start: restart")
        rows = slice(self._trained_starts[index], self._trained_starts[index + 1])
        boxes = torch.from_numpy(self._trained_boxes[rows].copy())
        labels = torch.from_numpy(self._trained_labels[rows].copy())
        return image, Target(boxes, labels, self.image_id(index), size)

    def path(self, index: int) -> Path:
        return self._folder / self._names[index]

    def image_id(self, index: int) -> int:
        return int(self._ids[index])

    def image_size(self, index: int) -> tuple[int, int]:
        """(height, width) of the image that dataset[index] gives."""
        height, width = self._sizes[index].tolist()
        return height, width

    def has_boxes(self, index: int) -> bool:
        """Whether the image has a box to train on."""
        return bool(self._trained_starts[index] < self._trained_starts[index + 1])

    def ground_truth(self) -> dict[str, list[dict[str, Any]]]:
        """COCO's dict of this split, to score against: images (id, width, height, file_name), categories (id, name) and
        annotations (id from 1, image_id, category_id, bbox as in the file and not clipped, area, iscrowd 0 or 1).
        Of the selected classes' boxes only the degenerate ones are missing."""
        images = [
            {"id": image_id, "width": width, "height": height, "file_name": name}
            for image_id, (height, width), name in zip(
                self._ids.tolist(), self._sizes.tolist(), self._names, strict=True
            )
        ]
        image_of = np.repeat(self._ids, np.diff(self._starts)).tolist()
        category_of = np.asarray(self.category_ids)[self._labels].tolist()
        columns = (image_of, category_of, self._xywh.tolist(), self._areas.tolist(), self._ignored.tolist())
        annotations = [
            {
                "id": number,
                "image_id": image_id,
                "category_id": category_id,
                "bbox": bbox,
                "area": area,
                "iscrowd": int(ignored),
            }
            for number, (image_id, category_id, bbox, area, ignored) in enumerate(zip(*columns, strict=True), start=1)
        ]
        categories = [
            {"id": category_id, "name": name} for category_id, name in zip(self.category_ids, self.classes, strict=True)
        ]
        return {"images": images, "categories": categories, "annotations": annotations}


def _no_boxes() -> BoxList:
    whole, real = np.zeros(0, np.int64), np.zeros(0)
    return BoxList(whole, np.zeros((0, 4)), whole, real, np.zeros(0, bool), str)
