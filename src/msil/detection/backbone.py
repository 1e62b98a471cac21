"""Backbones: ResNet of torchvision's blocks and with torchvision's state-dict keys, nets of timm, the caller's own.

A backbone has out_channels, the channels of C3, C4 and C5, and its forward pass takes normalised images (N, 3, H, W), H
and W multiples of 32, to [C3, C4, C5] at strides 8, 16, 32. image_mean and image_std (RGB, 0..255 units) say how the
images are normalised. What is frozen in it stays in eval mode whatever `train` says.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops import FrozenBatchNorm2d

from msil.detection.folding import fold_norms
from msil.detection.freezing import PartlyFrozen
from msil.detection.preprocess import IMAGENET_MEAN, IMAGENET_STD
from msil.detection.timm_backbone import NORMS as TIMM_NORMS
from msil.detection.timm_backbone import TimmBackbone
from msil.detection.weights import differences, imagenet_state_dict, load_state_dict_file
from msil.errors import WeightsError

DEPTHS: dict[str, tuple[type[resnet.BasicBlock] | type[resnet.Bottleneck], list[int]]] = {
    "resnet10": (resnet.BasicBlock, [1, 1, 1, 1]),
    "resnet18": (resnet.BasicBlock, [2, 2, 2, 2]),
    "resnet34": (resnet.BasicBlock, [3, 4, 6, 3]),
    "resnet50": (resnet.Bottleneck, [3, 4, 6, 3]),
    "resnet101": (resnet.Bottleneck, [3, 4, 23, 3]),
}
NORMS: dict[str, Callable[..., nn.Module]] = {
    "bn": nn.BatchNorm2d,
    "gn": partial(nn.GroupNorm, 32),
    "eval_bn": nn.BatchNorm2d,
    "frozen_bn": FrozenBatchNorm2d,
}


class ResNet(PartlyFrozen):
    """Images -> C3, C4, C5. torchvision's ResNet without its average pool and fc.

    name: resnet10 (one basic block a stage), resnet18, resnet34, resnet50 or resnet101.
    weights: None; "imagenet" (torchvision's IMAGENET1K_V1, downloaded once); or the path of a file with the state dict
        of a torchvision ResNet of the same depth.
    style: "pytorch", stride on the bottleneck's 3x3 convolution (torchvision's weights), or "caffe", on its first 1x1
        (Detectron's). The keys and shapes are the same, so weights of the other style load and give another net.
        resnet50 and resnet101 alone have bottlenecks.
    norm: "bn", trainable BatchNorm; "gn", GroupNorm with 32 groups; "eval_bn", BatchNorm with fixed statistics and
        trainable scale and shift, always in eval mode (MMDetection's norm_eval); "frozen_bn", BatchNorm with all of it
        fixed, computed inside the convolution before it. Default: "frozen_bn" with weights, "gn" without. The last two
        of the four normalise nothing unless statistics are loaded.
    frozen_stages: 0, none; 1, the stem and layer1; ... 4, everything. Frozen parameters require no gradient, and
        frozen norms stay in eval mode whatever `train` says. Default: 1 with weights, 0 without.

    out_channels: channels of C3, C4, C5. image_mean, image_std: ImageNet's, RGB, 0..255 units.
    Raises ValueError for an unknown name, norm or number of stages, WeightsError for weights that are missing or do
    not fit.
    """

    image_mean = IMAGENET_MEAN
    image_std = IMAGENET_STD

    def __init__(
        self,
        name: str,
        *,
        weights: str | Path | None = None,
        norm: str | None = None,
        frozen_stages: int | None = None,
        style: str = "pytorch",
    ) -> None:
        super().__init__()
        if name not in DEPTHS:
            raise ValueError(f"unknown backbone {name!r}; known: {', '.join(DEPTHS)}.")
        norm = norm if norm is not None else "gn" if weights is None else "frozen_bn"
        if norm not in NORMS:
            raise ValueError(f"unknown norm {norm!r}; known: {', '.join(NORMS)}.")
        frozen_stages = _frozen_stages(frozen_stages, weights)
        if frozen_stages not in range(5):
            raise ValueError(f"frozen_stages must be 0 to 4, not {frozen_stages}.")

        block, layers = DEPTHS[name]
        if style not in ("pytorch", "caffe") or (style == "caffe" and block is resnet.BasicBlock):
            raise ValueError(
                f"style must be pytorch, or caffe for a ResNet with bottlenecks, not {style!r} for {name}."
            )
        # One class: the fc layer is thrown away, so it is not worth its usual size.
        net = resnet.ResNet(block, layers, num_classes=1, norm_layer=NORMS[norm])
        if norm == "frozen_bn":
            fold_norms(net)
        self.conv1, self.bn1, self.relu, self.maxpool = net.conv1, net.bn1, net.relu, net.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        if style == "caffe":
            for stage in (self.layer2, self.layer3, self.layer4):
                _stride_first(stage[0])
        self.out_channels = [channels * block.expansion for channels in (128, 256, 512)]
        if weights is not None:
            self._load(name, weights, norm)

        stages = [[self.conv1, self.bn1, self.layer1], [self.layer2], [self.layer3], [self.layer4]]
        frozen = [module for stage in stages[:frozen_stages] for module in stage]
        for module in frozen:
            module.requires_grad_(False)
        fixed_norms = [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)] if norm == "eval_bn" else []
        self.keep_in_eval([*frozen, *fixed_norms])

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images (N, 3, H, W) -> [C3, C4, C5], (N, out_channels[i], H / s, W / s) for s = 8, 16, 32."""
        c2 = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(images)))))
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return [c3, c4, self.layer4(c4)]

    def _load(self, name: str, weights: str | Path, norm: str) -> None:
        if weights == "imagenet":
            if norm == "gn":
                raise WeightsError(
                    "ImageNet weights come with BatchNorm and do not fit norm=gn: set model.backbone.norm to "
                    "frozen_bn, eval_bn or bn, or model.backbone.weights=null to train from scratch."
                )
            state = imagenet_state_dict(name)
        else:
            state = load_state_dict_file(weights)
        state = {key: value for key, value in state.items() if not key.startswith("fc.")}
        found = differences(self.state_dict(), state)
        if found:
            raise WeightsError(
                f"{weights} does not fit {name} with norm={norm}: it {found}; "
                f"give the file of a torchvision {name} as model.backbone.weights."
            )
        self.load_state_dict(state)


def _stride_first(block: nn.Module) -> None:
    """Move a bottleneck's stride from its 3x3 convolution to its first 1x1."""
    assert isinstance(block, resnet.Bottleneck)
    block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride


@dataclass
class ResNetOptions:
    """Arguments of ResNet, which see. Raises ValueError, naming the field, for what is outside its limits."""

    name: str = "resnet50"
    weights: str | None = None
    frozen_stages: int | None = None
    norm: str | None = None
    style: str = "pytorch"

    def __post_init__(self) -> None:
        _check("name", self.name, DEPTHS)
        _check_frozen_stages(self.frozen_stages)
        if self.norm is not None:
            _check("norm", self.norm, NORMS)
        _check("style", self.style, ("pytorch", "caffe"))
        if self.style == "caffe" and DEPTHS[self.name][0] is resnet.BasicBlock:
            raise ValueError(
                f"style=caffe is for a ResNet with bottlenecks (resnet50, resnet101), not for {self.name}."
            )

    def decided(self) -> dict[str, Any]:
        """norm and frozen_stages with what None stands for, which depends on the weights."""
        norm = ("gn" if self.weights is None else "frozen_bn") if self.norm is None else self.norm
        return {"norm": norm, "frozen_stages": _frozen_stages(self.frozen_stages, self.weights)}

    def build(self) -> ResNet:
        return ResNet(
            self.name, weights=self.weights, norm=self.norm, frozen_stages=self.frozen_stages, style=self.style
        )


@dataclass
class TimmOptions:
    """Arguments of TimmBackbone, which see. Raises ValueError, naming the field, for what is outside its limits.

    Names are checked by `build`, which imports timm.
    """

    name: str
    weights: str | None = None
    frozen_stages: int | None = None
    norm: str | None = None

    def __post_init__(self) -> None:
        _check_frozen_stages(self.frozen_stages)
        if self.norm is not None:
            _check("norm", self.norm, TIMM_NORMS)

    def decided(self) -> dict[str, Any]:
        """As ResNetOptions.decided; norm stays None for a net without BatchNorm."""
        norm = self.norm
        if norm is None and self.weights is not None:
            with torch.device("meta"):
                net = TimmBackbone(self.name)
            norm = "frozen_bn" if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules()) else None
        return {"norm": norm, "frozen_stages": _frozen_stages(self.frozen_stages, self.weights)}

    def build(self) -> TimmBackbone:
        return TimmBackbone(self.name, weights=self.weights, norm=self.norm, frozen_stages=self.frozen_stages)


BACKBONES: dict[str, type[ResNetOptions] | type[TimmOptions]] = {"resnet": ResNetOptions, "timm": TimmOptions}


def build_backbone(spec: str | ResNetOptions | TimmOptions | nn.Module) -> nn.Module:
    """A backbone from a name ("resnet50", or "timm:NAME" for timm's), from options, or the caller's own, checked.

    A module must have out_channels, and is run once on an image of 64 x 64 zeros, in eval mode and without gradients;
    modes and statistics stay as they are.

    Raises ValueError for an unknown name and for a module that is not a backbone, and what ResNet and TimmBackbone do.
    """
    if isinstance(spec, nn.Module):
        _check_module(spec)
        return spec
    if isinstance(spec, str):
        kind, name = spec.split(":", 1) if ":" in spec else ("resnet", spec)
        spec = backbone_options({"kind": kind, "name": name})
    return spec.build()


def backbone_options(values: Mapping[str, Any]) -> ResNetOptions | TimmOptions:
    """Options from plain values: "kind" ("resnet", also if absent, or "timm") and the fields of that kind.

    Raises ValueError for an unknown kind, a field that is unknown or missing, and a value outside its limits.
    """
    values = dict(values)
    kind = values.pop("kind", "resnet")
    _check("kind", kind, BACKBONES)
    fields = [field.name for field in dataclasses.fields(BACKBONES[kind])]
    for key in values:
        if key not in fields:
            nearest = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"it has {', '.join(fields)}."
            raise ValueError(f"{key} is not a field of a {kind} backbone: {hint}")
    if kind == "timm" and "name" not in values:
        raise ValueError("name is missing: give the name of a net of timm.")
    return BACKBONES[kind](**values)


def _check(field: str, value: Any, known: Sequence[str] | Mapping[str, Any]) -> None:
    if value not in known:
        raise ValueError(f"{field}={value} must be one of {', '.join(known)}.")


def _frozen_stages(given: int | None, weights: str | Path | None) -> int:
    return given if given is not None else 0 if weights is None else 1


def _check_frozen_stages(frozen_stages: int | None) -> None:
    if frozen_stages is not None and frozen_stages not in range(5):
        raise ValueError(f"frozen_stages={frozen_stages} must be from 0 to 4.")


def _check_module(net: nn.Module) -> None:
    kind = type(net).__name__
    channels: Any = getattr(net, "out_channels", None)
    if not isinstance(channels, list | tuple) or [type(count) for count in channels] != [int] * 3:
        raise ValueError(
            f"a backbone must have out_channels, three integers for C3, C4 and C5, and {kind}'s is {channels!r}."
        )
    weight = next((p for p in net.parameters() if p.is_floating_point()), torch.zeros(()))
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        with torch.no_grad():
            maps = net(torch.zeros(1, 3, 64, 64, device=weight.device, dtype=weight.dtype))
    except Exception as error:
        raise ValueError(
            f"a backbone must take images with sides of multiples of 32, and {kind} fails for 64 x 64 ({error})."
        ) from error
    finally:
        for module, training in modes:
            module.training = training
    expected = [(1, count, 64 // stride, 64 // stride) for count, stride in zip(channels, (8, 16, 32), strict=True)]
    if isinstance(maps, list | tuple) and all(isinstance(level, Tensor) for level in maps):
        given: Any = [tuple(level.shape) for level in maps]
    else:
        given = type(maps).__name__
    if given != expected:
        raise ValueError(
            f"a backbone with out_channels {list(channels)} must give maps of {expected} for an image of 64 x 64, and "
            f"{kind} gives {given}."
        )
