"""Figures 4 and 6: where the features of the two towers are strong, overlaid blue to red on the image.

A level's map is, at each of its points, the mean over channels of the feature's absolute value, taken behind the MSIL
seam: where the predictors read. The paper does not say how it drew its maps; the mean activation is the usual way for
features that belong to no class. Towers end in a ReLU and MSIL multiplies by gates in (0, 1), so nothing is negative
there, and the absolute value only matters for a module of the reader's own.

"merged" is the mean of the levels' maps, each divided by its sum over the image: every level counts the same.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image, ImageDraw
from torch import Tensor

from msil.detection import Detector
from msil.errors import ConfigError
from msil.metrics.energy import at_pixels, merge_levels
from msil.reporting.drawing import HALO, enlarged_scale, font, to_numpy

TOWERS = ("cls", "reg")
MERGED = "merged"
CELL_SIDE = 288  # pixels of an image's long side in the picture
HEAT = 0.55  # of a map's cell is the map's colour, the rest the grey image
MARGIN = 8
LINE = 19  # pixels, of text
_COLORS = colormaps["jet"]  # blue to red, as the paper's
_FULL_NAMES = {"cls": "classification tower", "reg": "regression tower"}


@dataclass(frozen=True)
class TowerMaps:
    """The maps of one image. cls, reg: a level each, (h, w) float32, not negative, over the padded input.

    strides: of the levels. offset: where in its cell a point lies, in strides. extent: (height, width) of the input
    without its padding. size: (height, width) of the image.
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
        check_level(level, names)
        if level == MERGED:
            return merge_levels([self.at_pixels(tower, name, size) for name in names[:-1]])
        place = names.index(level)
        cells = {"cls": self.cls, "reg": self.reg}[tower][place]
        return at_pixels(cells, self.strides[place], self.offset, self.extent, size or self.size)


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


def level_names(strides: Sequence[int]) -> tuple[str, ...]:
    """Strides 8, 16, ... -> P3, P4, ..., merged."""
    return (*(f"P{stride.bit_length() - 1}" for stride in strides), MERGED)


def check_level(level: str, names: Sequence[str]) -> None:
    """Raises ConfigError for a level that is not among the names."""
    if level not in names:
        raise ConfigError(f"there is no level {level!r}: choose one of {', '.join(names)}.")


@torch.no_grad()
def tower_maps(detector: Detector, image: Tensor) -> TowerMaps:
    """The maps of an image (3, H, W) uint8, which is resized, normalised and padded as in `Detector.predict`.

    Raises ValueError for a detector in training mode.
    """
    if detector.training:
        raise ValueError("a detector in training mode does not show what it predicts from: call eval() first.")
    resized = detector.resized(image.to(detector.image_mean.device))
    cls_feats, reg_feats = detector.head.towers(detector.pyramid([resized]))
    return TowerMaps(
        _channel_means(cls_feats),
        _channel_means(reg_feats),
        tuple(detector.head.strides),
        detector.head.priors.offset,
        (resized.shape[-2], resized.shape[-1]),
        (image.shape[-2], image.shape[-1]),
    )


def draw_heatmaps(rows: Sequence[HeatmapRow], names: Sequence[str], level: str = MERGED) -> np.ndarray:
    """The picture, uint8 (H, W, 3): a row an image, with all checkpoints' classification maps and then their
    regression maps as the paper has them, each map from its own lowest value in the cell (blue) to its highest (red).

    names: of the checkpoints. level: "P3", ..., or "merged". Raises ConfigError for an unknown level.
    """
    cells = [[row.drawn, *_overlays(row, level)] for row in rows]
    heights = [2 * LINE + max(cell.shape[0] for cell in line) + MARGIN for line in cells]
    step = CELL_SIDE + MARGIN
    width = MARGIN + step * (1 + len(TOWERS) * len(names))
    page = Image.new("RGB", (width, 2 * MARGIN + LINE + sum(heights) + 3 * LINE), "white")
    draw = ImageDraw.Draw(page)
    for number, tower in enumerate(TOWERS):
        left = MARGIN + step * (1 + number * len(names))
        right = left + step * len(names) - MARGIN
        _centered(draw, (left + right) / 2, MARGIN + LINE - 6, _FULL_NAMES[tower], right - left)
        draw.line((left, MARGIN + LINE, right - 1, MARGIN + LINE), fill=(150, 150, 150))
    top = 2 * MARGIN + LINE
    for row, line, height in zip(rows, cells, heights, strict=True):
        titles = [row.titles, *(("", f"{tower}: {name}") for tower in TOWERS for name in names)]
        for column, (cell, (upper, lower)) in enumerate(zip(line, titles, strict=True)):
            left = MARGIN + step * column
            _centered(draw, left + CELL_SIDE / 2, top + LINE - 6, upper, CELL_SIDE)
            _centered(draw, left + CELL_SIDE / 2, top + 2 * LINE - 6, lower, CELL_SIDE)
            page.paste(Image.fromarray(cell), (left + (CELL_SIDE - cell.shape[1]) // 2, top + 2 * LINE))
        top += height
    _color_bar(page, draw, top, level)
    return np.asarray(page)


def png_bytes(picture: np.ndarray) -> bytes:
    """uint8 (H, W, 3) as a PNG."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG")
    return content.getvalue()


def _channel_means(feats: Sequence[Tensor]) -> tuple[np.ndarray, ...]:
    return tuple(feat[0].abs().float().mean(dim=0).cpu().numpy() for feat in feats)


def _overlays(row: HeatmapRow, level: str) -> list[np.ndarray]:
    """A row's maps on its image in grey, at the size of a cell: uint8 (H', W', 3) each, tower by tower."""
    image = Image.fromarray(np.ascontiguousarray(to_numpy(row.image).transpose(1, 2, 0)))
    scale = enlarged_scale(image.height, image.width, CELL_SIDE)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    method = Image.Resampling.NEAREST if scale.is_integer() else Image.Resampling.LANCZOS
    gray = np.asarray(image.convert("L").resize(size, method), dtype=float)[..., None]
    return [
        _outlined(
            HEAT * _heat_colors(maps.at_pixels(tower, level, (size[1], size[0]))) + (1 - HEAT) * gray, row.boxes * scale
        )
        for tower in TOWERS
        for maps in row.maps
    ]


def _heat_colors(heat: np.ndarray) -> np.ndarray:
    """(H, W) -> (H, W, 3) in 0..255: from blue at the lowest value to red at the highest; a flat map is blue."""
    low, high = heat.min(), heat.max()
    return 255 * _COLORS((heat - low) / (high - low if high > low else 1.0))[..., :3]


def _outlined(pixels: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Boxes as thin white lines with a dark one around them, which every colour of the map lets be seen."""
    canvas = Image.fromarray(pixels.round().astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    corners = np.asarray(boxes, dtype=float).reshape(-1, 4).round().astype(int)
    x2, y2 = canvas.width, canvas.height
    for box in corners:
        left, top, right, bottom = np.clip(box - (0, 0, 1, 1), 0, (x2 - 1, y2 - 1, x2 - 1, y2 - 1)).tolist()
        right, bottom = max(right, left), max(bottom, top)
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=HALO)
        draw.rectangle((left, top, right, bottom), outline="white")
    return np.asarray(canvas)


def _centered(draw: ImageDraw.ImageDraw, middle: float, baseline: int, text: str, room: float) -> None:
    """One line, its end cut off where it is longer than the room."""
    text = " ".join(text.split())
    whole = text
    while font().getlength(text) > room and len(whole) > 1:
        whole = whole[:-1]
        text = f"{whole.rstrip()}\u2026"
    draw.text((middle, baseline), text, font=font(), fill="black", anchor="ms")


def _color_bar(page: Image.Image, draw: ImageDraw.ImageDraw, top: int, level: str) -> None:
    """What the colours are, at the bottom."""
    bar = np.round(255 * _COLORS(np.linspace(0, 1, CELL_SIDE))[None, :, :3]).astype(np.uint8).repeat(LINE - 5, axis=0)
    page.paste(Image.fromarray(bar), (MARGIN, top + MARGIN))
    low, high = top + MARGIN + LINE - 5, top + MARGIN + 2 * LINE - 7
    draw.text((MARGIN, high), "lowest", font=font(), fill="black", anchor="ls")
    draw.text((MARGIN + CELL_SIDE, high), "highest of each map", font=font(), fill="black", anchor="rs")
    what = "all levels merged" if level == MERGED else f"level {level}"
    text = f"channel mean of the feature's absolute value, {what}"
    draw.text((2 * MARGIN + CELL_SIDE, low - 3), text, font=font(), fill="black", anchor="ls")
