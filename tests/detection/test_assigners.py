"""RetinaNet's and TOOD's assignment against dense references written here from the rules; against MMDetection's numbers
in test_golden_heads.

ATSS has its own file.
"""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor
from torchvision.ops import box_iou

from msil.detection.assign import GroundTruth, MaxIoUAssigner, TaskAlignedAssigner, ground_truth
from msil.detection.assign.base import BACKGROUND, IGNORED
from msil.detection.heads.retinanet import RATIOS, SCALES
from msil.detection.priors import PriorGenerator, Priors

from .cases import map_sizes_of, random_boxes, target

CPU = torch.device("cpu")
FINE = (8, 16, 32)
NINE = PriorGenerator(FINE, scales=SCALES, ratios=RATIOS, whole=True)
ONE = PriorGenerator(FINE, scales=(8.0,))


def valid_priors(map_sizes: tuple[tuple[int, int], ...], size: tuple[int, int], per_cell: int) -> Tensor:
    """The cells of an image's own size, rounded up to 32, and not of the batch's padding (P,)."""
    cells = [
        row * stride < 32 * math.ceil(size[0] / 32) and column * stride < 32 * math.ceil(size[1] / 32)
        for (height, width), stride in zip(map_sizes, FINE, strict=True)
        for row in range(height)
        for column in range(width)
    ]
    return torch.tensor(cells).repeat_interleave(per_cell)


def max_iou(anchors: Tensor, valid: Tensor, boxes: Tensor) -> Tensor:
    """One image's assignment (P,), box by box."""
    match = torch.where(valid, BACKGROUND, IGNORED)
    # Of whole pixels, so that areas are exact and this is what float32 gives, ties included.
    ious = box_iou(boxes.double(), anchors.double()).float()
    best, owner = torch.zeros(len(anchors)), torch.zeros(len(anchors), dtype=torch.int64)
    for number, iou in enumerate(ious):
        owner[iou > best], best = number, torch.maximum(best, iou)
    match[valid & (best >= 0.4)] = IGNORED
    match[valid & (best >= 0.5)] = owner[valid & (best >= 0.5)]
    for number, iou in enumerate(ious):  # a later box takes from an earlier one
        match[valid & (iou == iou[valid].max())] = number
    return match


def task_aligned(
    points: Tensor, valid: Tensor, boxes: Tensor, labels: Tensor, scores: Tensor, predicted: Tensor, topk: int
) -> tuple[Tensor, Tensor, float]:
    """One image's assignment in float64, box by box and candidate by candidate: match (P,), metric (P,), and how far
    the closest decision was from falling otherwise."""
    match = torch.where(valid, BACKGROUND, IGNORED)
    metric, best, margin = torch.zeros(len(points)).double(), [0.0] * len(points), math.inf
    ious = box_iou(boxes.double(), predicted.double())
    alignments = scores.double().T[labels] * ious**6
    for number, (alignment, iou) in enumerate(zip(alignments, ious, strict=True)):
        order = alignment.where(valid, -1).argsort(descending=True)[: valid.sum()].tolist()
        if len(order) > topk and alignment[order[topk - 1]] > 0:
            margin = min(margin, float(1 - alignment[order[topk]] / alignment[order[topk - 1]]))
        for prior in order[:topk]:
            (x, y), (x1, y1, x2, y2) = points[prior].tolist(), boxes[number].tolist()
            inside = min(x - x1, y - y1, x2 - x, y2 - y)
            margin = min(margin, abs(inside - 0.01))
            if alignment[prior] > 0 and inside > 0.01:
                margin = min(margin, float(alignment[prior]) * 1e30)  # float32 would make it 0
                if match[prior] >= 0 and iou[prior] != best[prior]:
                    margin = min(margin, abs(float(iou[prior]) / best[prior] - 1))
                if match[prior] < 0 or iou[prior] > best[prior]:
                    match[prior], best[prior] = number, float(iou[prior])
    for number in range(len(boxes)):
        own = match == number
        if own.any():
            alignment = alignments[number, own]
            metric[own] = alignment / (alignment.max() + 1e-7) * ious[number, own].max()
    return match, metric.float(), margin


def batch_of(rng: random.Random, grain: float) -> tuple[tuple[tuple[int, int], ...], GroundTruth, list]:
    """Three images of one batch: their map sizes, ground truth and targets."""
    sizes = [(rng.randint(1, 128), rng.randint(1, 128)) for _ in range(3)]
    height, width = (32 * math.ceil(max(sides) / 32) for sides in zip(*sizes, strict=True))
    targets = []
    for size in sizes:
        boxes = random_boxes(rng, rng.choice([0, 1, 2, 5, 10]), *size, grain)
        targets.append(target(boxes, torch.tensor([rng.randrange(3) for _ in boxes], dtype=torch.int64)))
    return map_sizes_of(height, width, FINE), ground_truth(targets, sizes, CPU), targets


def test_max_iou_of_random_boxes() -> None:
    rng = random.Random(0)
    seen = torch.zeros(3, dtype=torch.int64)
    for case in range(40):
        map_sizes, truth, targets = batch_of(rng, rng.choice([1, 4, 8, 16]))
        priors = NINE(map_sizes, CPU)
        found = MaxIoUAssigner()(priors, truth)
        assert found.metric is None
        for match, one, size in zip(found.index, targets, truth.sizes.tolist(), strict=True):
            expected = max_iou(priors.boxes, valid_priors(map_sizes, size, 9), one.boxes)
            assert torch.equal(match, expected), case
            seen += torch.stack([(match >= 0).sum(), (match == BACKGROUND).sum(), (match == IGNORED).sum()])
    assert seen.min() > 4_000


def test_task_aligned_of_random_predictions() -> None:
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    compared = positives = 0
    for case in range(80):
        map_sizes, truth, targets = batch_of(rng, 0.37)
        priors = ONE(map_sizes, CPU)
        scores = torch.rand(3, len(priors.centers), 3, generator=generator)
        scores[scores < 0.5] = 0  # on small maps some of these are among the best too
        reach = 48 * torch.rand(3, len(priors.centers), 4, generator=generator)
        predicted = priors.centers.repeat(1, 2) + reach * torch.tensor([-1, -1, 1, 1])
        topk = rng.choice([1, 3, 13])
        found = TaskAlignedAssigner(topk)(priors, truth, scores.logit(), predicted)
        assert found.metric is not None
        for image, (one, size) in enumerate(zip(targets, truth.sizes.tolist(), strict=True)):
            valid = valid_priors(map_sizes, size, 1)
            own = one.boxes, one.labels, scores[image], predicted[image]
            match, metric, margin = task_aligned(priors.centers, valid, *own, topk)
            if margin > 1e-5:
                assert torch.equal(found.index[image], match), case
                torch.testing.assert_close(found.metric[image], metric, rtol=1e-5, atol=1e-6)
                compared, positives = compared + 1, positives + int((match >= 0).sum())
    assert compared > 230 and positives > 400


def matched(boxes: list, priors: Priors, size: tuple[int, int]) -> list[int]:
    return MaxIoUAssigner()(priors, ground_truth([target(boxes)], [size], CPU)).index[0].tolist()


def test_a_box_that_meets_no_anchor_claims_all() -> None:
    # four anchors of 16 x 16 around (0, 0), (8, 0), (0, 8), (8, 8); the first box is the last anchor, of IoU 1 / 3 with
    # the two in the middle and 1 / 7 with the first
    priors = PriorGenerator((8,), scales=(2.0,))(((2, 2),), CPU)
    own, far = [0, 0, 16, 16], [500, 500, 510, 510]
    assert matched([own], priors, (16, 16)) == [BACKGROUND] * 3 + [0]
    assert matched([own, far], priors, (16, 16)) == [1] * 4
    assert matched([far, own], priors, (16, 16)) == [0] * 3 + [1]
    # but none of the batch's padding
    priors = PriorGenerator((32,), scales=(2.0,))(((1, 2),), CPU)
    assert matched([far], priors, (32, 32)) == [0, IGNORED]
