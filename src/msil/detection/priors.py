"""Priors: the points or anchors of a pyramid, cached by the sizes of its maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from msil.detection.preprocess import STRIDE

MapSizes = tuple[tuple[int, int], ...]
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def cached_unless_compiling(make: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Tensors made once for the same arguments. While a net is exported or compiled these may be symbols, which no
    cache can hold."""
    # RetinaNet's anchors of 800 x 1333 take 6 MB, and COCO has some 300 padded sizes at one scale: all sizes of several
    # scales would take gigabytes of a GPU.
    cached = lru_cache(maxsize=64)(make)

    def made(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        # Cached tensors outlive the call, so they must be ordinary ones even if made under inference_mode.
        with torch.inference_mode(False):
            return (make if torch.compiler.is_compiling() else cached)(*args, **kwargs)

    return made


class LevelGrid(NamedTuple):
    """The maps behind the priors, L levels.

    map_sizes: (height, width) of each level. level_strides: of each level, as integers. offset: of a prior's centre
    in its cell, in strides. per_cell: priors of a cell. strides (L,) float32; heights, widths, starts (L,) int64,
    `starts` being the level's first prior.
    """

    map_sizes: MapSizes
    level_strides: tuple[int, ...]
    offset: float
    per_cell: int
    strides: Tensor
    heights: Tensor
    widths: Tensor
    starts: Tensor


class Priors(NamedTuple):
    """The P priors of one batch shape: level by level, row-major inside a level, a cell's anchors side by side.

    boxes (P, 4): anchors x1 y1 x2 y2 in pixels of the padded input; points are boxes without size. centers (P, 2): x,
    y. strides (P,). All float32.
    """

    boxes: Tensor
    centers: Tensor
    strides: Tensor
    grid: LevelGrid

    def at(self, index: Tensor) -> Priors:
        """The priors at index (N, C) int64: boxes (N, C, 4), centers (N, C, 2), strides (N, C)."""
        return Priors(self.boxes[index], self.centers[index], self.strides[index], self.grid)

    def valid(self, image_sizes: Tensor) -> Tensor:
        """Which priors lie in what `covered` gives of image_sizes and not in the batch's padding -> (B, P). By the
        corner of a prior's cell, as MMDetection's valid_flags."""
        corners = self.centers - self.grid.offset * self.strides[:, None] if self.grid.offset else self.centers
        return (corners < covered(image_sizes)[:, None]).all(-1)


def covered(image_sizes: Tensor) -> Tensor:
    """image_sizes (B, 2) int64, height and width in pixels before the batch's padding -> width and height (B, 2),
    rounded up to STRIDE: an image of its own would be padded to that."""
    return torch.ceil(image_sizes.flip(1) / STRIDE) * STRIDE


@dataclass(frozen=True)
class PriorGenerator:
    """Makes the priors of a pyramid.

    strides: of the levels, pixels. offset: of the priors' centres in their cells, in strides: 0.5, the middle (FCOS);
    0, the corner (MMDetection's anchors). scales: sides of the anchors, in strides; none: points. ratios: heights over
    widths of anchors of one area; anchors run through the scales of one ratio before the next ratio.
    whole: anchors of whole pixels as torchvision's, sides rounded down, then corners to the nearest.
    """

    strides: tuple[int, ...]
    offset: float = 0.0
    scales: tuple[float, ...] = ()
    ratios: tuple[float, ...] = (1.0,)
    whole: bool = False
    base: tuple[tuple[tuple[float, ...], ...], ...] = field(init=False, repr=False)  # a level's anchors round (0, 0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", tuple(self._base_anchors(stride) for stride in self.strides))

    @property
    def per_cell(self) -> int:
        return len(self.scales) * len(self.ratios) or 1

    def __call__(self, map_sizes: MapSizes, device: torch.device) -> Priors:
        """map_sizes: (height, width) a level. The tensors are cached and must not be changed in place."""
        return _make(self, map_sizes, device)

    def _base_anchors(self, stride: int) -> tuple[tuple[float, ...], ...]:
        if not self.scales:
            return ((0.0, 0.0, 0.0, 0.0),)
        # float32 throughout, as in the references; also while a net is built on the meta device.
        heights = torch.tensor(self.ratios, device="cpu").sqrt()
        sides = torch.tensor(self.scales, device="cpu") * stride
        if self.whole:
            sides = sides.floor()
        width, height = ((ratio[:, None] * sides).flatten() for ratio in (1 / heights, heights))
        anchors = torch.stack([-width, -height, width, height], dim=1) / 2
        return tuple(map(tuple, (anchors.round() if self.whole else anchors).tolist()))


@cached_unless_compiling
def _make(generator: PriorGenerator, map_sizes: MapSizes, device: torch.device) -> Priors:
    boxes, centers, strides, starts, count = [], [], [], [], 0
    for (height, width), stride, base in zip(map_sizes, generator.strides, generator.base, strict=True):
        y = (torch.arange(height, dtype=torch.float32, device=device) + generator.offset) * stride
        x = (torch.arange(width, dtype=torch.float32, device=device) + generator.offset) * stride
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        points = torch.stack([grid_x.flatten(), grid_y.flatten()], dim=1).repeat_interleave(len(base), 0)
        around = torch.stack([vector(anchor, device) for anchor in base]).repeat(height * width, 1)
        centers.append(points)
        boxes.append(points.repeat(1, 2) + around)
        strides.append(torch.full((height * width * len(base),), float(stride), device=device))
        starts.append(count)
        count += height * width * len(base)
    grid = LevelGrid(
        map_sizes,
        generator.strides,
        generator.offset,
        generator.per_cell,
        vector([float(stride) for stride in generator.strides], device),
        vector([height for height, _ in map_sizes], device),
        vector([width for _, width in map_sizes], device),
        vector(starts, device),
    )
    return Priors(torch.cat(boxes), torch.cat(centers), torch.cat(strides), grid)


def vector(values: Sequence[int] | Sequence[float], device: torch.device) -> Tensor:
    """Numbers as a tensor (V,), filled on the device: torch.tensor(values) would be a host sync on a GPU."""
    return torch.stack([torch.full((), value, device=device) for value in values])
