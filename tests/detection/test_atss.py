"""ATSS assignment against a dense reference written here from its rules; against MMDetection's numbers in
test_golden_heads."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from msil.detection.assign import ATSSAssigner, GroundTruth, ground_truth
from msil.detection.assign.base import BACKGROUND, IGNORED
from msil.detection.priors import PriorGenerator

from .cases import STRIDES, map_sizes_of, random_boxes, target

CPU = torch.device("cpu")


def run_atss(
    boxes: Tensor,
    labels: Tensor,
    map_sizes: tuple[tuple[int, int], ...],
    image_sizes: list[tuple[int, int]],
    strides: tuple[int, ...] = STRIDES,
    topk: int = 9,
) -> Tensor:
    priors = PriorGenerator(strides, scales=(8.0,))(map_sizes, CPU)
    return ATSSAssigner(topk)(priors, GroundTruth(boxes, labels, torch.tensor(image_sizes))).index


def round_up(side: int) -> int:
    return math.ceil(side / 32) * 32


class DenseATSS:
    """One image's assignment from the rules, all valid anchors against all boxes, in float64.

    matched: (P,). margin: how far the closest decision was from falling otherwise, relative (inside: pixels / 100);
    infinite between boxes that are exactly equal, for which there is a rule. distance_margin: the same of the ninth
    and the tenth candidate, where the rule for equal ones is the upper, then the left one.
    """

    def __init__(
        self,
        boxes: Tensor,
        labels: Tensor,
        map_sizes: tuple[tuple[int, int], ...],
        image_size: tuple[int, int],
        strides: tuple[int, ...],
        topk: int,
    ) -> None:
        boxes = boxes.double()
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        self.margin = self.distance_margin = math.inf
        ious, candidates, insides, ignored = [], [], [], []
        for (height, width), stride in zip(map_sizes, strides, strict=True):
            valid = valid_cells(height, width, stride, image_size).flatten()
            ignored.append(~valid)
            rows = torch.arange(height).repeat_interleave(width)
            columns = torch.arange(width).repeat(height)
            points = torch.stack([columns, rows], 1).double() * stride
            anchors = torch.cat([points - 4 * stride, points + 4 * stride], 1)
            ious.append(box_iou(boxes, anchors))
            insides.append(torch.cat([points - boxes[:, None, :2], boxes[:, None, 2:] - points], -1).amin(-1))
            distance = (points - centres[:, None]).square().sum(-1)
            distance[:, ~valid] = math.inf
            order = distance.argsort(dim=1, stable=True)  # points run row by row: the upper, then the left comes first
            count = min(topk, int(valid.sum()))
            candidate = torch.zeros_like(distance, dtype=torch.bool).scatter_(1, order[:, :count], True)
            candidates.append(candidate)
            if count < valid.sum():
                nearest = distance.gather(1, order)
                gap = (nearest[:, count] - nearest[:, count - 1]) / nearest[:, count]
                self.distance_margin = min([self.distance_margin, *gap[labels >= 0].tolist()])
        iou, candidate, inside = torch.cat(ious, 1), torch.cat(candidates, 1), torch.cat(insides, 1)
        self.matched = torch.where(torch.cat(ignored), IGNORED, BACKGROUND)
        best = torch.zeros(iou.shape[1], dtype=torch.float64)
        for index in (labels >= 0).nonzero().flatten().tolist():  # a later box wins only by a larger IoU
            values = iou[index, candidate[index]]
            threshold = values.mean() + values.std()
            self._note((values / threshold - 1).abs())
            self._note((inside[index, candidate[index]] - 0.01).abs() / 100)
            positive = candidate[index] & (inside[index] > 0.01) & (iou[index] >= threshold)
            contested = positive & (self.matched >= 0) & (iou[index] != best)
            self._note((iou[index] / best - 1).abs()[contested])
            wins = positive & ((self.matched < 0) | (iou[index] > best))
            self.matched[wins], best[wins] = index, iou[index, wins]

    def _note(self, gaps: Tensor) -> None:
        self.margin = min([self.margin, *gaps[~gaps.isnan()].tolist()])


def valid_cells(height: int, width: int, stride: int, image_size: tuple[int, int]) -> Tensor:
    rows, columns = (math.ceil(round_up(side) / stride) for side in image_size)
    return (torch.arange(height) < rows)[:, None] & (torch.arange(width) < columns)


ATSS_GEOMETRIES = {
    "published": STRIDES,
    "strides that are no powers of two": (6, 10, 50),
    "one level more": (8, 16, 32, 64, 128, 256),
    "two fine levels": (4, 8),
}


@pytest.mark.parametrize("grain", [0, 4.0], ids=["no ties", "ties"])
@pytest.mark.parametrize("geometry", ATSS_GEOMETRIES)
def test_atss_equals_the_dense_reference(geometry: str, grain: float) -> None:
    strides = ATSS_GEOMETRIES[geometry]
    rng = random.Random(f"{geometry} {grain}")
    compared = skipped = positives = ignored = 0
    for case in range(24):
        # long and flat, small, or ordinary images: maps of 1 x n, of 1 x 1 and of odd sizes
        low, high = (((5, 30), (100, 400)), ((5, 60), (5, 60)), ((40, 260), (40, 260)))[case % 3]
        sizes = [(rng.randint(*low), rng.randint(*high)) for _ in range(rng.randint(1, 3))]
        if case % 2:
            sizes = [(width, height) for height, width in sizes]
        padded = [round_up(max(side)) for side in zip(*sizes, strict=True)]
        map_sizes = map_sizes_of(padded[0], padded[1], strides)
        slots = rng.choice([1, 8, 25, 60])
        boxes = torch.zeros(len(sizes), slots, 4)
        labels = torch.full((len(sizes), slots), -1)
        for image, (height, width) in enumerate(sizes):
            count = rng.randint(0, slots)
            boxes[image, :count] = random_boxes(rng, count, height, width, grain)
            labels[image, :count] = torch.tensor([rng.choice([0, 1, 2, 3, -1]) for _ in range(count)])
        topk = rng.choice([9, 9, 1, 4, 12])
        matched = run_atss(boxes, labels, map_sizes, sizes, strides, topk)
        for image, size in enumerate(sizes):
            expected = DenseATSS(boxes[image], labels[image], map_sizes, size, strides, topk)
            if expected.margin < 1e-5 or (expected.distance_margin < 1e-5 and not grain):
                skipped += 1  # float32 may decide otherwise
                continue
            compared += 1
            positives += int((matched[image] >= 0).sum())
            ignored += int((matched[image] == IGNORED).sum())
            assert torch.equal(matched[image], expected.matched), (case, image)
    assert compared > 36 and skipped < compared / 5 and positives > 80 and ignored > 150


# Of a box around all its candidates on the coarsest of these levels every candidate there has the IoU 64^2 / area, and
# 1/4, 1/16, 1/64 of it on the others: with 0.41 for a box of 100 x 100, the mean is 0.136 and the deviation 0.166, so
# exactly the coarsest level's candidates are positive.
FINE = (1, 2, 4, 8)


def coarsest(matched: Tensor) -> list[tuple[int, int, int]]:
    """(row, column, box) of the positive points on the 16 x 16 points of the coarsest level."""
    level = matched[-256:].view(16, 16)
    assert (matched[:-256] == -1).all()
    return [(row, column, int(level[row, column])) for row, column in (level >= 0).nonzero().tolist()]


def test_of_equally_near_candidates_the_upper_then_the_left_one_counts() -> None:
    # Centre (60, 60), that is 7.5 cells on both axes: four points at (0.5, 0.5) cells, eight at (0.5, 1.5) for the
    # five places left: two above, then the row's outer two, then the left one of the row below.
    matched = run_atss(
        *ground_truth([target([10, 10, 110, 110])], [(128, 128)], CPU)[:2],
        map_sizes_of(128, 128, FINE),
        [(128, 128)],
        FINE,
    )
    cells = [(6, 7), (6, 8), (7, 6), (7, 7), (7, 8), (7, 9), (8, 6), (8, 7), (8, 8)]
    assert coarsest(matched[0]) == [(*cell, 0) for cell in cells]
