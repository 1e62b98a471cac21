"""Multi-scale and mirrored testing, and that an image's detections are its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from msil.detection import Detections
from msil.detection.postprocess import merged, scaled_limits
from msil.detection.preprocess import resize

from .cases import small_detector
from .test_detector import image, noise_detector

SIZES = {"min_size": 64, "max_size": 96}


def assert_same(found: Detections, expected: Detections, atol: float = 1e-3) -> None:
    assert len(found.boxes) == len(expected.boxes) > 5
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=0, atol=atol)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.labels, expected.labels)


def test_a_mirrored_image_gives_mirrored_detections() -> None:
    """With the flip both are looked at together, whichever comes first; without it the net is not symmetric."""
    picture = image(64, 96)  # at the size that the net takes, for resizing rounds
    detector = noise_detector(**SIZES, test_flip=True, detections_per_img=30)
    (found,), (other,) = detector.predict([picture]), detector.predict([picture.flip(-1)])
    x1, y1, x2, y2 = other.boxes.unbind(1)
    back = Detections(torch.stack([96 - x2, y1, 96 - x1, y2], 1), other.scores, other.labels)
    assert_same(found, back)
    plain = noise_detector(**SIZES, detections_per_img=30)
    (one,), (two,) = plain.predict([picture]), plain.predict([picture.flip(-1)])
    assert not torch.allclose(one.scores, two.scores, atol=1e-3)


def by_hand(picture: Tensor, size: tuple[int, int]) -> Detections:
    """What a detector that does not resize finds in the picture at `size`, in the picture's pixels."""
    (found,) = noise_detector().predict([resize(picture, size)])
    y, x = picture.shape[-2] / size[0], picture.shape[-1] / size[1]
    return Detections(found.boxes * torch.tensor([x, y, x, y]), found.scores, found.labels)


@pytest.mark.parametrize("flip", [False, True])
def test_two_scales_are_merged_by_one_nms(flip: bool) -> None:
    """Short sides 48 and 80 of a 100 x 150 image; limits 96 * 48 / 64 = 72 and 96 * 80 / 64 = 120 of the long side."""
    picture = image(100, 150)
    views = [by_hand(picture, size) for size in ((48, 72), (80, 120))]
    if flip:
        # The resized image is mirrored, not the mirrored one resized.
        for height, width in ((48, 72), (80, 120)):
            small = resize(picture, (height, width)).flip(-1)
            (found,) = noise_detector().predict([small])
            x1, y1, x2, y2 = found.boxes.unbind(1)
            boxes = torch.stack([width - x2, y1, width - x1, y2], 1) * (150 / width)
            views.append(Detections(boxes, found.scores, found.labels))
    boxes, scores, labels = (torch.cat([getattr(v, name) for v in views]) for name in ("boxes", "scores", "labels"))
    best = batched_nms(boxes, scores, labels, 0.6)[:100]
    expected = Detections(boxes[best], scores[best], labels[best])
    (found,) = noise_detector(**SIZES, test_scales=[48, 80], test_flip=flip).predict([picture])
    assert_same(found, expected)


def test_merging_by_hand() -> None:
    """Of two overlapping boxes of one class the better stays, of two classes both; at most so many in all."""
    box, near, far = [0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [20.0, 20.0, 30.0, 30.0]  # IoU of the first two 0.9
    one = Detections(torch.tensor([box, far]), torch.tensor([0.8, 0.3]), torch.tensor([0, 0]))
    two = Detections(torch.tensor([near, near]), torch.tensor([0.9, 0.7]), torch.tensor([0, 1]))
    found = merged([one, two], nms_thresh=0.6, detections_per_img=100)
    assert found.boxes.tolist() == [near, near, far]
    torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.7, 0.3]))
    assert found.labels.tolist() == [0, 1, 0]
    assert merged([one, two], nms_thresh=0.6, detections_per_img=2).labels.tolist() == [0, 1]
    assert len(merged([one, two], nms_thresh=0.95, detections_per_img=100).boxes) == 4


def test_limits_keep_their_proportion() -> None:
    """MMDetection's scales of testing: (666, 400), (1333, 800), (2000, 1200), which round 666.5 down."""
    assert scaled_limits([400, 800, 1200], 800, 1333) == [(400, 667), (800, 1333), (1200, 2000)]


def test_what_is_found_in_an_image_does_not_depend_on_the_others() -> None:
    """The norms see the padding, so images are only batched with those that are padded alike."""
    pictures = [image(64, 96, 1), image(96, 64, 2), image(64, 64, 3), image(60, 90, 4), image(64, 96, 5)]
    detector = noise_detector(**SIZES)
    together = detector.predict(pictures)
    for picture, found in zip(pictures, together, strict=True):
        assert_same(found, detector.predict([picture])[0])


@pytest.mark.parametrize("settings", [{"test_scales": []}, {"test_scales": [0]}, {**SIZES, "test_scales": []}])
def test_scales_that_cannot_be_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="test_scales must be short sides in pixels beside min_size"):
        small_detector(None, **settings)
