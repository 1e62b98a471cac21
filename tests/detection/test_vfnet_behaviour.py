"""How the VFNet head behaves: at background points, in bfloat16, when it learns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from msil.detection import Detections, Predictions, VFNetHead, build_detector

from .cases import (
    IMAGE_SIZES,
    MAP_SIZES,
    random_pyramid,
    random_targets,
    small_head,
    small_vfnet,
    target,
)

FULL = {"align": True, "separate": True, "apply": "both"}
SMALL_MAPS = ((8, 12), (4, 6), (2, 3), (1, 2), (1, 1))  # of 64 x 96 pixels


def test_gradients_flow_as_through_the_reference() -> None:
    """Nothing of the refined box reaches the initial one, except a tenth through where the star looks."""
    head = small_vfnet()
    pyramid = random_pyramid(1, map_sizes=SMALL_MAPS)
    predictions = head(pyramid)
    weight = head.bbox_reg.weight
    (through_star,) = torch.autograd.grad(predictions.box.sum(), weight, retain_graph=True)
    (full,) = torch.autograd.grad(predictions.first_box.sum(), weight)
    assert 0 < through_star.abs().max() < 0.01 * full.abs().max()
    # without the star's dependence there is none at all
    with torch.no_grad():
        head.reg_star.weight.zero_()
    (none,) = torch.autograd.grad(head(pyramid).box.sum(), weight)
    assert (none == 0).all()


def test_an_image_without_boxes_adds_background_only() -> None:
    head = small_vfnet()
    predictions = head(random_pyramid(2))
    boxes = random_targets([5], 256, 320, 5)[0]
    with_empty = head.loss(predictions, [boxes, target([])], IMAGE_SIZES)
    assert predictions.first_box is not None
    first = Predictions(
        predictions.logits[:1],
        predictions.box[:1],
        MAP_SIZES,
        first_box=predictions.first_box[:1],
    )
    alone = head.loss(first, [boxes], IMAGE_SIZES[:1])
    torch.testing.assert_close(with_empty["loss_bbox"], alone["loss_bbox"])
    torch.testing.assert_close(with_empty["loss_bbox_rf"], alone["loss_bbox_rf"])
    assert with_empty["loss_cls"] > alone["loss_cls"]


def test_boxes_at_background_points_may_be_anything() -> None:
    head = small_vfnet()
    predictions = head(random_pyramid(2))
    targets = random_targets([5, 3], 256, 320, 5)
    background = ~head.targets(predictions, targets, IMAGE_SIZES).positive[..., None]
    assert predictions.first_box is not None
    clean = [predictions.first_box.detach(), predictions.box.detach()]
    spoilt = [torch.where(background, math.nan, clean[0]), torch.where(background, math.inf, clean[1])]

    def losses_and_gradients(initial: Tensor, refined: Tensor) -> tuple[Tensor, list[Tensor]]:
        leaves = [initial.clone().requires_grad_(), refined.clone().requires_grad_()]
        one = Predictions(predictions.logits.detach(), leaves[1], MAP_SIZES, first_box=leaves[0])
        losses = torch.stack(list(head.loss(one, targets, IMAGE_SIZES).values()))
        return losses.detach(), list(torch.autograd.grad(losses.sum(), leaves))

    expected, expected_gradients = losses_and_gradients(*clean)
    losses, gradients = losses_and_gradients(*spoilt)
    assert torch.equal(losses, expected)
    for got, same in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(got, same)
        assert (got[background.squeeze(-1)] == 0).all() and (got != 0).any()


@pytest.mark.parametrize("msil", [None, FULL], ids=["plain", "msil"])
def test_bfloat16_autocast(msil: dict | None) -> None:
    head = small_vfnet(msil)
    pyramid, targets = random_pyramid(2), random_targets([4, 3], 256, 320, 5)
    expected = head.loss(head(pyramid), targets, IMAGE_SIZES)
    with torch.autocast("cpu", torch.bfloat16):
        losses = head.loss(head(pyramid), targets, IMAGE_SIZES)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name], rtol=0.02, atol=0)  # bfloat16 has 8 bits
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"init": "kaiming"}, "init=kaiming must be authors or mmdet"),
        ({"strides": (8, 16)}, r"regress_denoms=.* must be as many as strides"),
    ],
)
def test_wrong_settings_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        VFNetHead(5, 32, **{"norm_groups": 8, **settings})


def test_wrong_inputs_are_refused() -> None:
    head = small_vfnet()
    with pytest.raises(ValueError, match="5 levels, the pyramid 4"):
        head(random_pyramid(2)[:4])
    predictions = head(random_pyramid(2))
    targets = random_targets([2, 1], 256, 320, 5)
    with pytest.raises(ValueError, match="2 images need as many targets and sizes, not 1 and 2"):
        head.loss(predictions, targets[:1], IMAGE_SIZES)
    with pytest.raises(ValueError, match="2 images need as many targets and sizes, not 2 and 3"):
        head.loss(predictions, targets, [*IMAGE_SIZES, (8, 8)])


def test_predictions_move_with_all_their_tensors() -> None:
    moved = small_vfnet()(random_pyramid(1, map_sizes=SMALL_MAPS)).to("meta")
    assert moved.first_box is not None and moved.quality is None
    assert {value.device.type for value in (moved.logits, moved.box, moved.first_box)} == {"meta"}
    assert moved.map_sizes == SMALL_MAPS
    fcos = small_head()(random_pyramid(1, map_sizes=SMALL_MAPS)).to("meta")
    assert fcos.first_box is None and fcos.quality is not None and fcos.quality.device.type == "meta"


# Two objects of the 64 x 96 pixels of SMALL_MAPS.
OBJECTS = target([[8, 12, 40, 52], [50, 6, 88, 30]], [0, 2])


def assert_found(found: Detections) -> None:
    """The two objects first, well placed, before anything else by far."""
    assert found.scores[1] > 0.7
    assert (found.scores[2:] < 0.6).all()
    order = found.labels[:2].argsort()
    assert found.labels[:2][order].tolist() == [0, 2]
    assert box_iou(found.boxes[:2][order], OBJECTS.boxes).diagonal().min() > 0.7


@pytest.mark.parametrize("msil", [None, FULL], ids=["plain", "msil"])
def test_learns_one_image_from_fixed_features(msil: dict | None) -> None:
    head, pyramid, sizes = small_vfnet(msil), random_pyramid(1, map_sizes=SMALL_MAPS), [(64, 96)]
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3)
    for _ in range(40):
        optimizer.zero_grad()
        torch.stack(list(head.loss(head(pyramid), [OBJECTS], sizes).values())).sum().backward()
        optimizer.step()
    with torch.no_grad():
        assert_found(head.detect(head(pyramid), sizes)[0])


@pytest.mark.slow
@pytest.mark.parametrize("msil", [None, FULL], ids=["plain", "msil"])
def test_a_whole_detector_learns_one_image(msil: dict | None) -> None:
    torch.manual_seed(0)
    detector = build_detector(VFNetHead.Options(num_convs=1, norm_groups=8), "resnet10", 3, channels=32, msil=msil)
    image = torch.full((3, 64, 96), 60, dtype=torch.uint8)
    for (x1, y1, x2, y2), shade in zip(OBJECTS.boxes.int().tolist(), (230, 140), strict=True):
        image[:, y1:y2, x1:x2] = shade
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3)
    for _ in range(80):
        optimizer.zero_grad()
        torch.stack(list(detector.loss([image], [OBJECTS]).values())).sum().backward()
        optimizer.step()
    assert_found(detector.eval().predict([image])[0])
