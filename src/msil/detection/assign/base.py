"""Ground truth as tensors, and what an assigner gives back. Fixed shapes, no host synchronisation."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from msil.detection.priors import Priors
from msil.detection.structures import Target, sizes_tensor, to_device

BACKGROUND, IGNORED = -1, -2
LOW_BITS = 0xFFFFFFFF


class GroundTruth(NamedTuple):
    """The ground truth of a batch as tensors of one device. B images, G padded boxes an image.

    boxes (B, G, 4) float32, labels (B, G) int64, -1 for padding. sizes (B, 2) int64: height, width of the
    images before the batch's padding, pixels.
    """

    boxes: Tensor
    labels: Tensor
    sizes: Tensor


class Match(NamedTuple):
    """Which box each prior learns.

    index (B, P) int64: a box in [0, G), BACKGROUND or IGNORED. metric (B, P) float32 in [0, 1]: how well a positive
    prior is aligned with its box, 0 elsewhere; None for assigners without such a measure. most: no image has more
    positives, by the assigner's rule; None if it sets no limit.
    """

    index: Tensor
    metric: Tensor | None = None
    most: int | None = None


class Assigner(Protocol):
    def __call__(self, priors: Priors, truth: GroundTruth) -> Match: ...


def ground_truth(targets: list[Target], image_sizes: list[tuple[int, int]], device: torch.device) -> GroundTruth:
    """B targets and as many (height, width) -> GroundTruth on `device`; from the host by one asynchronous copy each.

    Labels are not compared with the number of classes, which would synchronise with a GPU: the readers check them.

    G is 8, 16, 32, 64, 128 or a multiple of 128: few different shapes, so that compiled or captured graphs are reused.
    """
    most = max(len(target.labels) for target in targets)
    slots = next((size for size in (8, 16, 32, 64) if most <= size), 128 * math.ceil(most / 128))
    boxes = torch.stack([F.pad(t.boxes.float(), (0, 0, 0, slots - len(t.labels))) for t in targets])
    labels = torch.stack([F.pad(t.labels, (0, slots - len(t.labels)), value=-1) for t in targets])
    return GroundTruth(to_device(boxes, device), to_device(labels, device), sizes_tensor(image_sizes, device))


def ordered_key(values: Tensor, rank: Tensor) -> Tensor:
    """int64 keys that sort by non-negative float32 values (...), then by rank (...) int64 in [0, 2^32).

    The bits of a non-negative float sort as the float does; minima and maxima of integers do not depend on the order
    in which they are written.
    """
    return values.view(torch.int32).long() << 32 | rank


def low_bits(keys: Tensor) -> Tensor:
    """The lower 32 bits (...) of int64 keys as signed numbers."""
    return keys.to(torch.int32).long()


def best_box(index: Tensor, claimed: Tensor, iou: Tensor, count: int) -> Tensor:
    """The box of highest IoU of every prior that several boxes claim, of equal ones the first.

    index (B, G, ...): priors in [0, count). claimed (B, G, ...) bool: whether the box claims that prior; the others had
    better not be one and the same, for each is written to. iou (B, G, ...) in [0, 1].
    Returns (B, count) int64: a box in [0, G), or BACKGROUND.
    """
    slots = index.shape[1]
    # One integer maximum decides by IoU, then for the first box, whose complement is the largest.
    complement = torch.arange(LOW_BITS, LOW_BITS - slots, -1, device=index.device)
    key = ordered_key(iou, complement.view(slots, *[1] * (index.dim() - 2)))
    best = torch.zeros((len(index), count), dtype=torch.int64, device=index.device)
    best.scatter_reduce_(1, index.flatten(1), torch.where(claimed, key, 0).flatten(1), "amax")
    return ~low_bits(best)  # -1 where none was claimed


def cross_iou(sides: Tensor, gt_boxes: Tensor) -> Tensor:
    """IoU of every box by its sides (B, 4, 1, P) with every one of gt_boxes (B, G, 4) -> (B, G, P), the union clamped
    to >= 1e-6; operation by operation as MMDetection's, so that the same numbers are equal."""
    (x1, y1, x2, y2), (left, top, right, bottom) = sides.unbind(1), gt_boxes[..., None].unbind(2)
    overlap = torch.minimum(x2, right).sub_(torch.maximum(x1, left)).clamp_(min=0)
    overlap *= torch.minimum(y2, bottom).sub_(torch.maximum(y1, top)).clamp_(min=0)
    union = ((x2 - x1) * (y2 - y1) + (right - left) * (bottom - top)).sub_(overlap)
    return overlap.div_(union.clamp_(min=1e-6))


def require_one_prior_a_cell(name: str, priors: Priors) -> None:
    if priors.grid.per_cell != 1:
        raise ValueError(f"{name} needs one prior a cell, not {priors.grid.per_cell}.")
