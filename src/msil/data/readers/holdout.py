"""Validation images held out of a training split, the same ones in every run."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import PurePath

import numpy as np

from msil.data.annotations import Annotations
from msil.errors import DataError, counted


def hold_out(annotations: Annotations, fraction: float, *, held: bool) -> Annotations:
    """The images held out, or all but those.

    annotations: with all classes of the files, so that a choice of classes moves no image.
    fraction: in (0, 1), of the images, and as nearly as whole images allow of those whose rarest class is the same.
    Which they are depends on their names alone. Raises DataError where a part would be empty.
    """
    count = len(annotations.image_ids)
    digests = [hashlib.sha256(PurePath(name).name.encode(errors="replace")).digest() for name in annotations.file_names]
    ranks = np.empty(count, dtype=np.int64)
    ranks[sorted(range(count), key=digests.__getitem__)] = np.arange(count)
    order = np.lexsort((ranks, _strata(annotations)))
    steps = np.floor(np.arange(count + 1) * fraction + 0.5)
    chosen = np.zeros(count, dtype=bool)
    chosen[order] = np.diff(steps) > 0
    if not 0 < chosen.sum() < count:
        raise DataError(
            f"{annotations.source}: data.val_fraction={fraction} of {counted(count, 'image')} leaves a part without "
            "any: set another one, or add images"
        )
    part = annotations.of_images(np.flatnonzero(chosen == held))
    return replace(part, source=f"{annotations.source}, images held out") if held else part


def _strata(annotations: Annotations) -> np.ndarray:
    """(N,) of each image the rank of its rarest class, the one in the fewest images; K where it has no box."""
    count, classes = len(annotations.image_ids), len(annotations.classes)
    pairs = np.unique(annotations.truth_images * classes + annotations.truth_labels)
    images, labels = pairs // max(classes, 1), pairs % max(classes, 1)
    frequency = np.bincount(labels, minlength=classes)
    rank = np.empty(classes, dtype=np.int64)
    rank[np.lexsort((np.array(annotations.classes), frequency))] = np.arange(classes)
    strata = np.full(count, classes)
    np.minimum.at(strata, images, rank[labels])
    return strata
