"""Candidate selection and suppression against torchvision's and cases worked out by hand; against MMDetection's numbers
in test_golden_heads."""

from __future__ import annotations

import pytest
import torch
from benchmarks.operators import HostSyncs
from torch import Tensor

from msil.detection import postprocess
from msil.detection.postprocess import batched_nms, detections_from_candidates, select_candidates, settled_nms

THRESHOLDS = {"nms_thresh": 0.6, "detections_per_img": 100}


def test_clipping_and_empty_boxes() -> None:
    boxes = torch.tensor([[
        [-10.0, -10, 20, 20],  # clipped
        [95.0, 10, 130, 40],  # clipped on the right: the image is 100 wide
        [120.0, 10, 150, 40],  # outside, so nothing is left of it
        [10.0, 30, 10, 60],  # no width
        [40.0, 60, 60, 40],  # upside down
    ]])  # fmt: skip
    scores, labels = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5]]), torch.arange(5)[None]
    (found,) = detections_from_candidates(boxes, scores, labels, [(200, 100)], **THRESHOLDS)
    assert found.boxes.tolist() == [[0, 0, 20, 20], [95, 10, 100, 40]]
    assert found.labels.tolist() == [0, 1]


def crowd(images: int, count: int, spread: float, classes: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes of about 40 px around points of a square `spread` wide: the smaller it is, the more they overlap."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(images, count, 2, generator=generator) * spread
    size = 30 + 20 * torch.rand(images, count, 2, generator=generator)
    scores = 0.05 + 0.9 * torch.rand(images, count, generator=generator)
    return torch.cat([corner, corner + size], -1), scores, torch.randint(classes, (images, count), generator=generator)


@pytest.mark.parametrize("sizes", [[600], [120, 30, 1]])
def test_the_selection_is_the_best_of_all_pairs(sizes: list[int]) -> None:
    """Against a sort of all pairs of each level; logits without ties, the limit above and below a level's points."""
    points = sum(sizes)
    logits = torch.randperm(2 * points * 7, generator=torch.Generator().manual_seed(1)).view(2, points, 7) / 1000.0
    for limit in (1, 40, 1000):
        scores, chosen, labels = select_candidates(logits, sizes, 0.9, limit)
        column, start = 0, 0
        for size in sizes:
            level = logits[:, start : start + size].flatten(1)
            values, index = level.sort(dim=1, descending=True)
            count = min(limit, level.shape[1])
            columns = slice(column, column + count)
            expected = values[:, :count].sigmoid()
            assert torch.equal(scores[:, columns], torch.where(expected > 0.9, expected, 0))
            assert torch.equal(chosen[:, columns], start + index[:, :count] // 7)
            assert torch.equal(labels[:, columns], index[:, :count] % 7)
            column, start = column + count, start + size
        assert column == scores.shape[1]


@pytest.mark.parametrize("spread", [1000.0, 300.0, 60.0], ids=["apart", "mixed", "in one heap"])
@pytest.mark.parametrize("limit", [5, 400])
def test_nms_of_the_best_first_gives_the_same(spread: float, limit: int) -> None:
    """Against one NMS of all candidates. In one heap fewer are kept than asked for, which takes all candidates."""
    boxes, scores, labels = crowd(2, 1500, spread, 3)
    limits = {"nms_thresh": 0.5, "detections_per_img": limit}
    found = detections_from_candidates(boxes, scores, labels, [(2000, 2000)] * 2, **limits)
    for image in range(2):
        best = batched_nms(boxes[image], scores[image], labels[image], 0.5)[:limit]
        assert torch.equal(found[image].boxes, boxes[image][best])
        assert torch.equal(found[image].scores, scores[image][best])
        assert torch.equal(found[image].labels, labels[image][best])
    assert spread > 60 or limit < 100 or len(found[0].scores) < limit


@pytest.mark.parametrize("spread", [1000.0, 300.0, 60.0])
def test_a_whole_batch_together_gives_the_same(monkeypatch: pytest.MonkeyPatch, spread: float) -> None:
    """What a GPU does, against torchvision's NMS, image by image."""
    boxes, scores, labels = crowd(3, 700, spread, 3)
    scores[1, 20:] = 0  # an image with few candidates, and one with none
    scores[2] = 0
    limits = {"nms_thresh": 0.5, "detections_per_img": 50}
    one_by_one = detections_from_candidates(boxes, scores, labels, [(2000, 2000)] * 3, **limits)
    monkeypatch.setattr(postprocess, "_thinned_one_by_one", postprocess._thinned_together)
    together = detections_from_candidates(boxes, scores, labels, [(2000, 2000)] * 3, **limits)
    for ours, theirs in zip(together, one_by_one, strict=True):
        for name in ("boxes", "scores", "labels"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert len(together[0].scores) > 5 and len(together[2].scores) == 0


@pytest.mark.parametrize("way", ["_thinned_one_by_one", "_thinned_together"])
def test_what_comes_after_a_long_heap_is_found(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Two are asked for. The 30 best coincide, more than the first candidates; the last two lie apart."""
    boxes = torch.tensor([[10.0, 10, 50, 50]]).repeat(32, 1)
    boxes[30:] += torch.tensor([[100.0], [200.0]])
    scores, labels = torch.linspace(0.9, 0.1, 32)[None], torch.zeros(1, 32, dtype=torch.int64)
    assert postprocess.SHARES[-1] * 2 < 30
    monkeypatch.setattr(postprocess, "_thinned_one_by_one", getattr(postprocess, way))
    (found,) = detections_from_candidates(
        boxes[None], scores, labels, [(400, 400)], nms_thresh=0.5, detections_per_img=2
    )
    assert torch.equal(found.boxes, boxes[[0, 30]]) and torch.equal(found.scores, scores[0, [0, 30]])


def test_a_long_chain_is_not_settled_and_goes_to_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes 10 px wide, each 3 px right of the one before: neighbours overlap by 7 / 13 = 0.54, the next but one by
    4 / 16 = 0.25. Every second stays, and whether the last does is decided by all before it."""
    left = 3.0 * torch.arange(60)
    boxes = torch.stack([left, torch.zeros(60), left + 10, torch.full((60,), 10.0)], dim=1)[None]
    scores, labels = torch.linspace(0.9, 0.1, 60)[None], torch.zeros(1, 60, dtype=torch.int64)
    kept, settled = settled_nms(boxes, labels, 0.5)
    assert kept[0, :16].tolist() == [True, False] * 8
    assert settled.tolist() == [False]
    assert settled_nms(boxes[:, :8], labels[:, :8], 0.5)[1].tolist() == [True]
    monkeypatch.setattr(postprocess, "_thinned_one_by_one", postprocess._thinned_together)
    (found,) = detections_from_candidates(boxes, scores, labels, [(300, 300)], **{**THRESHOLDS, "nms_thresh": 0.5})
    assert torch.equal(found.boxes, boxes[0, ::2])


@pytest.mark.parametrize("way", ["_thinned_one_by_one", "_thinned_together"])
@pytest.mark.parametrize("images", [1, 5])
def test_one_host_sync_a_batch(monkeypatch: pytest.MonkeyPatch, way: str, images: int) -> None:
    boxes, scores, labels = crowd(images, 400, 1000.0, 3)
    monkeypatch.setattr(postprocess, "_thinned_one_by_one", getattr(postprocess, way))
    read, tolist = [], Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: read.append(self.shape) or tolist(self))
    with HostSyncs() as syncs:
        detections_from_candidates(boxes, scores, labels, [(2000, 2000)] * images, **THRESHOLDS)
    assert (len(read), syncs.found) == (1, [])
