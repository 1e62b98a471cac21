"""From settings to a detector. What a head's or a backbone's own settings may be stands with that head or backbone."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import nn

from msil.config import Apply, ModelConfig, MSILConfig
from msil.detection import Detector
from msil.detection.backbone import BACKBONES, DEPTHS, ResNetOptions, TimmOptions, build_backbone
from msil.detection.detector import fpn_of
from msil.detection.heads import DenseHead, HeadOptions, head_class
from msil.detection.timm_backbone import check_name, import_timm
from msil.detection.torchvision_detector import AnyDetector, TorchvisionDetector
from msil.detection.torchvision_detector import check_name as check_detector
from msil.errors import ConfigError

Options = TypeVar("Options")
Class = TypeVar("Class")

# Settings of detection, of which null means the detector's own default.
DETECTION = ("score_thresh", "nms_thresh", "topk_candidates", "detections_per_img", "test_scales", "test_flip")
_USUAL = {
    name: usual for name, usual in vars(MSILConfig()).items() if name not in ("block", "options")
}  # MSIL's switches
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}


def detector_from_config(model: ModelConfig, num_classes: int, min_size: int, max_size: int) -> AnyDetector:
    """The detector that `model` describes, resizing images to min_size and max_size in predict.

    model.weights is not read here: see msil.checkpoints.load. Raises ConfigError for settings that cannot be built.
    """
    if model.detector is not None:
        return TorchvisionDetector(
            model.detector,
            num_classes,
            backbone_weights=model.detector_weights,
            msil=None if model.msil.apply == Apply.none else {name: getattr(model.msil, name) for name in _USUAL},
            min_size=min_size,
            max_size=max_size,
            limits={name: getattr(model, name) for name in ("score_thresh", "nms_thresh", "detections_per_img")},
        )
    backbone = backbone_options(model.backbone).build()
    options = head_options(model.head)
    fpn = fpn_of(backbone, options, model.channels)
    head = _head_class(model.head)(num_classes, model.channels, **vars(options))
    head.set_msil(_interaction(model))  # last: one seed, one start of all else
    return Detector(
        backbone,
        fpn,
        head,
        min_size=min_size,
        max_size=max_size,
        image_mean=model.image_mean,
        image_std=model.image_std,
        channel_order=str(model.channel_order),
        **{name: value for name in DETECTION if (value := getattr(model, name)) is not None},
    )


def check_model(model: ModelConfig) -> None:
    """Raises ConfigError for settings of the head, the backbone or the block that cannot be built; builds none of the
    first two."""
    if model.detector is not None:
        check_detector(model.detector, with_msil=model.msil.apply != Apply.none)
        return
    groups = head_options(model.head).norm_groups
    if groups is not None and model.channels % groups:
        raise ConfigError(f"model.channels={model.channels} must be a multiple of model.head.norm_groups={groups}.")
    backbone = backbone_options(model.backbone)
    if isinstance(backbone, TimmOptions):
        check_name(import_timm(), backbone.name)
    elif isinstance(backbone, OwnBackbone):
        backbone.called()
    _interaction(model)


def head_options(values: Mapping[str, Any]) -> HeadOptions:
    """model.head as the options of the head of that name, a registered one or package.module.Class."""
    return _typed(_head_class(values).Options, values, "model.head", ("name",))


def _head_class(values: Mapping[str, Any]) -> type[DenseHead]:
    name = str(values.get("name"))
    if "." in name:
        return _imported(name, DenseHead, "model.head.name")
    try:
        return head_class(name)
    except ValueError as error:
        raise ConfigError(f"model.head.name: {error}") from error


@dataclass(frozen=True)
class OwnBackbone:
    """A backbone of the user's own, package.module.Class. values: model.backbone."""

    name: str
    values: Mapping[str, Any]

    def decided(self) -> dict[str, Any]:
        return {}

    def called(self) -> tuple[type[nn.Module], dict[str, Any]]:
        """The class and its arguments: of the settings beside the name those that differ from the ResNets' defaults,
        which come with the group that the name stands in; null leaves the class's own default, but of weights, where
        it is none. Raises ConfigError for a class that cannot be imported or does not take them."""
        kind, usual = _imported(self.name, nn.Module, "model.backbone.name"), vars(ResNetOptions())
        signature = inspect.signature(kind)
        values = {key: value for key, value in self.values.items() if key not in ("name", "kind")}
        given = {key: value for key, value in values.items() if value != usual.get(key)}
        if "weights" in signature.parameters:
            given["weights"] = values.get("weights")
        try:
            signature.bind(**given)
        except TypeError as error:
            raise ConfigError(
                f"model.backbone.name={self.name}: {error}; its arguments stand beside model.backbone.name."
            ) from error
        return kind, given

    def build(self) -> nn.Module:
        """Raises ConfigError for a class that cannot be built or is no backbone."""
        kind, given = self.called()
        try:
            return build_backbone(kind(**given))
        except Exception as error:  # whatever its constructor raises
            raise ConfigError(f"model.backbone.name={self.name}: {_line(error)}") from error


def backbone_options(values: Mapping[str, Any]) -> ResNetOptions | TimmOptions | OwnBackbone:
    """model.backbone as the options of its kind."""
    kind, name = str(values.get("kind", "resnet")), str(values.get("name", "resnet50"))
    if kind not in BACKBONES:
        raise ConfigError(f"model.backbone.kind={kind} must be one of {', '.join(BACKBONES)}.")
    if kind == "resnet" and "." in name:
        return OwnBackbone(name, values)
    if kind == "resnet" and name not in DEPTHS:
        raise ConfigError(
            f"model.backbone.name={name} must be one of {', '.join(DEPTHS)}, or package.module.Class of your own "
            "(docs/extending.md); for a net of timm add model/backbone=timm."
        )
    return _typed(BACKBONES[kind], values, "model.backbone", ("kind",))


def _typed(kind: type[Options], values: Mapping[str, Any], where: str, beside: tuple[str, ...]) -> Options:
    """`values` as an object of the dataclass `kind`; those of `beside` are not its fields."""
    hints = get_type_hints(kind)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    given = {}
    for name, value in values.items():
        if name in fields:
            given[name] = _converted(value, fields[name], f"{where}.{name}")
        elif name not in beside and value is not None:  # files of earlier versions have null for other heads' settings
            raise ConfigError(f"{where}.{name}={value} has no meaning for {where}.name={values.get('name')}.")
    try:
        return kind(**given)
    except ValueError as error:
        raise ConfigError(f"{where}.{error}") from error


def _converted(value: Any, hint: Any, name: str) -> Any:
    """`value` with lists as tuples. Raises ConfigError if it is not of the type."""
    if get_origin(hint) is tuple and isinstance(value, list | tuple):
        return tuple(_converted(item, get_args(hint)[0], name) for item in value)
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if type(value) in kinds or (type(value) is int and float in kinds):
        return value
    wanted = " or ".join(_WORDS.get(kind, "a list") for kind in kinds)
    raise ConfigError(f"{name}={'null' if value is None else value} must be {wanted}.")


def _interaction(model: ModelConfig) -> nn.Module | dict[str, Any] | None:
    """The block: MSIL's switches, or a block of the user's own, tried once."""
    msil = model.msil
    switches = {name: getattr(msil, name) for name in _USUAL}
    if not isinstance(msil.options, dict | None):
        raise ConfigError(f"model.msil.options={msil.options} must be a dict, as in 'model.msil.options={{depth: 2}}'.")
    if msil.block is None:
        if msil.options:
            raise ConfigError("model.msil.options are the arguments of model.msil.block: give that too.")
        return switches
    if msil.apply == Apply.none:
        return None
    if changed := [name for name, usual in _USUAL.items() if switches[name] != usual]:
        raise ConfigError(
            f"model.msil.{changed[0]}={switches[changed[0]]} is a switch of MSIL and has no effect on "
            f"model.msil.block={msil.block}: leave it out, or give such settings under model.msil.options."
        )
    kind = _imported(msil.block, nn.Module, "model.msil.block")
    try:
        block = kind(model.channels, **(msil.options or {}))
        training = block.training
        for height, width in ((4, 6), (3, 5), (1, 1)):  # even, odd, and P7 of a small image
            _try(block.eval(), (2, model.channels, height, width))
    except Exception as error:  # whatever a block raises
        raise ConfigError(f"model.msil.block={msil.block} with {model.channels} channels: {_line(error)}") from error
    for key, parameter in block.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            raise ConfigError(
                f"model.msil.block={msil.block}: its parameter {key} gets no gradient, which training on several "
                "processes refuses: use it, or freeze it (requires_grad=False)."
            )
    block.zero_grad(set_to_none=True)
    return block.train(training)


@torch.enable_grad()
def _try(block: nn.Module, shape: tuple[int, ...]) -> None:
    """One step of the block on two features of that shape."""
    # As towers end: a ReLU, whose backward needs its own output, forbids changing it in place.
    features = [torch.full(shape, 0.5, requires_grad=True).relu() for _ in range(2)]
    try:
        found = block(*features)
        torch.stack([feature.sum() for feature in found]).sum().backward()
    except Exception as error:
        raise ValueError(f"it fails on two features {shape}, or in their backward pass: {error}") from error
    shapes = [tuple(feature.shape) for feature in found]
    if shapes != [shape] * 2:
        raise ValueError(f"it must return two features of the shape of its inputs, {shape}, not {shapes}.")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _imported(path: str, base: type[Class], setting: str) -> type[Class]:
    """The class at package.module.Class, which must be a `base`."""
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the module raises; ValueError: no dot
        raise ConfigError(
            f"{setting}={path} cannot be imported ({_line(error)}): give package.module.Class of a package that is "
            "installed or on PYTHONPATH."
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise ConfigError(f"{setting}={path} must be a subclass of {base.__name__}.")
    return kind
