"""Backbones: ResNet of torchvision's blocks and with torchvision's state-dict keys, nets of timm, the caller's own.

A backbone has out_channels, the channels of C3, C4 and C5, and its forward pass takes normalised images (N, 3, H, W), H
and W multiples of 32, to [C3, C4, C5] at strides 8, 16, 32. image_mean and image_std (RGB, 0..255 units) are those of
its weights. Frozen modules stay in eval mode after train().
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import resnet
from torchvision.ops import FrozenBatchNorm2d

from msil.detection.folding import fold_norms
from msil.detection.preprocess import IMAGENET_MEAN, IMAGENET_STD
from msil.detection.weights import FROM_SCRATCH, differences, imagenet_state_dict, load_state_dict_file
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
STAGES = (*range(5), None)  # of frozen_stages


@dataclass
class ResNetOptions:
    """Arguments of ResNet. Raises ValueError, naming the field, for a value outside its limits."""

    name: str = "resnet50"
    weights: str | None = None
    frozen_stages: int | None = None
    norm: str | None = None
    style: str = "pytorch"

    def __post_init__(self) -> None:
        _check("name", self.name, list(DEPTHS))
        _check("frozen_stages", self.frozen_stages, STAGES)
        _check("norm", self.norm, [*NORMS, None])
        _check("style", self.style, ["pytorch", "caffe"])
        if self.style == "caffe" and DEPTHS[self.name][0] is resnet.BasicBlock:
            raise ValueError(
                f"style=caffe is for a ResNet with bottlenecks (resnet50, resnet101), not for {self.name}."
            )

    def decided(self) -> dict[str, Any]:
        """norm and frozen_stages, their defaults, which depend on the weights, resolved."""
        norm = ("gn" if self.weights is None else "frozen_bn") if self.norm is None else self.norm
        return {"norm": norm, "frozen_stages": default_stages(self.frozen_stages, self.weights)}

    def build(self) -> ResNet:
        return ResNet(**vars(self))


@dataclass
class TimmOptions:
    """Arguments of TimmBackbone. Raises ValueError, naming the field, for a value outside its limits.

    The name is checked by `build`, which imports timm.
    """

    name: str
    weights: str | None = None
    frozen_stages: int | None = None
    norm: str | None = None

    def __post_init__(self) -> None:
        _check("frozen_stages", self.frozen_stages, STAGES)
        _check("norm", self.norm, ["bn", "eval_bn", "frozen_bn", None])

    def decided(self) -> dict[str, Any]:
        """As ResNetOptions.decided; norm stays None for a net without BatchNorm."""
        norm = self.norm
        if norm is None and self.weights is not None:
            with torch.device("meta"):
                net = TimmOptions(self.name).build()
            norm = "frozen_bn" if any(isinstance(module, _BatchNorm) for module in net.modules()) else None
        return {"norm": norm, "frozen_stages": default_stages(self.frozen_stages, self.weights)}

    def build(self) -> PartlyFrozen:
        from msil.detection.timm_backbone import TimmBackbone

        return TimmBackbone(**vars(self))


BACKBONES: dict[str, type[ResNetOptions] | type[TimmOptions]] = {"resnet": ResNetOptions, "timm": TimmOptions}


def build_backbone(spec: str | ResNetOptions | TimmOptions | nn.Module) -> nn.Module:
    """A backbone from a name ("resnet50", or "timm:NAME"), from options, or the caller's own module.

    A module must have out_channels, and is run once on an image of 64 x 64 zeros, in eval mode and without gradients;
    modes and statistics stay as they are.

    Raises ValueError for an unknown name and for a module that is not a backbone, and what ResNet and TimmBackbone do.
    """
    if isinstance(spec, nn.Module):
        _check_module(spec)
        return spec
    if isinstance(spec, str):
        kind, name = spec.split(":", 1) if ":" in spec else ("resnet", spec)
        _check("kind", kind, list(BACKBONES))
        spec = BACKBONES[kind](name)
    return spec.build()


def default_stages(given: int | None, weights: str | Path | None) -> int:
    """frozen_stages, by default 1 with weights and 0 without."""
    return given if given is not None else 0 if weights is None else 1


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside the context; afterwards every module is in its own mode again."""
    modes = [(one, one.training) for one in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for one, training in modes:
            one.training = training


class PartlyFrozen(nn.Module):
    """A module of which those named by `keep_in_eval` stay in eval mode after train()."""

    _always_eval: tuple[nn.Module, ...] = ()

    def keep_in_eval(self, modules: Iterable[nn.Module]) -> None:
        self._always_eval = tuple(modules)  # a tuple, so that nothing is registered a second time
        self.train()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self._always_eval:
            module.eval()
        return self


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
        frozen norms stay in eval mode after train(). Default: 1 with weights, 0 without.

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
        given = None if weights is None else str(weights)
        decided = ResNetOptions(name, given, frozen_stages, norm, style).decided()
        norm = str(decided["norm"])
        block, layers = DEPTHS[name]
        net = resnet.ResNet(block, layers, num_classes=1, norm_layer=NORMS[norm])  # its fc is dropped
        if norm == "frozen_bn":
            fold_norms(net)
        self.conv1, self.bn1, self.relu, self.maxpool = net.conv1, net.bn1, net.relu, net.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        if style == "caffe":
            for stage in (self.layer2, self.layer3, self.layer4):
                first: Any = stage[0]
                first.conv1.stride, first.conv2.stride = first.conv2.stride, first.conv1.stride
        self.out_channels = [channels * block.expansion for channels in (128, 256, 512)]
        if weights is not None:
            self._load(name, weights, norm)

        stages = [[self.conv1, self.bn1, self.layer1], [self.layer2], [self.layer3], [self.layer4]]
        frozen = [module for stage in stages[: decided["frozen_stages"]] for module in stage]
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
                    f"frozen_bn, eval_bn or bn, or {FROM_SCRATCH}."
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


def _check(field: str, value: Any, known: Sequence[Any]) -> None:
    if value not in known:
        raise ValueError(f"{field}={value} must be one of {', '.join(str(one) for one in known if one is not None)}.")


def _check_module(net: nn.Module) -> None:
    kind, channels = type(net).__name__, getattr(net, "out_channels", ())
    weight = next((p for p in net.parameters() if p.is_floating_point()), torch.zeros(()))
    try:
        wanted = [(1, count, 64 // stride, 64 // stride) for count, stride in zip(channels, (8, 16, 32), strict=True)]
        with eval_mode(net), torch.no_grad():
            maps = net(torch.zeros(1, 3, 64, 64, device=weight.device, dtype=weight.dtype))
        found = [tuple(level.shape) for level in maps]
    except Exception as error:  # whatever a forward raises
        raise ValueError(
            f"{kind} is no backbone, which has out_channels, three integers, and takes images with sides of multiples "
            f"of 32 to a list of three maps, for 64 x 64 pixels: {error}."
        ) from error
    if found != wanted:
        raise ValueError(f"{kind} with out_channels {list(channels)} must give maps of {wanted}, not {found}.")
