"""Figures 4 and 6: where the features of the two towers are strong, overlaid blue to red on the image, and how much of
that energy lies in the boxes and near their borders.

A level's map is, at each of its points, the mean over channels of the feature's absolute value, taken behind the MSIL
seam: where the predictors read. The paper does not say how it drew its maps; the mean activation is the usual way for
features that belong to no class. Towers end in a ReLU and MSIL multiplies by gates in (0, 1), so nothing is negative
there, and the absolute value only matters for a module of the reader's own.

"merged" is the mean of the levels' maps, each divided by its sum over the image: every level counts the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from msil.detection import Detector
from msil.errors import ConfigError, DataError
from msil.metrics.energy import BORDER, at_pixels, box_regions, energy_shares, image_mean, merge_levels
from msil.reporting.figures.pictures import draw_boxes, plain, scaled, to_numpy
from msil.reporting.tables import Column, Table, interval, percent

TOWERS = {"cls": "classification tower", "reg": "regression tower"}
REGIONS = ("inside", "border")
MERGED = "merged"
CELL_SIDE = 288  # pixels of an image's long side in the picture
HEAT = 0.55  # of a map's cell is the map's colour, the rest the grey image
ROUNDING = 1e-9  # a level of one point is uniform, and differs from it by no more


@dataclass(frozen=True)
class TowerMaps:
    """The maps of one image. cls, reg: a level each, (h, w) float32, not negative, over the padded input.

    offset: where in its cell a point lies, in strides. extent: (height, width) of the input without its padding.
    size: (height, width) of the image.
    """

    cls: tuple[np.ndarray, ...]
    reg: tuple[np.ndarray, ...]
    strides: tuple[int, ...]
    offset: float
    extent: tuple[int, int]
    size: tuple[int, int]

    def at_pixels(self, tower: str, level: str, size: tuple[int, int] | None = None) -> np.ndarray:
        """(H, W) float64: the map of a tower ("cls", "reg") and level ("P3", ..., "merged"), bilinearly at the pixels
        of the image, or of the image scaled to `size`. Raises ConfigError for an unknown level."""
        names = level_names(self.strides)
        if level not in names:
            raise ConfigError(f"there is no level {level!r}: choose one of {', '.join(names)}.")
        if level == MERGED:
            return merge_levels([self.at_pixels(tower, name, size) for name in names[:-1]])
        cells, stride = self._levels(tower)[names.index(level)]
        return at_pixels(cells, stride, self.offset, self.extent, size or self.size)

    def shares(self, tower: str, regions: np.ndarray) -> np.ndarray:
        """(L, R): of each level's map and of the merged one, whose share is their mean, the part in regions
        (R, H, W) of the image."""
        levels = [energy_shares(*level, self.offset, self.extent, regions) for level in self._levels(tower)]
        return np.stack([*levels, np.mean(levels, axis=0)])

    def _levels(self, tower: str) -> list[tuple[np.ndarray, int]]:
        return list(zip({"cls": self.cls, "reg": self.reg}[tower], self.strides, strict=True))


@dataclass(frozen=True)
class HeatmapRow:
    """A row of the picture.

    image: uint8 (3, H, W). titles: of the image, two lines. drawn: uint8 (H', W', 3), the first column's picture.
    boxes: (M, 4) x1 y1 x2 y2 in the image's pixels, outlined on its maps. maps: one a checkpoint.
    """

    image: Any
    titles: tuple[str, str]
    drawn: np.ndarray
    boxes: np.ndarray
    maps: Sequence[TowerMaps]


@dataclass(frozen=True)
class SplitEnergy:
    """Energy shares of I images with boxes and C checkpoints; see msil.metrics.energy.

    names: (C,). levels: (L,), the last one is merged. shares: (C, I, 2, L, 2) fractions by checkpoint, image, tower,
    level and region, the latter inside and border. uniform: (I, 2), by region, of a uniform map. skipped: images
    without boxes.
    """

    names: tuple[str, ...]
    levels: tuple[str, ...]
    shares: np.ndarray
    uniform: np.ndarray
    skipped: int


def level_names(strides: Sequence[int]) -> tuple[str, ...]:
    """Strides 8, 16, ... -> P3, P4, ..., merged."""
    return (*(f"P{stride.bit_length() - 1}" for stride in strides), MERGED)


def heatmap_row(
    detectors: Mapping[str, Detector],
    image: Tensor,
    titles: tuple[str, str],
    boxes: Any,
    labels: Any,
    classes: Sequence[str],
    scores: Any = None,
) -> HeatmapRow:
    """The maps of all detectors on an image (3, H, W) uint8, and its boxes as `draw_boxes` takes them."""
    drawn = draw_boxes(image, boxes, labels, classes, scores=scores, side=CELL_SIDE)
    return HeatmapRow(image, titles, drawn, to_numpy(boxes), [tower_maps(one, image) for one in detectors.values()])


@torch.no_grad()
def tower_maps(detector: Detector, image: Tensor) -> TowerMaps:
    """The maps of an image (3, H, W) uint8, which is resized, normalised and padded as in `Detector.predict`.

    Raises ValueError for a detector in training mode.
    """
    if detector.training:
        raise ValueError("a detector in training mode does not show what it predicts from: call eval() first.")
    resized = detector.resized(image.to(detector.image_mean.device))
    towers = detector.head.towers(detector.pyramid([resized]))
    cls, reg = (tuple(feat[0].abs().float().mean(dim=0).cpu().numpy() for feat in feats) for feats in towers)
    extent, size = ((shape[-2], shape[-1]) for shape in (resized.shape, image.shape))
    return TowerMaps(cls, reg, tuple(detector.head.strides), detector.head.priors.offset, extent, size)


def draw_heatmaps(rows: Sequence[HeatmapRow], names: Sequence[str], level: str = MERGED) -> np.ndarray:
    """The picture, uint8 (H, W, 3): a row an image, with all checkpoints' classification maps and then their
    regression maps as the paper has them, each map from its own lowest value (blue) to its highest (red).

    names: of the checkpoints. level: "P3", ..., or "merged". Raises ConfigError for an unknown level.
    """
    columns = 1 + len(TOWERS) * len(names)
    heights = [row.drawn.shape[0] / row.drawn.shape[1] + 0.15 for row in rows]
    side = CELL_SIDE / 100
    figure = Figure(figsize=(side * columns, side * sum(heights) + 0.6), dpi=100, layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for axes in grid.ravel():
        axes.set_axis_off()
    for row, line in zip(rows, grid, strict=True):
        line[0].set_title("\n".join(plain(title, 40) for title in row.titles if title), fontsize=9)
        line[0].imshow(row.drawn)
        small, scale = scaled(Image.fromarray(np.ascontiguousarray(to_numpy(row.image).transpose(1, 2, 0))), CELL_SIDE)
        gray = np.asarray(small.convert("L"))
        cells = [(tower, name, maps) for tower in TOWERS for name, maps in zip(names, row.maps, strict=True)]
        for axes, (tower, name, maps) in zip(line[1:], cells, strict=True):
            heat = maps.at_pixels(tower, level, gray.shape)
            axes.set_title(f"{tower}: {plain(name, 30)}", fontsize=9)
            axes.imshow(gray, cmap="gray", vmin=0, vmax=255)
            overlay = axes.imshow((heat - heat.min()) / (np.ptp(heat) or 1), cmap="jet", vmin=0, vmax=1, alpha=HEAT)
            for x1, y1, x2, y2 in np.asarray(row.boxes, dtype=float).reshape(-1, 4) * scale:
                for color, width in (("black", 3), ("white", 1)):
                    axes.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, edgecolor=color,
                                             linewidth=width))  # fmt: skip
    if rows:
        bar = figure.colorbar(overlay, ax=grid, orientation="horizontal", shrink=0.5, aspect=50, pad=0.01)
        bar.set_ticks([0, 1], labels=["lowest", "highest of each map"])
        what = "all levels merged" if level == MERGED else f"level {level}"
        bar.set_label(f"channel mean of the feature's absolute value, {what}", fontsize=9)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


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
        uniform.append(regions.mean(axis=(1, 2)))
        for found, detector in zip(shares, detectors.values(), strict=True):
            maps = tower_maps(detector, image)
            found.append([maps.shares(tower, regions) for tower in TOWERS])
    if not uniform:
        raise DataError("no image of the split has a box, so no energy can be inside one: name another split.")
    return SplitEnergy(tuple(detectors), names, np.array(shares), np.array(uniform), skipped)


def energy_table(energy: SplitEnergy) -> Table:
    """Shares by region, tower and level of each checkpoint; over a uniform map's, which says
    whether a map prefers the region; and minus the first checkpoint's. Means over the images with 95 % intervals
    (bootstrap over images, paired for differences); * where a difference's leaves out zero."""
    first, *others = energy.names
    columns = [Column(name, name, str, right=False) for name in ("region", "tower", "level")]
    columns += [Column("uniform", "uniform", percent)]
    ends = ("", "_low", "_high")
    for name in energy.names:
        columns.append(Column(name, name, lambda value: percent(value[0]), parts=ends))
        columns.append(Column(f"{name} over uniform", "over uniform [95 %]", _difference, parts=ends))
    columns += [Column(f"{name} - {first}", f"{name} - {first} [95 %]", _difference, parts=ends) for name in others]
    rows = []
    for (r, region), (t, tower), (lv, level) in itertools.product(
        *(enumerate(names) for names in (REGIONS, TOWERS, energy.levels))
    ):
        values = energy.shares[:, :, t, lv, r]
        row: dict[str, Any] = {"region": region, "tower": tower, "level": level}
        row["uniform"] = float(energy.uniform[:, r].mean())
        for name, own in zip(energy.names, values, strict=True):
            row[name] = image_mean(own)
            row[f"{name} over uniform"] = image_mean(own - energy.uniform[:, r])
            if name != first:
                row[f"{name} - {first}"] = image_mean(own - values[0])
        rows.append(row)
    notes = (f"border: within {BORDER:.0%} of a box's shorter side of its border. *: the interval leaves out zero.",)
    caption = f"Share of a map's energy in the boxes and near their border, percent, {energy.shares.shape[1]} images."
    return Table(caption, tuple(columns), tuple(rows), notes)


def energy_json(energy: SplitEnergy) -> dict[str, Any]:
    """All numbers as plain values, shares as fractions, [estimate, low, high]."""
    images = {"images": energy.shares.shape[1], "images_without_boxes": energy.skipped, "border": BORDER}
    return {**images, "rows": [dict(row) for row in energy_table(energy).rows]}


def _difference(value: tuple[float, float, float]) -> str:
    return interval(value) + ("*" if max(value[1], -value[2]) > ROUNDING else " ")
