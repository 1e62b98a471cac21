"""P1: FCOS's label assignment against torchvision's, 22,400 points and 60 or 7 boxes in each of two images.

    python -m benchmarks.fcos_assignment

torchvision's points lie at the corners of their cells, so ours do here (point_offset 0). Its anchors are made here with
the levels' true strides: its own AnchorGenerator divides the image by the map, which gives 61 instead of 64 pixels
where the image is no multiple of 64.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torchvision.models.detection.fcos import FCOS

from benchmarks.compare import Row, faster, interleaved, run
from benchmarks.scenes import IMAGE, STRIDES, ground_truth, map_sizes
from msil.detection import Target
from msil.detection.assign import FCOSAssigner
from msil.detection.assign import ground_truth as padded
from msil.detection.priors import PriorGenerator, Priors

RANGES = ((-1.0, 64.0), (64.0, 128.0), (128.0, 256.0), (256.0, 512.0), (512.0, 1e8))
GOALS = {60: 60, 7: 10}
CPU = torch.device("cpu")


def points() -> Priors:
    return PriorGenerator(STRIDES)(map_sizes(), CPU)


def ours(targets: list[Target]) -> Tensor:
    truth = padded(targets, [IMAGE] * len(targets), CPU)
    return FCOSAssigner(RANGES, center_sample_radius=1.5)(points(), truth).index


class TorchvisionAssignment:
    """torchvision's FCOS.compute_loss up to the indices that it hands to the head's loss."""

    def __init__(self, images: int) -> None:
        self.net = mock.Mock(center_sampling_radius=1.5)
        self.net.head.compute_loss = lambda targets, outputs, anchors, matched: torch.stack(matched)
        self.anchors, self.levels = anchors(images)

    def __call__(self, targets: list[dict[str, Tensor]]) -> Any:
        return FCOS.compute_loss(self.net, targets, {}, self.anchors, self.levels)  # pyright: ignore


def anchors(images: int) -> tuple[list[Tensor], list[int]]:
    """torchvision's anchors of each image (P, 4), one a point, of the size of its stride; and the points a level."""
    centers, half = points().centers, points().strides[:, None] / 2
    boxes = torch.cat([centers - half, centers + half], dim=1)
    return [boxes] * images, [height * width for height, width in map_sizes()]


def as_dicts(targets: list[Target]) -> list[dict[str, Tensor]]:
    return [{"boxes": target.boxes, "labels": target.labels} for target in targets]


def measure() -> Iterator[Row]:
    theirs = TorchvisionAssignment(images=2)
    for boxes, goal in GOALS.items():
        targets = ground_truth(images=2, boxes=boxes)
        dicts = as_dicts(targets)
        found, expected = ours(targets), theirs(dicts)
        differing = int((found != expected).sum())
        positive = int((expected >= 0).sum())
        assert differing == 0, f"{differing} indices differ"
        seconds = interleaved({"ours": partial(ours, targets), "anchor": partial(theirs, dicts)}, calls=10)
        yield faster(
            f"P1 FCOS assignment, 2 x {boxes} boxes", seconds["ours"], seconds["anchor"], goal,
            f"0 of {found.numel():,} indices differ ({positive} positive)",
        )  # fmt: skip


if __name__ == "__main__":
    run(measure, __doc__)
