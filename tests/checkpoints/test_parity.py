"""Whole imported detectors, run end to end: against their parts, MMDetection's numbers and torchvision's own nets."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import mmdetection
from benchmarks.compare import NotRun
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.detection import RetinaNet, fcos_resnet50_fpn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import clip_boxes_to_image
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from msil.checkpoints.coco_names import COCO_CATEGORY_IDS, COCO_CLASSES
from msil.checkpoints.importer import import_checkpoint
from msil.checkpoints.load import load_detector
from msil.detection import Detections, Detector, FCOSHead, ResNetOptions, VFNetHead, build_detector
from msil.detection.backbone import ResNet
from msil.detection.fpn import FPN
from msil.detection.weights import from_mmdet

from .theirs import HEADS, body_shapes, config_3x, mmdet_state, save, shapes

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
        detector = build_detector(head, ResNetOptions(norm="eval_bn"), 80, msil=None)
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


@pytest.mark.parametrize("form", ["retinanet", "atss", "gfl", "tood"])
@torch.no_grad()
def test_imported_heads_put_out_mmdetections_numbers(form: str, golden, tmp_path: Path) -> None:
    """The reference's head of 32 channels, two convolutions and 5 classes, on a numbered backbone and neck."""
    name = "head_retina" if form == "retinanet" else f"head_{form}"
    body = body_shapes(form, "resnet18", 32)
    state = {key: torch.tensor(float(i)).expand(shape) for i, (key, shape) in enumerate(body.items())}
    state |= {f"bbox_head.{key}": value for key, value in golden(name, "state/").items()}
    norm = "" if form == "retinanet" else "norm_cfg=dict(type='GN', num_groups=8),"
    config = config_3x(form, convs=2, classes=5, norm=norm)
    path = save(tmp_path / "theirs.pth", state, config)
    import_checkpoint(path, "mmdet", tmp_path / "ours.safetensors", classes=["a", "b", "c", "d", "e"])
    detector, _ = load_detector(tmp_path / "ours.safetensors")
    assert isinstance(detector, Detector)
    own = detector.state_dict()
    assert torch.equal(own["backbone.layer4.1.bn2.weight"], state["backbone.layer4.1.bn2.weight"])
    assert torch.equal(own["fpn.fpn_convs.3.weight"], state["neck.fpn_convs.3.conv.weight"])
    found = detector.head([golden("inputs", "feats/")[str(level)] for level in range(5)])
    per_cell, expected = detector.head.priors.per_cell, golden(name, "train_out/")
    scores = found.logits.sigmoid() if form == "tood" else found.logits  # the reference's puts out probabilities
    for output, values in enumerate((scores, found.box, found.quality)):
        assert (values is None) == (f"{output}/0" not in expected)
        if values is not None:
            maps = [expected[f"{output}/{level}"].permute(0, 2, 3, 1).flatten(1, 2) for level in range(5)]
            flat = torch.cat(maps, 1).unflatten(-1, (per_cell, -1)).flatten(1, 2)
            torch.testing.assert_close(values.reshape(flat.shape), flat, rtol=1e-5, atol=1e-5)


def mmdetections_own(form: str, **settings: Any) -> Any:
    """MMDetection's detector of such a config. Its compiled operators, VFNet's and TOOD's, are stand-ins."""
    try:
        mmdetection.fcos_head(3)
    except NotRun as reason:
        pytest.skip(str(reason))
    import mmdet.models  # noqa: F401
    from mmdet.registry import MODELS
    from mmengine.config import Config
    from mmengine.registry import DefaultScope

    with DefaultScope.overwrite_default_scope("mmdet"):
        return MODELS.build(Config.fromstring(config_3x(form, **settings), ".py").model)


@pytest.mark.parametrize("form", HEADS)
def test_made_up_checkpoints_are_as_mmdetections(form: str) -> None:
    with torch.device("meta"):
        model = mmdetections_own(form, depth=50, channels=256)
    expected = shapes(form, "resnet50", 256, 80)
    stand_ins = [f"bbox_head.{name}.weight" for name in ("vfnet_cls_dconv", "vfnet_reg_refine_dconv")]
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == {
        key: shape for key, shape in expected.items() if key not in stand_ins
    }


@pytest.mark.parametrize("form", ["retinanet", "atss", "gfl"])
@torch.no_grad()
def test_a_whole_detector_puts_out_what_mmdetections_does(form: str, golden, tmp_path: Path) -> None:
    model = mmdetections_own(form).eval()
    model.load_state_dict(golden.fill(model.state_dict(), 12))
    path = save(tmp_path / "theirs.pth", model.state_dict())
    import_checkpoint(path, "mmdet", tmp_path / "ours.safetensors", style="pytorch")
    detector = load_detector(tmp_path / "ours.safetensors")[0]
    inputs = golden.rand(13, 2, 3, 64, 96)
    found, outputs = detector.net(inputs), model.bbox_head(model.extract_feat(inputs))
    for values, maps in zip((found.logits, found.box, found.quality), outputs, strict=False):
        flat = torch.cat([level.permute(0, 2, 3, 1).flatten(1) for level in maps], 1)
        torch.testing.assert_close(values.flatten(1), flat, rtol=1e-4, atol=1e-4 * float(flat.abs().max()))


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
def their_outputs(model: FCOS | RetinaNet, image: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """torchvision's raw head outputs (1, P, ...) and its decoded boxes (P, 4)."""
    images: ImageList = model.transform([image / 255])[0]
    assert images.tensors.shape[-2:] == image.shape[-2:]
    features = list(model.backbone(images.tensors).values())
    outputs = model.head(features)
    anchors = model.anchor_generator(images, features)[0]
    coder: Any = model.box_coder
    decode = coder.decode if isinstance(model, FCOS) else coder.decode_single
    return outputs, decode(outputs["bbox_regression"][0], anchors)


@torch.no_grad()
def test_raw_outputs_are_torchvisions(torchvisions: FCOS, ours: Detector, square: Tensor) -> None:
    theirs, _ = their_outputs(torchvisions, square)
    found = ours([square])
    assert found.quality is not None
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found.logits, theirs["cls_logits"][..., list(COCO_CATEGORY_IDS)], **close)
    torch.testing.assert_close(found.box, theirs["bbox_regression"].relu(), **close)
    torch.testing.assert_close(found.quality, theirs["bbox_ctrness"].squeeze(-1), **close)


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


def small_retinanet(version: str) -> RetinaNet:
    """torchvision's RetinaNet with its parts as in retinanet_resnet50_fpn or _v2, on ResNet-18 and of 32 channels."""
    body = resnet18(weights=None)
    last = LastLevelP6P7(512 if version == "v2" else 32, 32)
    layers = {"layer2": "0", "layer3": "1", "layer4": "2"}
    backbone = BackboneWithFPN(body, layers, [128, 256, 512], 32, last)
    # In v1 the norms are FrozenBatchNorm2d, in eval mode the same.
    head = RetinaNetHead(32, 9, 91, norm_layer=partial(nn.GroupNorm, 32) if version == "v2" else None)
    return RetinaNet(backbone, 91, head=head, min_size=256, max_size=256)


def before_0_13(key: str) -> str:
    """The name that torchvision up to 0.12 gave a parameter of RetinaNet."""
    key = re.sub(r"(inner|layer)_blocks\.(\d+)\.0\.", r"\1_blocks.\2.", key)
    return re.sub(r"_head\.conv\.(\d+)\.0\.", lambda match: f"_head.conv.{2 * int(match[1])}.", key)


@pytest.fixture(scope="module", params=["v1", "v1 before 0.13", "v2"])
def retinanets(request: pytest.FixtureRequest, golden, tmp_path_factory) -> tuple[RetinaNet, Detector, Tensor]:
    """torchvision's RetinaNet, ours of its file, and an image of 256 x 256, where torchvision's strides are exact."""
    version, old = request.param[:2], request.param.endswith("0.13")
    theirs = small_retinanet(version).eval()
    state = golden.fill(theirs.state_dict(), 11)
    for key in [key for key in state if key.endswith("running_var")]:
        weight = f"{key.removesuffix('running_var')}weight"
        state[key] *= 1e-5  # so small that the norms' eps counts
        state[weight] *= state[key].add(0 if old else 1e-5).sqrt()
    theirs.load_state_dict(state)
    if old:  # as torchvision runs COCO_V1, whose file has the old names
        for module in theirs.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 0.0
    image = torch.randint(0, 256, (3, 256, 256), generator=torch.Generator().manual_seed(8), dtype=torch.uint8)
    head: Any = theirs.head
    cls, box = head.classification_head.cls_logits, head.regression_head.bbox_reg
    outputs, _ = their_outputs(theirs, image)
    with torch.no_grad():  # scores and boxes as a trained net's: neither saturated nor out of all bounds
        cls.weight /= outputs["cls_logits"].std()
        cls.bias.fill_(-4)
        box.weight /= 5 * outputs["bbox_regression"].std()
        unused = [i for i in range(91) if i not in COCO_CATEGORY_IDS]
        cls.bias.view(9, 91)[:, unused] = -100  # the background and the gaps, which are not imported
    folder = tmp_path_factory.mktemp("retinanet")
    saved = {before_0_13(key) if old else key: value for key, value in theirs.state_dict().items()}
    torch.save(saved, folder / "theirs.pth")
    import_checkpoint(folder / "theirs.pth", "torchvision", folder / "ours.safetensors")
    detector, description = load_detector(folder / "ours.safetensors")
    assert isinstance(detector, Detector)
    assert (description.classes, description.category_ids) == (COCO_CLASSES, COCO_CATEGORY_IDS)
    assert ("norms of eps 0" in description.source) == old
    detector.min_size = detector.max_size = 256
    return theirs, detector, image


@torch.no_grad()
def test_raw_outputs_of_retinanet_are_torchvisions(retinanets: tuple[RetinaNet, Detector, Tensor]) -> None:
    theirs, ours, image = retinanets
    expected, boxes = their_outputs(theirs, image)
    found = ours([image])
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found.logits, expected["cls_logits"][..., list(COCO_CATEGORY_IDS)], **close)
    torch.testing.assert_close(found.box, expected["bbox_regression"], **close)
    decoded = ours.head.coder.decode(ours.head.priors_of(found), found.box)
    torch.testing.assert_close(decoded[0], boxes, rtol=1e-4, atol=1e-2)


@torch.no_grad()
def test_detections_of_retinanet_are_torchvisions(retinanets: tuple[RetinaNet, Detector, Tensor]) -> None:
    theirs, ours, image = retinanets
    (expected,), (found,) = theirs([image / 255]), ours.predict([image])
    assert len(found.scores) == len(expected["scores"]) == 300
    # A box clipped to no size is dropped here and kept there; the next best takes its place.
    real = (expected["boxes"][:, 2:] > expected["boxes"][:, :2]).all(1)
    scores, boxes, labels = (expected[name][real] for name in ("scores", "boxes", "labels"))
    assert 290 < len(scores) <= 300
    torch.testing.assert_close(found.scores[: len(scores)], scores, rtol=1e-4, atol=1e-5)
    own = torch.tensor(COCO_CATEGORY_IDS)[found.labels]
    # Scores closer than rounding may come in either order.
    for score, box, label in zip(scores, boxes, labels, strict=True):
        near = ((found.scores - score).abs() < 1e-4) & (own == label)
        assert (found.boxes[near] - box).abs().amax(1).min() < 0.05
