"""Whole imported detectors, run end to end: against their parts and torchvision's own nets."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import mmdetection
from benchmarks.compare import NotRun
from tests.detection.reference import PLAIN
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.detection import RetinaNet, fcos_resnet50_fpn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from msil.checkpoints.convert import import_checkpoint
from msil.checkpoints.layouts import COCO_CATEGORY_IDS
from msil.checkpoints.load import load_detector
from msil.detection import FCOSHead, VFNetHead
from msil.detection.backbone import ResNet
from msil.detection.fpn import FPN
from msil.detection.weights import from_mmdet

from .theirs import head_shapes, shapes


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return from_mmdet({key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)})


@pytest.mark.parametrize(("form", "style"), [("fcos_plain", "caffe"), ("vfnet", "pytorch")])
@torch.no_grad()
def test_an_imported_detector_is_the_sum_of_its_parts(form: str, style: str, golden, tmp_path: Path) -> None:
    """What backbone, neck and head give that are loaded by themselves, on an image prepared by hand."""
    empty = {key: torch.zeros(shape) for key, shape in shapes(form, "resnet50", 256, 80).items()}
    state = golden.fill(empty, 3)
    torch.save(state, tmp_path / "theirs.pth")
    options = {"style": style, "head": form if form == "fcos_plain" else None}
    import_checkpoint(tmp_path / "theirs.pth", "mmdet", tmp_path / "ours.safetensors", **options)
    detector, _ = load_detector(tmp_path / "ours.safetensors")
    # 96 x 128 is a multiple of 32: no padding. Uneven in colour, so that swapped channels show.
    image = torch.randint(0, 256, (3, 96, 128), generator=torch.Generator().manual_seed(5))
    image = (image * torch.tensor([1.0, 0.6, 0.3])[:, None, None]).to(torch.uint8)
    detector.min_size, detector.max_size = 96, 128
    (found,) = detector.predict([image])
    with torch.device("meta"):  # no time for weights that are replaced at once
        body = ResNet("resnet50", style=style, norm="frozen_bn" if style == "caffe" else "eval_bn")
        neck = FPN([512, 1024, 2048])
        head = VFNetHead(80) if form == "vfnet" else FCOSHead(80, **PLAIN)
    body.load_state_dict(part(state, "backbone."), strict=False, assign=True)  # without the batch counters
    neck.load_state_dict(part(state, "neck."), assign=True)
    head.load_state_dict(part(state, "bbox_head."), assign=True)
    for module in (body, neck, head):
        module.eval()
    if style == "caffe":  # the first Detectron's mean, BGR
        mean, std, pixels = [102.9801, 115.9465, 122.7717], [1.0, 1.0, 1.0], image[[2, 1, 0]]
    else:
        mean, std, pixels = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375], image
    inputs = (pixels.float() - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    predictions = head(neck(body(inputs[None].contiguous(memory_format=torch.channels_last))))
    (expected,) = head.detect(predictions, [(96, 128)], nms_thresh=0.5 if form == "fcos_plain" else 0.6)
    assert len(expected.boxes) == 100
    for name in ("boxes", "scores", "labels"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("form", ["fcos", "vfnet", "retinanet", "atss", "gfl", "tood"])
def test_made_up_heads_have_mmdetections_names_and_shapes(form: str) -> None:
    make: Any = getattr(mmdetection, f"{form}_head")
    try:
        with torch.device("meta"):
            head = make(80, 0) if form == "tood" else make(80)
    except NotRun as reason:
        pytest.skip(str(reason))
    expected = head_shapes("fcos_plain" if form == "fcos" else form, 256, 80, convs=4)  # without biases in the towers
    # Its star convolutions are compiled operators, for which others stand in.
    expected = {key: shape for key, shape in expected.items() if "_dconv" not in key}
    assert {key: tuple(value.shape) for key, value in head.state_dict().items()} == expected


@torch.no_grad()
def their_outputs(model: FCOS | RetinaNet, image: Tensor) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    """torchvision's raw head outputs (1, P, ...), and what makes boxes (P, 4) of regression outputs (P, 4)."""
    images: ImageList = model.transform([image / 255])[0]
    assert images.tensors.shape[-2:] == image.shape[-2:]
    features = list(model.backbone(images.tensors).values())
    coder: Any = model.box_coder
    decode = coder.decode if isinstance(model, FCOS) else coder.decode_single
    anchors = model.anchor_generator(images, features)[0]
    return model.head(features), lambda values: decode(values, anchors)


@torch.no_grad()
def test_raw_outputs_of_fcos_are_torchvisions(golden, tmp_path: Path) -> None:
    theirs = fcos_resnet50_fpn(weights=None, weights_backbone=None, min_size=128, max_size=256).eval()
    theirs.load_state_dict(golden.fill(theirs.state_dict(), 7))
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    import_checkpoint(tmp_path / "theirs.pth", "torchvision", tmp_path / "ours.safetensors")
    ours = load_detector(tmp_path / "ours.safetensors")[0]
    # A multiple of every stride: only there are torchvision's steps between points the strides.
    image = torch.randint(0, 256, (3, 128, 256), generator=torch.Generator().manual_seed(8), dtype=torch.uint8)
    expected, decode = their_outputs(theirs, image)
    found = ours([image])
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found.logits, expected["cls_logits"][..., list(COCO_CATEGORY_IDS)], **close)
    torch.testing.assert_close(found.quality, expected["bbox_ctrness"].squeeze(-1), **close)
    decoded = ours.head.coder.decode(ours.head.priors_of(found), found.box)
    torch.testing.assert_close(decoded[0], decode(expected["bbox_regression"][0]), rtol=1e-4, atol=1e-2)


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


@pytest.mark.parametrize("kind", ["v1", "v1 before 0.13", "v2"])
@torch.no_grad()
def test_raw_outputs_of_retinanet_are_torchvisions(kind: str, golden, tmp_path: Path) -> None:
    """On 256 x 256, where torchvision's strides are exact."""
    version, old = kind[:2], kind.endswith("0.13")
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
    saved = {before_0_13(key) if old else key: value for key, value in theirs.state_dict().items()}
    torch.save(saved, tmp_path / "theirs.pth")
    import_checkpoint(tmp_path / "theirs.pth", "torchvision", tmp_path / "ours.safetensors")
    ours = load_detector(tmp_path / "ours.safetensors")[0]
    ours.min_size = ours.max_size = 256
    expected, decode = their_outputs(theirs, image)
    found = ours([image])
    for own, values in ((found.logits, expected["cls_logits"][..., list(COCO_CATEGORY_IDS)]),
                        (found.box, expected["bbox_regression"])):  # fmt: skip
        torch.testing.assert_close(own, values, rtol=1e-4, atol=1e-4 * float(values.abs().max()))
    small = expected["bbox_regression"] / expected["bbox_regression"].abs().max()  # as a trained net's
    decoded = ours.head.coder.decode(ours.head.priors_of(found), small)
    torch.testing.assert_close(decoded[0], decode(small[0]), rtol=1e-4, atol=1e-2)
