"""`msil data show`: what is in a data set, as tables, as what the audit found, and as one picture of some images."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from msil.data.annotations import AnnotatedImages, Annotations, range_warning
from msil.data.audit import DataWarning
from msil.data.module import build_split
from msil.data.readers.layouts import auto_settings, splits_of
from msil.errors import ConfigError, DataError, counted, listed
from msil.reporting.figures.gallery import truth_picture
from msil.reporting.figures.pictures import draw_grid, plain
from msil.reporting.tables import Column, Table, to_text
from msil.runs import check_own

PICTURES = 12
CLASSES = 20  # rows of the table of classes
COUNT = "{:,}".format
SMALL, LARGE = 32**2, 96**2  # px^2: COCO's small boxes are below the first, its large ones not below the second


def show_data(root: str | Path, out: str | Path, split: str | None = None) -> Iterator[str]:
    """Write the picture to `out`, a .png; the lines to print come as the work goes on.

    root: of any layout that data=auto reads. split: one of its splits; None: all.
    Raises DataError for what the audit refuses, once the other splits have been shown; ConfigError for another ending
    of `out`, a place that cannot be written to, or another's file there.
    """
    root, out = Path(root), Path(out)
    if out.suffix.lower() != ".png":
        raise ConfigError(f"the picture is a PNG, but {out} does not end in .png: name it so.")
    check_own(out)
    found: dict[str, AnnotatedImages] = {}
    refused: dict[str, DataError] = {}
    for name in [split] if split else splits_of(root):
        yield f"reading split {name} of {root}"
        with warnings.catch_warnings(record=True) as findings:
            warnings.simplefilter("always", DataWarning)
            try:
                found[name] = build_split({"name": "auto", "root": root}, name)
            except DataError as error:
                refused[name] = error
        yield from (f"warning: {finding.message}" for finding in findings)
        if name in found and (said := range_warning(found[name])):
            yield f"warning: {said}"
    for one, other in combinations(found, 2):
        if shared := found[one].annotations.shared_with(found[other].annotations):
            yield f"warning: {one} and {other} share {counted(len(shared), 'image')}, such as {shared[0]}"
    if found:
        truths = dict(zip(found, labelled_alike([one.annotations for one in found.values()]), strict=True))
        yield "\n" + to_text(splits_table(truths))
        yield to_text(classes_table(truths))
        if settings := auto_settings(root, refused):
            yield f"to train on it, or as docs/data.md has it:\n  msil train {settings}"
        shown = draw_sheet(found, truths, out)
        yield f"{out}: {shown} images with their boxes, spread over the set"
    if refused:
        raise next(iter(refused.values()))


def labelled_alike(truths: Sequence[Annotations]) -> list[Annotations]:
    """With the classes of all of them, in the first one's order, so that a class has one label, and one colour."""
    names = tuple(dict.fromkeys(name for truth in truths for name in truth.classes))
    places = [np.array([names.index(name) for name in truth.classes]) for truth in truths]
    ids = tuple(range(1, len(names) + 1))
    return [
        replace(truth, classes=names, category_ids=ids, truth_labels=place[truth.truth_labels])
        for truth, place in zip(truths, places, strict=True)
    ]


def splits_table(truths: Mapping[str, Annotations]) -> Table:
    """A row a split: its images, those without boxes, its boxes, those that are ignored, and boxes by size."""
    rows = []
    for name, truth in truths.items():
        areas, images = truth.truth_areas, len(truth.image_ids)
        rows.append(
            {
                "split": name,
                "images": images,
                "without_boxes": images - len(np.unique(truth.truth_images)),
                "boxes": len(areas),
                "ignored": int(truth.truth_ignored.sum()),
                "small": int((areas < SMALL).sum()),
                "medium": int(((areas >= SMALL) & (areas < LARGE)).sum()),
                "large": int((areas >= LARGE).sum()),
            }
        )
    columns = [Column(name, name.replace("_", " "), COUNT) for name in rows[0] if name != "split"]
    return Table(
        "Images and boxes.",
        (Column("split", "split", right=False), *columns),
        tuple(rows),
        (
            "small: below 32 x 32 px; large: from 96 x 96 px on (COCO's areas)",
            "ignored: COCO's crowds, VOC's difficult boxes",
        ),
    )


def classes_table(truths: Mapping[str, Annotations]) -> Table:
    """A row for each of the largest classes: of each split its boxes, and the images that have one."""
    names = next(iter(truths.values())).classes
    boxes, images = {}, {}
    for split, truth in truths.items():
        pairs = np.unique(np.stack([truth.truth_labels, truth.truth_images], axis=1), axis=0)
        boxes[split] = np.bincount(truth.truth_labels, minlength=len(names))
        images[split] = np.bincount(pairs[:, 0], minlength=len(names))
    total = np.sum(list(boxes.values()), axis=0)
    order = np.argsort(-total, kind="stable")
    rows = [
        {"class": names[label]}
        | {f"{split}_boxes": int(boxes[split][label]) for split in truths}
        | {f"{split}_images": int(images[split][label]) for split in truths}
        for label in order[:CLASSES]
    ]
    columns = [Column("class", "class", lambda name: plain(name, 30), right=False)]
    for split in truths:
        title = "boxes" if len(truths) == 1 else split
        columns += [Column(f"{split}_boxes", title, COUNT), Column(f"{split}_images", "images", COUNT)]
    notes = []
    if rest := order[CLASSES:].tolist():
        notes.append(f"{len(rest)} more classes with {total[rest].sum():,} boxes")
    if none := [names[label] for label in order if not total[label]]:
        notes.append(f"without boxes: {listed(none, 10)}")
    return Table(
        f"Boxes of {len(names)} classes, and the images that have one.", tuple(columns), tuple(rows), tuple(notes)
    )


def draw_sheet(found: Mapping[str, AnnotatedImages], truths: Mapping[str, Annotations], out: Path) -> int:
    """Write a PNG of up to PICTURES images at even distances through the splits, none twice. Returns how many.

    truths: the splits' annotations with labels of their own, as from `labelled_alike`.
    """
    places = {
        found[split].path(index).resolve(): (split, index) for split in found for index in range(len(found[split]))
    }
    every = list(places.values())
    chosen = np.linspace(0, len(every) - 1, min(PICTURES, len(every))).round().astype(int).tolist()
    cells: list[tuple[str, Any]] = []
    for split, index in (every[place] for place in chosen):
        truth = truths[split]
        count = int((truth.truth_images == index).sum())
        title = f"{split}: {plain(Path(truth.file_names[index]).name, 30)}, {count} {'box' if count == 1 else 'boxes'}"
        cells.append((title, truth_picture(index, found[split][index][0], truth)))
    try:
        draw_grid(cells, out)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror or error}): choose another place.") from error
    return len(cells)
