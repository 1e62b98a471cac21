"""FCOS assignment against MMDetection's numbers and against a dense reference written here from its rules."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from msil.detection.assign import ATSSAssigner, FCOSAssigner, ground_truth
from msil.detection.priors import PriorGenerator
from msil.detection.structures import Target, boxes_to_distances

from .cases import MAP_SIZES, RANGES, STRIDES, map_sizes_of, random_boxes, target

CPU = torch.device("cpu")


def assign(
    targets: list[Target],
    map_sizes: tuple[tuple[int, int], ...],
    radius: float | None,
    strides: tuple[int, ...] = STRIDES,
    ranges: tuple[tuple[float, float], ...] = RANGES,
) -> Tensor:
    priors = PriorGenerator(strides, offset=0.5)(map_sizes, CPU)
    # The images' own sizes do not matter: no point is ignored.
    return FCOSAssigner(ranges, radius)(priors, ground_truth(targets, [(1, 1)] * len(targets), CPU)).index


def dense_assign(
    boxes: Tensor,
    map_sizes: tuple[tuple[int, int], ...],
    radius: float | None,
    strides: tuple[int, ...] = STRIDES,
    ranges: tuple[tuple[float, float], ...] = RANGES,
) -> Tensor:
    """Every point against every box of one image, box after box: a later box wins only by a smaller area."""
    x, y, stride, low, high = (
        torch.cat(columns)
        for columns in zip(
            *(
                (
                    ((torch.arange(w) + 0.5) * s).repeat(h),
                    ((torch.arange(h) + 0.5) * s).repeat_interleave(w),
                    torch.full((h * w,), float(s)),
                    torch.full((h * w,), lo),
                    torch.full((h * w,), hi),
                )
                for (h, w), s, (lo, hi) in zip(map_sizes, strides, ranges, strict=True)
            ),
            strict=True,
        )
    )
    best = torch.full_like(x, -1, dtype=torch.int64)
    best_area = torch.full_like(x, 1e8)
    for index, (x1, y1, x2, y2) in enumerate(boxes.unbind()):
        distances = torch.stack([x - x1, y - y1, x2 - x, y2 - y])
        if radius is None:
            inside = distances.amin(0) > 0
        else:
            centre_x, centre_y, reach = (x1 + x2) / 2, (y1 + y2) / 2, radius * stride
            left, top = torch.maximum(centre_x - reach, x1), torch.maximum(centre_y - reach, y1)
            right, bottom = torch.minimum(centre_x + reach, x2), torch.minimum(centre_y + reach, y2)
            inside = torch.stack([x - left, y - top, right - x, bottom - y]).amin(0) > 0
        largest = distances.amax(0)
        area = (x2 - x1) * (y2 - y1)
        wins = inside & (low <= largest) & (largest <= high) & (area < best_area)
        best = torch.where(wins, index, best)
        best_area = torch.where(wins, area, best_area)
    return best


GEOMETRIES = {
    "published": (STRIDES, RANGES),
    "three levels, ranges that overlap and leave gaps": ((4, 8, 16), ((0.0, 24.0), (16.0, 50.0), (60.0, 1e8))),
    "strides that are no powers of two": ((6, 10, 50), ((-1.0, 33.0), (33.0, 90.5), (90.5, 1e8))),
    "all levels bounded": ((8, 16), ((-1.0, 20.0), (20.0, 70.0))),
}


@pytest.mark.parametrize("radius", [None, 1.0, 1.5])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_equals_the_dense_reference(geometry: str, radius: float | None) -> None:
    strides, ranges = GEOMETRIES[geometry]
    rng = random.Random(f"{geometry} {radius}")
    positives = 0
    for case in range(15):
        height, width = rng.randint(20, 330), rng.randint(20, 330)
        map_sizes = map_sizes_of(height, width, strides)
        grain = (0, 0.25, 4.0)[case % 3]  # 4: sides and centres on grid lines, distances on the ends of a range
        images = [
            random_boxes(rng, count, height, width, grain, broken=True)
            for count in (rng.randint(0, 9), rng.randint(5, 30))
        ]
        matched = assign([target(boxes) for boxes in images], map_sizes, radius, strides, ranges)
        for boxes, got in zip(images, matched, strict=True):
            assert torch.equal(got, dense_assign(boxes, map_sizes, radius, strides, ranges))
        positives += int((matched >= 0).sum())
    assert positives > 150


def test_areas_of_1e8_and_more_stay_background() -> None:
    assert (assign([target([-5000, -5000, 5000, 5000])], ((2, 2),), None, (8,), ((-1.0, 1e8),)) == -1).all()
    assert (assign([target([-4999, -5000, 5000, 5000])], ((2, 2),), None, (8,), ((-1.0, 1e8),)) == 0).all()


@pytest.mark.parametrize(
    ("counts", "slots"),
    [((0,), 8), ((8, 0), 8), ((9,), 16), ((17, 3), 32), ((33,), 64), ((65,), 128), ((128,), 128), ((129, 1), 256)],
)
def test_padding(counts: tuple[int, ...], slots: int) -> None:
    targets = [target(torch.rand(count, 4), torch.arange(count)) for count in counts]
    boxes, labels, _ = ground_truth(targets, [(1, 1)] * len(targets), CPU)
    assert boxes.shape == (len(counts), slots, 4) and boxes.dtype == torch.float32
    assert labels.shape == (len(counts), slots) and labels.dtype == torch.int64
    for image, (one, count) in enumerate(zip(targets, counts, strict=True)):
        assert torch.equal(boxes[image, :count], one.boxes)
        assert torch.equal(labels[image, :count], one.labels)
        assert (labels[image, count:] == -1).all()


@pytest.mark.parametrize(("form", "radius"), [("plain", None), ("center", 1.5), ("center_norm", 1.5)])
def test_reference_edge_cases(golden, form: str, radius: float | None) -> None:
    """Points on box sides and on the ends of a range, equal areas, twins: labels and box targets of MMDetection."""
    case = golden("primitives", "fcos_edge/")
    boxes, labels = case["boxes"], case["labels"]
    matched = assign([target(boxes, labels)], MAP_SIZES, radius)[0]
    expected = torch.cat([case[f"{form}/labels/{level}"] for level in range(5)])
    positive = matched >= 0
    assert torch.equal(torch.where(positive, labels[matched.clamp(min=0)], 5), expected)
    priors = PriorGenerator(STRIDES, offset=0.5)(MAP_SIZES, CPU)
    distances = boxes_to_distances(priors.centers, boxes[matched.clamp(min=0)])
    if form == "center_norm":
        distances /= priors.strides[:, None]
    reference = torch.cat([case[f"{form}/bbox_targets/{level}"] for level in range(5)])
    torch.testing.assert_close(distances[positive], reference[positive], rtol=0, atol=1e-4)


def test_several_priors_a_cell_are_refused() -> None:
    """They would be assigned as if they were neighbouring points."""
    truth = ground_truth([target([0, 0, 8, 8])], [(16, 16)], CPU)
    priors = PriorGenerator((8,), scales=(1.0, 2.0))(((2, 2),), CPU)
    for assigner in (FCOSAssigner(((-1.0, 64.0),)), ATSSAssigner()):
        with pytest.raises(ValueError, match="needs one prior a cell, not 2"):
            assigner(priors, truth)
