"""Box coders: what the regression branch predicts for a prior, and the box that it stands for.

Every coder has `channels`, numbers a prior; decode(priors, raw) -> boxes (..., 4), x1 y1 x2 y2 in pixels; and
encode(priors, boxes) -> what the regression learns (..., 4). raw (..., channels), boxes (..., 4) and the fields of
`priors` broadcast against each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from msil.detection.priors import Priors
from msil.detection.structures import boxes_to_distances, distances_to_boxes


class BoxCoder(Protocol):
    @property
    def channels(self) -> int: ...

    def decode(self, priors: Priors, raw: Tensor) -> Tensor: ...

    def encode(self, priors: Priors, boxes: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Distances:
    """Left, top, right, bottom from the prior's centre to the box's sides, in pixels or, `by_stride`, in strides."""

    by_stride: bool = False
    channels = 4

    def decode(self, priors: Priors, raw: Tensor) -> Tensor:
        return distances_to_boxes(priors.centers, raw * priors.strides[..., None] if self.by_stride else raw)

    def encode(self, priors: Priors, boxes: Tensor) -> Tensor:
        distances = boxes_to_distances(priors.centers, boxes)
        return distances / priors.strides[..., None] if self.by_stride else distances


@dataclass(frozen=True)
class Deltas:
    """dx, dy, dw, dh to the anchor (Girshick et al., arXiv 1311.2524).

    dx, dy: of the centres, over the anchor's sides. dw, dh: logarithms of the sides' ratios, clamped to +-log(1000/16)
    when decoded. stds: what the first two and the last two are divided by.
    """

    stds: tuple[float, float] = (1.0, 1.0)
    channels = 4

    def decode(self, priors: Priors, raw: Tensor) -> Tensor:
        center, side = _center_and_side(priors.boxes)
        shift, growth = raw[..., :2] * self.stds[0], raw[..., 2:] * self.stds[1]
        limit = math.log(1000 / 16)
        center, side = center + side * shift, side * growth.clamp(-limit, limit).exp()
        return torch.cat([center - side * 0.5, center + side * 0.5], dim=-1)

    def encode(self, priors: Priors, boxes: Tensor) -> Tensor:
        center, side = _center_and_side(priors.boxes)
        box_center, box_side = _center_and_side(boxes)
        shift, growth = (box_center - center) / side, (box_side / side).log()
        return torch.cat([shift / self.stds[0], growth / self.stds[1]], dim=-1)


@dataclass(frozen=True)
class Integral:
    """Each side's distance in strides as the mean of a distribution over 0 ... reg_max (arXiv 2006.04388).

    raw: the four sides' logits, reg_max + 1 each.
    """

    reg_max: int = 16

    @property
    def channels(self) -> int:
        return 4 * (self.reg_max + 1)

    def distances(self, raw: Tensor) -> Tensor:
        """Logits (..., channels) -> left, top, right, bottom (..., 4) in strides."""
        share = raw.unflatten(-1, (4, -1)).softmax(-1)
        # Not a matrix product, which autocast would compute in half precision.
        return (share * torch.arange(self.reg_max + 1, dtype=share.dtype, device=share.device)).sum(-1)

    def decode(self, priors: Priors, raw: Tensor) -> Tensor:
        return distances_to_boxes(priors.centers, self.distances(raw) * priors.strides[..., None])

    def encode(self, priors: Priors, boxes: Tensor) -> Tensor:
        """Distances in strides, not yet limited to the distribution's range."""
        return boxes_to_distances(priors.centers, boxes) / priors.strides[..., None]


@dataclass(frozen=True)
class Corners:
    """x1, y1, x2, y2 of the box itself in strides."""

    channels = 4

    def decode(self, priors: Priors, raw: Tensor) -> Tensor:
        return raw * priors.strides[..., None]

    def encode(self, priors: Priors, boxes: Tensor) -> Tensor:
        return boxes / priors.strides[..., None]


def _center_and_side(boxes: Tensor) -> tuple[Tensor, Tensor]:
    low, high = boxes[..., :2], boxes[..., 2:]
    return (low + high) * 0.5, high - low
