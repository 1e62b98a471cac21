"""How much of the towers' energy lies in the boxes and on their borders over a split: measured, printed, as json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from msil.detection import Detector
from msil.errors import ConfigError, DataError
from msil.metrics.bootstrap import Interval
from msil.metrics.energy import BORDER, box_regions, energy_shares, image_mean, uniform_shares
from msil.reporting.drawing import to_numpy
from msil.reporting.formats import percent, signed
from msil.reporting.heatmaps import TOWERS, level_names, tower_maps

ROUNDING = 1e-9  # a level of one point is uniform, and differs from it by no more
REGIONS = {"inside": "inside the boxes", "border": f"within {BORDER:.0%} of a box's shorter side of its border"}


@dataclass(frozen=True)
class SplitEnergy:
    """Energy shares of I images with boxes and C checkpoints; what they are is said in msil.metrics.energy.

    names: (C,). levels: (L,), the last one is merged. shares: (C, I, 2, L, 2) fractions by checkpoint, image, tower,
    level and region, the latter inside and border. uniform: (I, 2), by region, of a uniform map. skipped: images
    without boxes.
    """

    names: tuple[str, ...]
    levels: tuple[str, ...]
    shares: np.ndarray
    uniform: np.ndarray
    skipped: int

    def uniform_mean(self, region: str) -> float:
        """The share of a uniform map, mean over the images: how much of the images the region covers."""
        return float(self.uniform[:, list(REGIONS).index(region)].mean())

    def mean(self, checkpoint: int, tower: str, level: str, region: str) -> Interval:
        """Mean over the images with its 95 % interval (bootstrap over images)."""
        return image_mean(self._values(checkpoint, tower, level, region))

    def over_uniform(self, checkpoint: int, tower: str, level: str, region: str) -> Interval:
        """Mean minus that of a uniform map, with its paired interval: above zero, the maps prefer the region. The
        interval of `mean` cannot tell, since most of its width is that objects are large in some images."""
        uniform = self.uniform[:, list(REGIONS).index(region)]
        return image_mean(self._values(checkpoint, tower, level, region) - uniform)

    def difference(self, checkpoint: int, tower: str, level: str, region: str) -> Interval:
        """A checkpoint's mean minus the first one's, with its paired interval."""
        return image_mean(self._values(checkpoint, tower, level, region) - self._values(0, tower, level, region))

    def _values(self, checkpoint: int, tower: str, level: str, region: str) -> np.ndarray:
        place = TOWERS.index(tower), self.levels.index(level), list(REGIONS).index(region)
        return self.shares[checkpoint][:, *place]


def split_energy(detectors: Mapping[str, Detector], samples: Iterable[tuple[Tensor, Any]]) -> SplitEnergy:
    """Energy shares of each named detector over images (3, H, W) with their boxes (M, 4) x1 y1 x2 y2 in their pixels.

    Images without boxes have no inside: they are counted and left out.
    Raises DataError if no image has boxes, ConfigError if the detectors' levels are not the same.
    """
    levels = {level_names(detector.head.strides) for detector in detectors.values()}
    if len(levels) > 1:
        raise ConfigError("the checkpoints have different pyramid levels: compare those with the same.")
    (names,) = levels
    shares: list[list[Any]] = [[] for _ in detectors]
    uniform, skipped = [], 0
    for image, boxes in samples:
        if not len(boxes):
            skipped += 1
            continue
        regions = box_regions(to_numpy(boxes), (image.shape[-2], image.shape[-1]))
        uniform.append(uniform_shares(regions))
        for found, detector in zip(shares, detectors.values(), strict=True):
            maps = tower_maps(detector, image)
            found.append([[energy_shares(maps.at_pixels(t, level), regions) for level in names] for t in TOWERS])
    if not uniform:
        raise DataError("no image of the split has a box, so no energy can be inside one: name another split.")
    return SplitEnergy(tuple(detectors), names, np.array(shares), np.array(uniform), skipped)


def energy_lines(energy: SplitEnergy) -> list[str]:
    """The shares in percent as a table to print, a block a region, with what they are over a uniform map's; * where an
    interval leaves out zero."""
    images = energy.shares.shape[1]
    head = ["", "", "uniform", *(text for name in energy.names for text in (name, "over uniform [95 %]"))]
    head += [f"{name} - {energy.names[0]} [95 %]" for name in energy.names[1:]]
    lines = []
    for region, words in REGIONS.items():
        table = [head]
        for tower in TOWERS:
            for level in energy.levels:
                row = [tower if level == energy.levels[0] else "", level, percent(energy.uniform_mean(region))]
                for i in range(len(energy.names)):
                    row.append(percent(energy.mean(i, tower, level, region).estimate))
                    row.append(_difference(energy.over_uniform(i, tower, level, region)))
                for i in range(1, len(energy.names)):
                    row.append(_difference(energy.difference(i, tower, level, region)))
                table.append(row)
        lines += [f"share of a map's energy {words}, percent, {images} images", *_aligned(table), ""]
    return lines[:-1]


def energy_json(energy: SplitEnergy) -> dict[str, Any]:
    """All numbers as plain values, shares as fractions."""
    rows = []
    for region in REGIONS:
        for tower in TOWERS:
            for level in energy.levels:
                key = tower, level, region
                rows.append({
                    "region": region,
                    "tower": tower,
                    "level": level,
                    "uniform": energy.uniform_mean(region),
                    "shares": {name: _plain(energy.mean(i, *key)) for i, name in enumerate(energy.names)},
                    "over_uniform": {name: _plain(energy.over_uniform(i, *key)) for i, name in enumerate(energy.names)},
                    "differences_to_first": {
                        name: _plain(energy.difference(i, *key)) for i, name in enumerate(energy.names) if i
                    },
                })  # fmt: skip
    return {
        "images": energy.shares.shape[1],
        "images_without_boxes": energy.skipped,
        "border": BORDER,
        "rows": rows,
    }


def _plain(interval: Interval) -> dict[str, float]:
    return {"estimate": interval.estimate, "low": interval.low, "high": interval.high}


def _difference(interval: Interval) -> str:
    mark = "*" if max(interval.low, -interval.high) > ROUNDING else " "
    return f"{signed(interval.estimate)} [{signed(interval.low)}, {signed(interval.high)}]{mark}"


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Columns under one another: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
