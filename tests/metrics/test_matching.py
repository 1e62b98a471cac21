from __future__ import annotations

import pytest

from msil.metrics.matching import COCO_AREAS, match_coco, match_voc

from .cases import make


def test_coco_by_hand() -> None:
    # One class, objects of 100 x 100 (medium) in image 0 and 10 x 10 (small) in image 1, a crowd in image 0.
    truths = [(0, 0, [0, 0, 100, 100]), (1, 0, [0, 0, 10, 10]), (0, 0, [200, 200, 100, 100])]
    found = [
        (0, 0, [0.0, 0, 100, 62], 0.5),  # IoU 0.62: right at 0.5, 0.55, 0.6; 6200 px^2: medium
        (0, 0, [0.0, 0, 100, 100], 0.25),  # IoU 1: the object of the better score's only above 0.6
        (0, 0, [210.0, 210, 220, 220], 0.75),  # inside the crowd: ignored; 100 px^2: small
        (1, 0, [50.0, 50, 150, 150], 0.75),  # on nothing, 10000 px^2: large (above 96^2 = 9216)
        (1, 0, [0.0, 0, 10, 10], 0.125),  # IoU 1, small
    ]
    matches = match_coco(make(truths, found, images=2, classes=1, ignored=[2]))
    (one,) = matches.classes
    # By score; of the equal ones at 0.75 image 0 first.
    assert one.images.tolist() == [0, 1, 0, 0, 1]
    every = COCO_AREAS.index("all")
    for iou, (hits, ignored) in enumerate(zip(one.hits[every], one.ignored[every], strict=True)):
        first = iou < 3
        assert hits.tolist() == [False, False, first, not first, True]
        assert ignored.tolist() == [True, False, False, False, False]
    # Small: what is not small and matches nothing small is ignored, as is a match with the medium object.
    small = COCO_AREAS.index("small")
    assert one.hits[small, 0].tolist() == [False, False, False, False, True]
    assert one.ignored[small, 0].tolist() == [True, True, True, True, False]
    # Objects that count: 100 x 100 = 10000 px^2 is large, 10 x 10 is small.
    assert one.truths.tolist() == [[1, 1], [0, 1], [0, 0], [1, 0]]


@pytest.mark.parametrize("match", [match_coco, match_voc])
def test_nothing_to_match(match) -> None:
    for record in (make([], [], images=2), make([], [], images=0)):
        matches = match(record)
        assert matches.images == len(record.image_ids)
        for one in matches.classes:
            assert one.images.shape == (0,) and not one.truths.any()
            assert one.truths.shape == (len(matches.areas), matches.images)
            assert one.hits.shape == one.ignored.shape == (len(matches.areas), len(matches.ious), 0)


def test_voc_by_hand() -> None:
    truths = [(0, 0, [0, 0, 10, 10]), (0, 0, [20, 0, 10, 10]), (1, 0, [0, 0, 10, 10]), (0, 1, [0, 0, 10, 10])]
    found = [
        (0, 0, [0.0, 0, 10, 10], 0.5),  # right
        (0, 0, [0.0, 0, 10, 9], 0.75),  # IoU 0.9 and the better score: right, and the one above a second one
        (0, 0, [20.0, 0, 30, 10], 0.25),  # on the difficult one: ignored
        (0, 0, [20.0, 0, 30, 6], 0.125),  # again: a difficult one may be found often
        (1, 0, [0.0, 0, 10, 5], 0.75),  # IoU 0.5 exactly: right
        (1, 1, [0.0, 0, 10, 10], 0.5),  # of the other class
    ]
    matches = match_voc(make(truths, found, images=2, ignored=[1]))
    first, second = matches.classes
    assert first.images.tolist() == [0, 1, 0, 0, 0]  # 0.75 of image 0, then of image 1, 0.5, 0.25, 0.125
    assert first.hits[0, 0].tolist() == [True, True, False, False, False]
    assert first.ignored[0, 0].tolist() == [False, False, False, True, True]
    assert first.truths.tolist() == [[1, 1]]
    assert second.hits[0, 0].tolist() == [False]
    assert second.truths.tolist() == [[1, 0]]
