"""Heat maps of detectors on images, and their energy over a split: what `msil figure heatmap` does."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from msil.data.annotations import AnnotatedImages
from msil.data.images import read_image
from msil.detection import Detector
from msil.errors import ConfigError, DataError, counted
from msil.inference.predict import detect
from msil.reporting.figures.heatmaps import (
    MERGED,
    HeatmapRow,
    draw_heatmaps,
    energy_json,
    energy_table,
    heatmap_row,
    split_energy,
)
from msil.reporting.figures.pictures import above, image_bytes
from msil.reporting.tables import to_text
from msil.runs import check_own, write_bytes, write_json

SCORE_THRESH = 0.3
ROWS = 4  # images of a split, where none are named


def heatmap_figure(
    detectors: Mapping[str, Detector],
    classes: Sequence[str],
    images: Sequence[Path],
    out: str | Path,
    *,
    level: str = MERGED,
    bits: int = 16,
    dataset: AnnotatedImages | None = None,
    about: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write the picture of all detectors' maps on all images and, with a data set, measure their energy over it.

    detectors: by name, in eval mode. classes: of the first one. images: files; without any, four images of the data
    set that have boxes, evenly spread. The first column shows the ground truth where the data set holds the file, else
    what the first detector finds there. bits: see read_image. out: a .png; the numbers go beside it with the ending
    .json, with `about`. Returns what to print.

    Raises ConfigError for an unknown level, another ending, nothing to draw, a place that cannot be written to, or
    another's file there; DataError for an image that cannot be read or a data set without boxes.
    """
    out = Path(out)
    for file in images:
        if not file.is_file():
            raise DataError(f"there is no image {file}: give the path of one.")
    if out.suffix.lower() != ".png":
        raise ConfigError(f"the picture is a PNG, but {out} does not end in .png: name it so.")
    check_own(out, *([] if dataset is None else [out.with_suffix(".json")]))
    if not images and dataset is None:
        raise ConfigError("there is nothing to draw: name images (--image), or a split to take some of (--split).")
    rows = [_row(detectors, classes, file, dataset, index, bits) for file, index in _indices(images, dataset)]
    lines = [f"{out}: {counted(len(rows), 'image')}, {level}"]
    try:
        write_bytes(out, image_bytes(draw_heatmaps(rows, tuple(detectors), level)))
        if dataset is not None:
            samples = (dataset[index] for index in tqdm(range(len(dataset)), unit="image", disable=None))
            energy = split_energy(detectors, ((image, target.boxes) for image, target in samples))
            write_json(out.with_suffix(".json"), {**(about or {}), **energy_json(energy)})
            lines = [to_text(energy_table(energy)), *lines, f"{out.with_suffix('.json')}: the numbers"]
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror or error}): choose another place.") from error
    return lines


def short_names(names: Sequence[str]) -> list[str]:
    """The parts between underscores that the runs' names do not have in common, less the digest of the settings at
    the end; equal ones are numbered."""
    parts = [re.sub(r"_[0-9a-f]{8}$", "", name).split("_") for name in names]
    common = set.intersection(*map(set, parts)) if len(names) > 1 else set(parts[0])
    found = [
        "_".join(part for part in own if part not in common) or name for own, name in zip(parts, names, strict=True)
    ]
    return [name if found.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(found, start=1)]


def _indices(images: Sequence[Path], dataset: AnnotatedImages | None) -> list[tuple[Path, int | None]]:
    """The files to draw with their places in the data set, None for those that it does not hold."""
    if dataset is None:
        return [(file, None) for file in images]
    if images:
        places = {dataset.path(index).resolve(): index for index in range(len(dataset))}
        return [(file, places.get(file.resolve())) for file in images]
    usable = [index for index in range(len(dataset)) if dataset.has_boxes(index)]
    if not usable:
        raise DataError("no image of the split has a box: name another split.")
    chosen = np.unique(np.linspace(0, len(usable) - 1, ROWS).round().astype(int))
    return [(dataset.path(usable[place]), usable[place]) for place in chosen]


def _row(
    detectors: Mapping[str, Detector],
    classes: Sequence[str],
    file: Path,
    dataset: AnnotatedImages | None,
    index: int | None,
    bits: int,
) -> HeatmapRow:
    if dataset is not None and index is not None:
        image, target = dataset[index]
        titles = (file.name, f"ground truth: {len(target.boxes)}")
        return heatmap_row(detectors, image, titles, target.boxes, target.labels, dataset.classes)
    image = read_image(file, bits=bits)
    name, detector = next(iter(detectors.items()))
    found = above(detect(detector, [image])[0], SCORE_THRESH)
    titles = (file.name, f"{len(found.boxes)} with score \u2265 {SCORE_THRESH:g}, {name}")
    return heatmap_row(detectors, image, titles, found.boxes, found.labels, classes, found.scores)
