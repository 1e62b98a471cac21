"""Made-up checkpoints in MMDetection's and torchvision's names; MMDetection's from a small table of our own."""

from __future__ import annotations

from functools import cache

import torch
import torchvision
from torch import Tensor
from torchvision.models import detection

LEVELS = range(5)
# Channels of each 3x3 convolution behind the towers, classes as 0. FCOS: its improved form has biases in the towers.
PREDICTORS = {
    "fcos_plain": {"conv_cls": 0, "conv_reg": 4, "conv_centerness": 1},
    "fcos": {"conv_cls": 0, "conv_reg": 4, "conv_centerness": 1},
    "vfnet": {"vfnet_cls": 0, "vfnet_reg": 4, "vfnet_reg_refine": 4},
    "retinanet": {"retina_cls": 0, "retina_reg": 9 * 4},
    "atss": {"atss_cls": 0, "atss_reg": 4, "atss_centerness": 1},
    "gfl": {"gfl_cls": 0, "gfl_reg": 4 * 17},
    "tood": {"tood_cls": 0, "tood_reg": 4},
}
CONVS = {"vfnet": 3, "tood": 6}

Shapes = dict[str, tuple[int, ...]]


def shapes(head: str, backbone: str, channels: int, classes: int) -> Shapes:
    """Names and shapes of a whole detector of MMDetection's."""
    with torch.device("meta"):
        body = torchvision.models.get_model(backbone).state_dict()
    found = {f"backbone.{key}": tuple(value.shape) for key, value in body.items() if not key.startswith("fc.")}
    stages = (128, 256, 512) if backbone == "resnet18" else (512, 1024, 2048)
    for i, width in enumerate(stages):
        found |= _conv(f"neck.lateral_convs.{i}.conv", width, channels, 1)
    for i in LEVELS:
        width = stages[-1] if i == 3 and head == "retinanet" else channels  # P6 from C5
        found |= _conv(f"neck.fpn_convs.{i}.conv", width, channels)
    return found | {f"bbox_head.{key}": shape for key, shape in head_shapes(head, channels, classes).items()}


def head_shapes(head: str, channels: int, classes: int, convs: int | None = None) -> Shapes:
    convs = convs or CONVS.get(head, 4)
    found: Shapes = {} if head == "retinanet" else {f"scales.{i}.scale": () for i in LEVELS}
    towers = ["inter_convs"] if head == "tood" else ["cls_convs", "reg_convs"]
    for name in (f"{tower}.{i}" for tower in towers for i in range(convs)):
        if head == "retinanet":
            found |= _conv(f"{name}.conv", channels, channels)
        else:
            found |= _conv_gn(name, channels, bias=head == "fcos")
    for name, width in PREDICTORS[head].items():
        found |= _conv(name, channels, width or classes * (9 if head == "retinanet" else 1))
    if head == "gfl":
        found["integral.project"] = (17,)
    if head == "vfnet":
        found |= _conv_gn("vfnet_reg_conv", channels)
        found |= {f"scales_refine.{i}.scale": () for i in LEVELS}
        found |= {f"vfnet_{name}_dconv.weight": (channels, channels, 3, 3) for name in ("cls", "reg_refine")}
    if head == "tood":
        for name in ("cls_decomp", "reg_decomp"):
            found |= _conv(f"{name}.layer_attention.0", convs * channels, channels // 8, 1)
            found |= _conv(f"{name}.layer_attention.2", channels // 8, convs, 1)
            found[f"{name}.reduction_conv.conv.weight"] = (channels, convs * channels, 1, 1)
            found |= {f"{name}.reduction_conv.gn.{end}": (channels,) for end in ("weight", "bias")}
        for name, width in (("cls_prob_module", 1), ("reg_offset_module", 8)):
            found |= _conv(f"{name}.0", convs * channels, channels // 4, 1)
            found |= _conv(f"{name}.2", channels // 4, width)
    return found


def _conv(name: str, width_in: int, width: int, size: int = 3) -> Shapes:
    return {f"{name}.weight": (width, width_in, size, size), f"{name}.bias": (width,)}


def _conv_gn(name: str, channels: int, bias: bool = False) -> Shapes:
    norm = {f"{name}.gn.weight": (channels,), f"{name}.gn.bias": (channels,)}
    conv = _conv(f"{name}.conv", channels, channels)
    return norm | {key: shape for key, shape in conv.items() if bias or key.endswith("weight")}


@cache
def mmdet_state(head: str, backbone: str = "resnet18", classes: int = 80) -> dict[str, Tensor]:
    """A small file: the i-th tensor is i everywhere, and takes the room of one number."""
    found = shapes(head, backbone, 32, classes)
    return {key: torch.tensor(float(i)).expand(shape) for i, (key, shape) in enumerate(found.items())}


def torchvision_state(name: str, classes: int) -> dict[str, Tensor]:
    """The keys of torchvision's detector, in the room of one number each."""
    with torch.device("meta"):
        model = detection.__dict__[name](weights=None, weights_backbone=None, num_classes=classes)
    return {key: torch.zeros(()).expand(value.shape) for key, value in model.state_dict().items()}
