"""Ground truth in its one form, and the data set of images and Targets that is made of it."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from msil.data.audit import check_boxes, short, warn
from msil.data.images import is_16_bit, read_image
from msil.errors import DataError, listed, typed

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import Dataset

    from msil.detection.structures import Target

    _TorchDataset = Dataset[tuple[Tensor, Target]]
else:
    _TorchDataset = object  # torch takes seconds, in which a folder without a data set could be refused

Array = NDArray[Any]
Classes = Sequence[str] | Mapping[str, str]
DARK = 32  # of 0..255: five bits of eight


@dataclass(frozen=True)
class Annotations:
    """One split as its reader found it: N images with the sizes of their files, then A boxes, of K classes.

    root: the data set's folder. source: the file of the annotations or of the split, for messages.
    classes: label i is classes[i]. category_ids: label -> id in the data's own files.
    image_ids: (N,) int64, unique. file_names: N, below root. sizes: (N, 2) int32, height and width of each image as it
        is read. orientations: (N,) uint8, the EXIF orientation to read it with (see `audit.check_images`).
    truth_images: (A,) int64, positions in image_ids. truth_ids: (A,) int64, or objects where one is text or larger, the
        file's ids of the boxes.
    truth_boxes: (A, 4) float64, x y width height in pixels, 0-based, not clipped. truth_labels: (A,) int64 in [0, K).
    truth_areas: (A,) float64, px^2. truth_ignored: (A,) bool, crowds (COCO) or difficult boxes (VOC): neither to be
        found nor wrong to find. train_on_ignored: whether they are trained on.
    unit: what a message calls a box.
    annotated: False for a split that comes without boxes, as COCO's test sets do: to detect in, not to train on or to
        score against. An annotated split may hold images without boxes too.
    numbered: the files name no ids, so category_ids are 1, 2, ... whichever classes are chosen.
    own_image_ids: N, the file's, where they are not image_ids: text, or beyond 64 bits. own_category_ids: alike, by
        category id.
    layout: what the set's layout is called.
    """

    root: Path
    source: Path | str
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
    numbered: bool = False
    own_image_ids: tuple[int | str, ...] | None = None
    own_category_ids: Mapping[int, int | str] | None = None
    layout: str = ""

    def box_name(self, box: int) -> str:
        """'annotation 7 of train/a.jpg'."""
        (own,) = self.truth_ids[[box]].tolist()
        return f"{self.unit} {short(own)} of {self.file_names[self.truth_images[box]]}"

    def shared_with(self, other: Annotations) -> list[str]:
        """The images, by their names, that both hold."""
        return sorted({*self.file_names}.intersection(other.file_names))

    def of_images(self, images: Array) -> Annotations:
        """The images at these positions alone, in this order, with their boxes."""
        position = np.full(len(self.image_ids), -1)
        position[images] = np.arange(len(images))
        kept = self.chosen(np.flatnonzero(position[self.truth_images] >= 0))
        own = self.own_image_ids
        return replace(
            kept,
            truth_images=position[kept.truth_images],
            file_names=[self.file_names[image] for image in images],
            own_image_ids=None if own is None else tuple(own[image] for image in images),
            **{name: getattr(self, name)[images] for name in ("image_ids", "sizes", "orientations")},
        )

    def chosen(self, boxes: Array) -> Annotations:
        """The same images with the boxes at these positions alone, in this order."""
        names = ("truth_images", "truth_ids", "truth_boxes", "truth_labels", "truth_areas", "truth_ignored")
        return replace(self, **{name: getattr(self, name)[boxes] for name in names})

    def of_classes(self, classes: Classes, *, complete: bool = True) -> Annotations:
        """Labelled by name, in the order of `classes`; boxes of other classes are left out, and images without boxes
        stay; one DataWarning says which classes are left out or missing.

        classes: names, or the new name of each one; several may have the same. complete: each must be listed, under one
        of its old names; else those that are missing have no boxes, and a category id of their own.
        Raises DataError for a name that is missing, and where none is listed.
        """
        new_names = dict(classes) if isinstance(classes, Mapping) else {name: name for name in classes}
        names = tuple(dict.fromkeys(new_names.values()))
        label_of = np.full(len(self.classes), -1)
        ids: dict[str, int] = {}
        there = {new for old, new in new_names.items() if old in self.classes}
        for old, new in new_names.items():
            if complete and new not in there:
                near = difflib.get_close_matches(old, self.classes, n=1, cutoff=0.0)[0]
                raise DataError(
                    f"data.classes names {old!r}, which {self.source} does not list; the nearest is {near!r}"
                )
            if old in self.classes:
                label = self.classes.index(old)
                label_of[label] = names.index(new)
                ids.setdefault(new, self.category_ids[label])
        if (label_of < 0).all():
            raise DataError(
                f"{self.source} has none of the classes {listed(list(new_names), 5)}; it has "
                f"{listed(self.classes, 5)}: choose some of those, or rename them, as in "
                + typed("data.classes", {self.classes[0]: next(iter(new_names))})
            )
        labels = label_of[self.truth_labels]
        left = np.bincount(self.truth_labels[labels < 0], minlength=len(self.classes))
        findings = []
        if left.any():
            most = np.argsort(-left, kind="stable")[: np.count_nonzero(left)]
            counts = listed([f"{self.classes[label]} {left[label]:,}" for label in most], 5)
            findings.append(f"boxes of classes other than {listed(names, 5)} are left out: {counts}")
        if missing := [name for name in names if name not in ids]:
            findings.append(f"there is no box of {listed(missing, 5)}")
        if findings and self.annotated:
            warn(self.source, "; ".join(findings))
        free = itertools.count(max(self.category_ids) + 1)
        kept = np.flatnonzero(labels >= 0)
        return replace(
            self.chosen(kept),
            classes=names,
            category_ids=tuple(
                label + 1 if self.numbered else ids[name] if name in ids else next(free)
                for label, name in enumerate(names)
            ),
            truth_labels=labels[kept],
        )


class AnnotatedImages(_TorchDataset):
    """Images on disk with their boxes in memory: about 80 bytes a box and no Python object each.

    dataset[i] -> ((3, H, W) uint8 RGB, Target): the original pixels, turned upright by the file's EXIF orientation, and
        the boxes to train on, clipped to the image. Raises DataError if the file was damaged after the audit.
    annotations: audited; boxes image by image, in the file's order of each, without the degenerate ones.
    classes, category_ids, annotated: as in Annotations.

    strict: refuse boxes that would be clipped, dropped or left out of training (see msil.data.audit).
    bits: see read_image.
    """

    def __init__(self, annotations: Annotations, strict: bool = False, bits: int = 16) -> None:
        self.bits = bits
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
        import torch

        from msil.detection.structures import Target

        size = self.image_size(index)
        image = read_image(self.path(index), int(self.annotations.orientations[index]), self.bits)
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


def range_warning(data: AnnotatedImages) -> str:
    """What to set where the first image has 16 bits a channel and data.bits makes it nearly black, or white over more
    than a quarter; else ''."""
    path, bits = data.path(0), data.bits
    if not is_16_bit(path):
        return ""
    pixels = data[0][0]
    if bits == 16 and int(pixels.max()) < DARK:
        return f"{path} has 16 bits a channel and is nearly black: if its values end at 4095, say, set data.bits=12"
    if bits < 16 and float((pixels == 255).float().mean()) > 0.25:
        return f"data.bits={bits} makes all values of {path} above {2**bits - 1} white: set more if they are no mistake"
    return ""
