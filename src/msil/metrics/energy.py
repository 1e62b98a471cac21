"""How much of a heat map lies on the objects, and how much on their borders.

The energy of a map is its values, none negative, divided by their sum over the image. A share is the energy of a
region; a map of one value everywhere has the region's share of the area, which is what a share is to be held against.
Pixel (row, column) is taken at its centre (column + 0.5, row + 0.5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from msil.metrics.bootstrap import SAMPLES, Interval, image_weights, interval

BORDER = 0.1  # of the box's shorter side


def box_regions(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(2, H, W) bool: the pixels inside any of the boxes, and the pixels near the outline of any.

    boxes: (M, 4) x1 y1 x2 y2 in pixels of an image of `size` (height, width). A pixel is near an outline if its
    distance to the nearest point of it, inside or outside of the box, is at most BORDER times the box's shorter side.
    The outline of one box may run through another: such pixels belong to both regions.
    """
    height, width = size
    inside, border = regions = np.zeros((2, height, width), dtype=bool)
    for x1, y1, x2, y2 in np.asarray(boxes, dtype=float).reshape(-1, 4):
        reach = BORDER * min(x2 - x1, y2 - y1)
        # Only what the box can reach: an image of COCO has many boxes, most of them small.
        rows, columns = _span(y1 - reach, y2 + reach, height), _span(x1 - reach, x2 + reach, width)
        y = np.arange(rows.start, rows.stop)[:, None] + 0.5
        x = np.arange(columns.start, columns.stop)[None] + 0.5
        beyond_x, beyond_y = np.maximum(x1 - x, x - x2), np.maximum(y1 - y, y - y2)  # negative: within
        within = np.maximum(beyond_x, beyond_y)
        outside = np.hypot(np.maximum(beyond_x, 0), np.maximum(beyond_y, 0))
        inside[rows, columns] |= within <= 0
        border[rows, columns] |= np.where(within <= 0, -within, outside) <= reach
    return regions


def at_pixels(
    cells: np.ndarray, stride: float, offset: float, extent: tuple[float, float], size: tuple[int, int]
) -> np.ndarray:
    """A level's map (h, w) of the net's input, bilinearly at the pixels of an image (H, W) of `size`.

    A cell's value stands at the point that the head predicts from: ((column + offset) * stride, (row + offset) *
    stride) in pixels of the input. extent: (height, width) in those pixels that the image fills, without the padding.
    Beyond the outermost points the nearest one's value holds.
    """
    rows = _weights(size[0], extent[0], cells.shape[0], stride, offset)
    columns = _weights(size[1], extent[1], cells.shape[1], stride, offset)
    return rows @ cells.astype(np.float64) @ columns.T


def energy_shares(
    cells: np.ndarray, stride: float, offset: float, extent: tuple[float, float], regions: np.ndarray
) -> np.ndarray:
    """(R,) shares, each in [0, 1], of a map that lie in regions (R, H, W) of an image's pixels.

    cells ... extent: see `at_pixels`, to whose map the shares belong. The sum over a region's pixels is linear in the
    cells, so each cell is weighed by what it gives to the region, and no map is enlarged.
    A map of zeros singles nothing out, and counts as a uniform one, whose shares are the regions' of the area.
    Raises ValueError for negative or non-finite values.
    """
    if not (np.isfinite(cells).all() and (cells >= 0).all()):
        raise ValueError("the energy of a map must be finite and not negative.")
    _, height, width = regions.shape
    rows = _weights(height, extent[0], cells.shape[0], stride, offset)
    columns = _weights(width, extent[1], cells.shape[1], stride, offset)
    total = (np.outer(rows.sum(axis=0), columns.sum(axis=0)) * cells).sum()
    if not total:
        return regions.mean(axis=(1, 2))
    return (rows.T @ regions @ columns * cells).sum(axis=(1, 2)) / total


def merge_levels(maps: Sequence[np.ndarray]) -> np.ndarray:
    """Maps (H, W) of all levels -> one: their mean, each divided by its sum first, so that a level counts as much as
    any other, however large its values are. A map of zeros counts as a uniform one."""
    return np.mean([m / m.sum() if m.sum() else np.full(m.shape, 1 / m.size) for m in maps], axis=0)


def image_mean(values: np.ndarray, *, samples: int = SAMPLES) -> Interval:
    """Mean of one value an image, (I,), with the 95 % percentile interval of `samples` resamplings of the images.

    Given the differences of two checkpoints on the same images, it is the paired interval of their difference: of as
    many images the resampled ones are the same. Raises ValueError without images.
    """
    values = np.asarray(values, dtype=float)
    if not len(values):
        raise ValueError("a mean over images needs at least one.")
    means = image_weights(len(values), samples, np.random.default_rng(0)) @ values / len(values)
    return interval(float(values.mean()), means)


def _span(low: float, high: float, length: int) -> slice:
    """The pixels of an axis that touch low..high."""
    start = min(max(math.floor(low), 0), length)
    return slice(start, max(min(math.ceil(high), length), start))


def _weights(pixels: int, extent: float, cells: int, stride: float, offset: float) -> np.ndarray:
    """(pixels, cells): what each cell of an axis gives to each pixel; rows sum to 1."""
    place = (np.arange(pixels) + 0.5) * (extent / pixels) / stride - offset
    place = place.clip(0, cells - 1)
    low = np.minimum(place.astype(int), max(cells - 2, 0))
    weights = np.zeros((pixels, cells))
    weights[np.arange(pixels), low] = 1 - (place - low)
    if cells > 1:
        weights[np.arange(pixels), low + 1] = place - low
    return weights
