"""The whole detector: what the block changes in it and what not, predict, loss, and what an import loads."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from msil import build_detector
from msil.detection import Detector, FCOSHead, Target
from msil.detection.heads import HeadOptions
from msil.errors import WeightsError

from .cases import random_targets, small_detector

FULL = {"align": True, "separate": True, "apply": "both"}


def image(height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)


def noise_detector(**settings) -> Detector:
    """A detector with random weights that finds some dozens of boxes in noise, with clearly different scores."""
    detector = small_detector(FULL, score_thresh=0.3, **settings).eval()
    parameters = dict(detector.head.named_parameters())
    with torch.no_grad():
        parameters["cls_logits.weight"].mul_(30)
        parameters["cls_logits.bias"].zero_()
        parameters["bbox_reg.bias"].fill_(1.5)
    return detector


def test_apply_none_draws_no_random_number() -> None:
    """So that the training that follows is the same, too."""
    small_detector(None)
    state = torch.get_rng_state()
    small_detector({**FULL, "apply": "none"})
    assert torch.equal(torch.get_rng_state(), state)


def test_predict_takes_images_of_different_sizes() -> None:
    sizes = [(64, 96), (90, 40), (33, 33)]
    found = noise_detector().predict([image(*size) for size in sizes])
    assert len(found) == 3
    for detections, (height, width) in zip(found, sizes, strict=True):
        count = len(detections.scores)
        assert 0 < count <= 100
        assert detections.boxes.shape == (count, 4) and detections.labels.shape == (count,)
        assert (detections.boxes >= 0).all()
        assert (detections.boxes <= torch.tensor([width, height, width, height])).all()
        assert (detections.scores.diff() <= 0).all()
        assert ((detections.labels >= 0) & (detections.labels < 3)).all()
        assert not detections.boxes.requires_grad
    assert noise_detector().predict([]) == []


def test_boxes_come_back_in_the_pixels_of_the_image_given() -> None:
    picture = image(100, 150) / 255
    # scale min(80 / 150, 64 / 100) = 0.5333: 53.3 -> 53 rows and 80 columns
    small = F.interpolate(picture[None], (53, 80), mode="bilinear", align_corners=False)[0]
    (found,) = noise_detector(min_size=64, max_size=80, detections_per_img=10).predict([picture])
    (expected,) = noise_detector(detections_per_img=10).predict([small])
    assert len(found.scores) > 0
    assert torch.equal(found.labels, expected.labels)
    factor = torch.tensor([150 / 80, 100 / 53, 150 / 80, 100 / 53])
    torch.testing.assert_close(found.boxes, expected.boxes * factor, rtol=1e-4, atol=0.01)
    assert found.boxes[:, 2].max() > 80  # so they really are in the larger picture


def test_losses_are_taken_at_the_size_given() -> None:
    """Training images arrive resized: min_size is for predict alone."""
    images, targets = [image(64, 96)], random_targets([3], 64, 96, 3)
    with_size, without = small_detector(FULL, min_size=32, max_size=64), small_detector(FULL)
    for name, loss in with_size.loss(images, targets).items():
        assert torch.equal(loss, without.loss(images, targets)[name])


@pytest.mark.parametrize("training", [True, False])
def test_predict_leaves_the_mode_and_the_statistics_alone(training: bool) -> None:
    detector = small_detector(FULL, norm="bn").train(training)
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    assert any("running_mean" in key for key in before)
    detector.predict([image(64, 96)])
    assert all(module.training is training for module in detector.modules())
    for key, value in detector.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_predict_restores_the_mode_after_an_error() -> None:
    detector = small_detector().train()
    with pytest.raises(ValueError, match=r"\(3, H, W\)"):
        detector.predict([torch.zeros(64, 64, dtype=torch.uint8)])
    assert detector.training


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            [{"boxes": torch.ones(1, 4), "labels": torch.tensor([3])}],
            r"of target 0 are 3 to 3, .* takes 0 to 2; ",
        ),
        ([Target(torch.ones(1, 4), torch.tensor([1.0]))], r"target 0 must have .* and torch.float32 \(1,\)"),
        ([Target(torch.ones(1, 4), torch.tensor([1, 1]))], r"and torch.int64 \(2,\)"),
        ([Target(torch.ones(4), torch.tensor([1]))], r"target 0 must have boxes \(M, 4\) .*, not torch.float32 \(4,\)"),
        (
            [{"boxes": torch.full((1, 4), torch.nan), "labels": torch.tensor([1])}],
            r"boxes of target 0 are not all finite",
        ),
        (
            [{"boxes": torch.tensor([[10.0, 20, 5, 30]]), "labels": torch.tensor([1])}],  # x y width height
            r"boxes of target 0 must be \(x1, y1, x2, y2\)",
        ),
        ([{"boxes": torch.ones(1, 4)}], r"target 0 must be a Target or a dict .* not a dict with \['boxes'\]"),
        ([], r"one target for each of the 1 images, not 0"),
    ],
)
def test_wrong_targets_are_named(targets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_detector().loss([image(64, 64)], targets)


def test_weights_come_back_from_a_file(tmp_path) -> None:
    trained = small_detector(FULL)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.5)
    torch.save(trained.state_dict(), tmp_path / "plain.pt")
    prefixed = {f"detector.{key}": value for key, value in trained.state_dict().items()}
    torch.save({"state_dict": prefixed, "epoch": 3}, tmp_path / "run.ckpt")
    for name in ("plain.pt", "run.ckpt"):
        options = FCOSHead.Options(num_convs=1)
        loaded = build_detector(options, "resnet10", 3, channels=64, weights=str(tmp_path / name)).state_dict()
        assert all(torch.equal(value, loaded[key]) for key, value in trained.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"head": "fcso"}, "unknown head 'fcso'; known: atss"),
        ({"head": HeadOptions()}, "head must be a name, a head's options or a DenseHead, not HeadOptions"),
        ({"backbone": "resnet9"}, "name=resnet9 must be one of resnet10"),
        ({"min_size": 100}, "min_size and max_size go together"),
    ],
)
def test_wrong_settings_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_detector(**{"backbone": "resnet10", "num_classes": 3, "channels": 64, **settings})


def test_weights_of_another_head_are_refused(tmp_path) -> None:
    torch.save(small_detector(FULL).state_dict(), tmp_path / "fcos.pt")
    with pytest.raises(WeightsError, match=r"fcos\.pt does not fit this detector: it .*; build the"):
        build_detector("vfnet", "resnet10", 3, channels=64, weights=str(tmp_path / "fcos.pt"))


def test_torch_and_torchvision_are_enough() -> None:
    """Also after a loss and a prediction: nothing is imported late."""
    code = """
import sys, torch
from msil import MSIL, build_detector
from msil.detection import Target
torch.set_num_threads(1)
detector = build_detector("fcos", "resnet10", 3, channels=64)
image = torch.zeros(3, 64, 64, dtype=torch.uint8)
detector.loss([image], [Target(torch.tensor([[4.0, 4, 40, 40]]), torch.tensor([1]), 0, (64, 64))])
detector.predict([image])
others = ["lightning", "lightning_fabric", "pytorch_lightning", "hydra", "omegaconf", "torchmetrics", "pycocotools",
          "faster_coco_eval", "wandb", "matplotlib", "pandas", "scipy", "cv2", "timm"]
found = [name for name in others if name in sys.modules]
assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_images_come_one_by_one_in_a_batch_or_in_a_list() -> None:
    detector = small_detector()
    batch = torch.rand(2, 3, 64, 96)
    expected = detector.predict([*batch])
    for images in (batch, tuple(batch)):
        for found, one in zip(detector.predict(images), expected, strict=True):
            assert torch.equal(found.boxes, one.boxes) and torch.equal(found.scores, one.scores)
    assert torch.equal(detector.predict(batch[0])[0].boxes, expected[0].boxes)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(1, 1, 3, 64, 96), r"must be \(3, H, W\), \(N, 3, H, W\) or a list"),
        ("photo.jpg", "must be a tensor or a list of tensors .*, not str"),
        ([torch.rand(3, 64, 96), None], "image 1 must be a tensor .*, not NoneType"),
        (torch.rand(4, 64, 96), r"an image must be \(3, H, W\), not \(4, 64, 96\)"),
        (torch.zeros(3, 64, 96, dtype=torch.int32), "must be uint8 .* or floating point"),
        (torch.full((3, 64, 96), 255.0), "image 0 is floating point and reaches 255: give uint8, or divide by 255"),
        ([torch.zeros(3, 64, 96), torch.zeros(3, 0, 96)], r"image 1 has no pixels: \(3, 0, 96\)"),
    ],
)
def test_other_images_are_refused(images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_detector().predict(images)


def test_targets_are_ours_or_torchvisions() -> None:
    detector = small_detector()
    images = torch.rand(2, 3, 64, 96)
    boxes, labels = torch.tensor([[10.0, 10.0, 50.0, 60.0]]), torch.tensor([1])
    ours = detector.loss(images, [Target(boxes, labels), Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))])
    theirs = detector.loss(
        [*images], [{"boxes": boxes, "labels": labels}, {"boxes": torch.zeros(0, 4), "labels": labels[:0]}]
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
