"""Boxes against MMDetection's numbers and hand arithmetic."""

from __future__ import annotations

import pytest
import torch

from msil.detection.structures import (
    aligned_giou,
    aligned_iou,
    clip_boxes,
    edges,
    pairwise_iou,
)


def test_boxes_are_clipped_to_the_image_they_belong_to() -> None:
    boxes = torch.tensor([[-5.0, -6.0, 50.0, 60.0], [70.0, 80.0, 90.0, 95.0]]).expand(2, 2, 4)
    clipped = clip_boxes(boxes, torch.tensor([[40.0, 30.0], [100.0, 85.0]]))
    # image 0 is 30 wide and 40 high: the second box collapses into its corner
    assert clipped[0].tolist() == [[0, 0, 30, 40], [30, 40, 30, 40]]
    assert clipped[1].tolist() == [[0, 0, 50, 60], [70, 80, 85, 95]]


@pytest.mark.parametrize(
    ("name", "overlap"),
    [
        ("iou", pairwise_iou),
        ("iou", lambda boxes, others: aligned_iou(edges(boxes), edges(others))),
        ("giou", lambda boxes, others: aligned_giou(edges(boxes), edges(others))),
    ],
)
def test_overlaps_of_the_reference(golden, name: str, overlap) -> None:
    case = golden("primitives")
    boxes, others = case["box_in/pred"], case["box_in/target"]  # disjoint, empty and equal ones among them
    torch.testing.assert_close(overlap(boxes, others), case[f"overlaps/{name}_aligned"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(overlap(boxes[:20, None], others[:9]), case[f"overlaps/{name}"], rtol=1e-5, atol=1e-6)
