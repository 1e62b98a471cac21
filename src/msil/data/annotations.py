"""Ground truth in its one form, and the data set of images and Targets that is made of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from msil.data.audit import check_boxes
from msil.data.images import read_image
from msil.detection.structures import Target
from msil.errors import DataError

Array = NDArray[Any]


@dataclass(frozen=True)
class Annotations:
    """One split as its reader found it: N images with the sizes of their files, then A boxes, of K classes.

    root: the data set's folder. source: the file of the annotations or of the split, for messages.
    classes: label i is classes[i]. category_ids: label -> id in the data's own files.
    image_ids: (N,) int64, unique. file_names: N, below root. sizes: (N, 2) int32, height and width of each image as it
        is read. orientations: (N,) uint8, the EXIF orientation to read it with (see `audit.check_images`).
    truth_images: (A,) int64, positions in image_ids. truth_ids: (A,) int64, the file's ids of the boxes.
    truth_boxes: (A, 4) float64, x y width height in pixels, 0-based, not clipped. truth_labels: (A,) int64 in [0, K).
    truth_areas: (A,) float64, px^2. truth_ignored: (A,) bool, crowds (COCO) or difficult boxes (VOC): neither to be
        found nor wrong to find. train_on_ignored: whether they are trained on.
    unit: what a message calls a box.
    annotated: False for a split that comes without boxes, as COCO's test sets do: to detect in, not to train on or to
        score against. An annotated split may hold images without boxes too.
    """

    root: Path
    source: Path
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    image_ids: Array
    file_names: list[str]
    sizes: Array
    orientations: Array
    truth_images: Array
    truth_ids: Array
    truth_boxes: Array
    truth_labels: Array
    truth_areas: Array
    truth_ignored: Array
    unit: str = "annotation"
    train_on_ignored: bool = False
    annotated: bool = True

    def box_name(self, box: int) -> str:
        """'annotation 7 of train/a.jpg'."""
        return f"{self.unit} {self.truth_ids[box]} of {self.file_names[self.truth_images[box]]}"

    def chosen(self, boxes: Array) -> Annotations:
        """The same images with the boxes at these positions alone, in this order."""
        names = ("truth_images", "truth_ids", "truth_boxes", "truth_labels", "truth_areas", "truth_ignored")
        return replace(self, **{name: getattr(self, name)[boxes] for name in names})


class AnnotatedImages(Dataset[tuple[Tensor, Target]]):
    """Images on disk with their boxes in memory: about 80 bytes a box and no Python object each.

    dataset[i] -> ((3, H, W) uint8 RGB, Target): the original pixels, turned upright by the file's EXIF orientation, and
        the boxes to train on, clipped to the image. Raises DataError if the file was damaged after the audit.
    annotations: audited; boxes image by image, in the file's order of each, without the degenerate ones.
    classes, category_ids, annotated: as in Annotations.

    strict: refuse boxes that would be clipped, dropped or left out of training (see msil.data.audit).
    """

    def __init__(self, annotations: Annotations, strict: bool = False) -> None:
        kept, trained, clipped = check_boxes(annotations, strict)
        order = np.argsort(annotations.truth_images, kind="stable")
        order = order[kept[order]]
        self.annotations = truth = annotations.chosen(order)
        self.classes = truth.classes
        self.category_ids = truth.category_ids
        self.annotated = truth.annotated
        trained = trained[order] & (truth.train_on_ignored | ~truth.truth_ignored)
        self._starts = np.searchsorted(truth.truth_images[trained], np.arange(len(truth.image_ids) + 1))
        self._boxes = clipped[order][trained].astype(np.float32)
        self._labels = truth.truth_labels[trained]

    def __len__(self) -> int:
        return len(self.annotations.image_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        size = self.image_size(index)
        image = read_image(self.path(index), int(self.annotations.orientations[index]))
        if tuple(image.shape[1:]) != size:
            raise DataError(f"image file {self.path(index)} is no longer of the size that it had at the start: restart")
        rows = slice(self._starts[index], self._starts[index + 1])
        boxes = torch.from_numpy(self._boxes[rows].copy())
        labels = torch.from_numpy(self._labels[rows].copy())
        return image, Target(boxes, labels, self.image_id(index), size)

    def path(self, index: int) -> Path:
        return self.annotations.root / self.annotations.file_names[index]

    def image_id(self, index: int) -> int:
        return int(self.annotations.image_ids[index])

    def image_size(self, index: int) -> tuple[int, int]:
        """(height, width) of the image that dataset[index] gives."""
        height, width = self.annotations.sizes[index].tolist()
        return height, width

    def has_boxes(self, index: int) -> bool:
        """Whether the image has a box to train on."""
        return bool(self._starts[index] < self._starts[index + 1])
