"""A whole imported detector, run end to end, against its parts and against torchvision's own FCOS."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import fcos_resnet50_fpn
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import clip_boxes_to_image

from msil.checkpoints.coco_names import COCO_CATEGORY_IDS, COCO_CLASSES
from msil.checkpoints.importer import import_checkpoint
from msil.checkpoints.load import load_detector
from msil.detection import Detections, Detector, FCOSHead, VFNetHead, build_detector
from msil.detection.backbone import ResNet
from msil.detection.fpn import FPN
from msil.detection.weights import from_mmdet

from .theirs import config_3x, mmdet_state, save, shapes

HEIGHT, WIDTH = 96, 128
SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {
        "conv_bias": False,
        "center_sampling": False,
        "centerness_on_reg": False,
        "norm_on_bbox": False,
        "loss_bbox": "iou",
    },
    "improved": {},
}


@pytest.fixture(scope="module")
def image() -> Tensor:
    """Uneven in colour, so that swapped channels show."""
    noise = torch.randint(0, 256, (3, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(5))
    return (noise * torch.tensor([1.0, 0.6, 0.3])[:, None, None]).to(torch.uint8)


@pytest.fixture(scope="module")
def states(golden) -> dict[str, dict[str, Tensor]]:
    return {form: mmdet_state(golden, form) for form in ("plain", "improved", "vfnet")}


@pytest.fixture(scope="module")
def imported(states: dict, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Detector]:
    """(form, style) -> the detector of a checkpoint that went through a file of theirs and one of ours."""
    folder = tmp_path_factory.mktemp("mmdet")

    @cache
    def load(form: str, style: str) -> Detector:
        config = config_3x(form, depth=50, style=style, channels=256, scale=f"({WIDTH}, {HEIGHT})")
        import_checkpoint(save(folder / "theirs.pth", states[form], config), "mmdet", folder / "ours.safetensors")
        return load_detector(folder / "ours.safetensors")[0]

    return load


@pytest.mark.parametrize(("form", "head", "name"), [("improved", "fcos", "fcos_tricks"), ("vfnet", "vfnet", "vfnet")])
def test_parameters_of_whole_detectors(form: str, head: str, name: str, golden) -> None:
    """The head's count is the reference's; backbone and neck are counted by the table of MMDetection's names."""
    sizes = {key: math.prod(shape) for key, shape in shapes(form, "resnet50", 256, 80).items()}
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    rest = sum(n for key, n in sizes.items() if not key.startswith("bbox_head.") and not key.endswith(buffers))
    with torch.device("meta"):
        detector = build_detector(head, "resnet50", 80, msil=None, norm="eval_bn")
    assert sum(p.numel() for p in detector.head.parameters()) == golden.misc()["num_params"][name]
    assert sum(p.numel() for p in detector.parameters()) == golden.misc()["num_params"][name] + rest


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return from_mmdet({key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)})


@torch.no_grad()
def of_the_parts(image: Tensor, state: dict[str, Tensor], form: str, style: str) -> Detections:
    """What backbone, neck and head give that are loaded by themselves, on an image prepared by hand."""
    with torch.device("meta"):  # no time for weights that are replaced at once
        body = ResNet("resnet50", style=style, norm="frozen_bn" if style == "caffe" else "eval_bn")
        neck = FPN([512, 1024, 2048])
        head = VFNetHead(80) if form == "vfnet" else FCOSHead(80, **SWITCHES[form])
    body.load_state_dict(part(state, "backbone."), strict=False, assign=True)  # without the batch counters
    neck.load_state_dict(part(state, "neck."), assign=True)
    head.load_state_dict(part(state, "bbox_head."), assign=True)
    for module in (body, neck, head):
        module.eval()
    if style == "caffe":
        mean, std, pixels = [103.53, 116.28, 123.675], [1.0, 1.0, 1.0], image[[2, 1, 0]]
    else:
        mean, std, pixels = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375], image
    inputs = (pixels.float() - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    # 96 x 128 is a multiple of 32: no padding.
    predictions = head(neck(body(inputs[None].contiguous(memory_format=torch.channels_last))))
    return head.detect(predictions, [(HEIGHT, WIDTH)], nms_thresh=0.5 if form == "plain" else 0.6)[0]


@pytest.mark.parametrize(
    ("form", "style"), [("plain", "caffe"), ("improved", "caffe"), ("vfnet", "pytorch"), ("vfnet", "caffe")]
)
def test_an_imported_detector_is_the_sum_of_its_parts(
    form: str, style: str, states: dict, image: Tensor, imported: Callable[[str, str], Detector]
) -> None:
    (found,) = imported(form, style).predict([image])
    expected = of_the_parts(image, states[form], form, style)
    assert len(expected.boxes) == 100
    assert torch.equal(found.boxes, expected.boxes)
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.labels, expected.labels)


def test_styles_are_different_nets(imported: Callable[[str, str], Detector]) -> None:
    """The same weights and even the same inputs: C2 is equal, from C3 on the strides are elsewhere."""
    detectors = [imported("vfnet", style) for style in ("pytorch", "caffe")]
    inputs = torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        early, late = zip(
            *(
                (body.layer1(body.maxpool(body.relu(body.bn1(body.conv1(inputs))))), body(inputs)[0])
                for body in (detector.backbone for detector in detectors)
                if isinstance(body, ResNet)
            ),
            strict=True,
        )
    assert torch.allclose(early[0], early[1], rtol=1e-4, atol=1e-4)  # frozen_bn and eval_bn round differently
    assert (late[0] - late[1]).abs().mean() > 0.1 * late[0].abs().mean()


def test_bgr_is_the_image_with_its_channels_swapped(image: Tensor, imported: Callable[[str, str], Detector]) -> None:
    """The caffe-style detector on the swapped image equals an RGB detector of the same net on the image."""
    caffe = imported("plain", "caffe")
    assert caffe.channel_order == "bgr"
    found, other = caffe.predict([image.flip(0), image])
    assert not torch.equal(found.scores, other.scores)
    rgb = copy.copy(caffe)
    rgb.channel_order = "rgb"
    (expected,) = rgb.predict([image])
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def torchvisions(golden) -> FCOS:
    model = fcos_resnet50_fpn(weights=None, weights_backbone=None, min_size=128, max_size=256)
    model.load_state_dict(golden.fill(model.state_dict(), 7))
    return model.eval()


@pytest.fixture(scope="module")
def ours(torchvisions: FCOS, tmp_path_factory: pytest.TempPathFactory) -> Detector:
    folder = tmp_path_factory.mktemp("torchvision")
    torch.save(torchvisions.state_dict(), folder / "theirs.pth")
    import_checkpoint(folder / "theirs.pth", "torchvision", folder / "ours.safetensors")
    detector, description = load_detector(folder / "ours.safetensors")
    assert (description.classes, description.category_ids) == (COCO_CLASSES, COCO_CATEGORY_IDS)
    assert (description.min_size, description.max_size) == (800, 1333)
    return detector


@pytest.fixture(scope="module")
def square() -> Tensor:
    """128 x 256, a multiple of every stride: only there are torchvision's steps between points the strides."""
    return torch.randint(0, 256, (3, 128, 256), generator=torch.Generator().manual_seed(8), dtype=torch.uint8)


@torch.no_grad()
def their_outputs(model: FCOS, image: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """torchvision's raw head outputs (1, P, ...) and its decoded boxes (P, 4)."""
    images: ImageList = model.transform([image / 255])[0]
    assert images.tensors.shape[-2:] == image.shape[-2:]
    features = list(model.backbone(images.tensors).values())
    outputs = model.head(features)
    anchors = model.anchor_generator(images, features)[0]
    return outputs, model.box_coder.decode(outputs["bbox_regression"][0], anchors)


@torch.no_grad()
def test_raw_outputs_are_torchvisions(torchvisions: FCOS, ours: Detector, square: Tensor) -> None:
    theirs, _ = their_outputs(torchvisions, square)
    found = ours([square])
    assert found.centerness is not None
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found.logits, theirs["cls_logits"][..., list(COCO_CATEGORY_IDS)], **close)
    torch.testing.assert_close(found.distances, theirs["bbox_regression"].relu(), **close)
    torch.testing.assert_close(found.centerness, theirs["bbox_ctrness"].squeeze(-1), **close)


@torch.no_grad()
def test_boxes_are_torchvisions(torchvisions: FCOS, ours: Detector, square: Tensor) -> None:
    """The hundred best candidates before any suppression, in MMDetection's score; torchvision decodes their boxes."""
    theirs, boxes = their_outputs(torchvisions, square)
    boxes = clip_boxes_to_image(boxes, (128, 256))
    probability = theirs["cls_logits"][0][:, list(COCO_CATEGORY_IDS)].sigmoid()
    scores = probability * theirs["bbox_ctrness"][0].sigmoid()
    sides = boxes[:, 2:] - boxes[:, :2]
    scores[(sides <= 0).any(1)] = 0  # an empty box is dropped
    best, index = scores.flatten().topk(100)
    assert best[:-1].sub(best[1:]).min() >= 0 and best[-1] > 0.05  # far above the threshold of the class alone
    (found,) = ours.head.detect(
        ours([square]), [(128, 256)], score_thresh=0.05, nms_thresh=1.0, topk_candidates=10**6, detections_per_img=100
    )
    # Scores closer than rounding may come in either order, so every box is looked up by its score and label.
    torch.testing.assert_close(found.scores, best, rtol=1e-4, atol=1e-5)
    expected = {(int(i) // 80, int(i) % 80) for i in index}
    matched = 0
    for box, label in zip(found.boxes, found.labels, strict=True):
        candidates = [point for point, k in expected if k == int(label)]
        matched += any(torch.allclose(box, boxes[point], rtol=0, atol=1e-2) for point in candidates)
    assert matched == 100
