"""The configuration that MMDetection's checkpoints carry as Python text, read without executing it.

1.x and 2.x: meta["config"], with img_norm_cfg and its steps in the pipelines, and meta["CLASSES"].
3.x: meta["cfg"], with model.data_preprocessor, and meta["dataset_meta"]["classes"]. Defaults are MMDetection 3.3's.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping
from typing import Any

from msil.checkpoints.conventions import (
    MAX_SIZE,
    MIN_SIZE,
    Backbone,
    Form,
    Head,
    Images,
    Selection,
    Settings,
)
from msil.errors import WeightsError

HEADS = {"FCOSHead": "fcos", "VFNetHead": "vfnet"}
DETECTORS = ("FCOS", "VFNet", "SingleStageDetector")
BOX_LOSSES = {"IoULoss": "iou", "GIoULoss": "giou"}
RESNETS = (18, 34, 50, 101)

# Keys whose other values make another net: MMDetection's default, and what ours has.
Spec = Mapping[str, tuple[Any, tuple[Any, ...]]]
_BACKBONE: Spec = {
    "num_stages": (4, (4,)),
    "out_indices": ([0, 1, 2, 3], ([0, 1, 2, 3],)),
    "strides": ([1, 2, 2, 2], ([1, 2, 2, 2],)),
    "dilations": ([1, 1, 1, 1], ([1, 1, 1, 1],)),
    "in_channels": (3, (3,)),
    "stem_channels": (None, (64, None)),
    "base_channels": (64, (64,)),
    "deep_stem": (False, (False,)),
    "avg_down": (False, (False,)),
    "conv_cfg": (None, (None,)),
    "dcn": (None, (None,)),
    "plugins": (None, (None,)),
}
_NECK: Spec = {
    "start_level": (0, (1,)),
    "end_level": (-1, (-1, 3)),
    "num_outs": (5, (5,)),
    "relu_before_extra_convs": (False, (True,)),
    "conv_cfg": (None, (None,)),
    "norm_cfg": (None, (None,)),
    "act_cfg": (None, (None,)),
    "upsample_cfg": ({"mode": "nearest"}, ({"mode": "nearest"},)),
}
_RANGES = [[-1, 64], [64, 128], [128, 256], [256, 512], [512, 1e8]]
_HEAD: Spec = {
    "regress_ranges": (_RANGES, (_RANGES,)),
    "strides": ([4, 8, 16, 32, 64], ([8, 16, 32, 64, 128],)),
    "dcn_on_last_conv": (False, (False,)),
    "conv_cfg": (None, (None,)),
}
_VFNET: Spec = {
    "use_atss": (True, (True,)),
    "bbox_norm_type": ("reg_denom", ("reg_denom",)),
    "gradient_mul": (0.1, (0.1,)),
    "use_vfl": (True, (True,)),
}
_ANCHORS: Spec = {
    "octave_base_scale": (8, (8,)),
    "scales_per_octave": (1, (1,)),
    "ratios": ([1.0], ([1.0],)),
    "center_offset": (0.0, (0.0,)),
    "strides": ([8, 16, 32, 64, 128], ([8, 16, 32, 64, 128],)),
}


def parse_config(text: str) -> dict[str, Any]:
    """The top-level settings that are literals, dict(...) and {...}; tuples come as lists. Others are left out.

    Nothing is executed or looked up. Text that is no Python gives {}, aside from a first line with the file's name.
    """
    first, _, rest = text.partition("\n")
    try:
        statements = ast.parse(rest if first.rstrip().endswith(".py") else text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: nested without end
        return {}
    config = {}
    for statement in statements:
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target = statement.targets[0]
            if isinstance(target, ast.Name):
                try:
                    config[target.id] = _value(statement.value)
                except (ValueError, RecursionError):
                    continue
    return config


def config_of(meta: Mapping[str, Any]) -> dict[str, Any] | None:
    """The whole configuration in a checkpoint's meta; None where there is none, or only a part that refers to files."""
    for key in ("cfg", "config"):
        text = meta.get(key)
        config = parse_config(text) if isinstance(text, str) else {}
        if isinstance(config.get("model"), dict) and "_base_" not in config:
            return config
    return None


def classes_of(meta: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The class names in a checkpoint's meta, if it has any."""
    dataset = meta.get("dataset_meta")
    places = [meta, dataset] if isinstance(dataset, Mapping) else [meta]
    for place in places:
        for key in ("classes", "CLASSES"):
            names = place.get(key)
            if isinstance(names, str):
                return (names,)
            if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
                return tuple(names)
    return None


def settings_of(config: Mapping[str, Any]) -> Settings:
    """What the detector of a configuration is in our settings.

    Raises WeightsError, naming the key and its value, for a detector that is not FCOS or VFNet on a ResNet and an FPN
    as published (deformable convolutions, ResNeXt, other strides ...), or a configuration that does not say how
    images are normalised.
    """
    try:
        return _settings(config)
    except (TypeError, ValueError, AttributeError) as error:
        raise WeightsError(
            f"the checkpoint's config is not as MMDetection writes it ({error}): take a checkpoint of its 2.x or 3.x."
        ) from error


def _settings(config: Mapping[str, Any]) -> Settings:
    model = _dict(config, "model", "")
    if _kind(model) not in DETECTORS:
        raise _refused("model.type", _kind(model), "FCOS and VFNet")
    head = _head(_dict(model, "bbox_head", "model."))
    tests = model.get("test_cfg")
    if not isinstance(tests, dict):  # up to 2.0 it was outside the model; 3.x has the test loop's there
        outside = config.get("test_cfg")
        tests = outside if isinstance(outside, dict) and "type" not in outside else {}
    _check_neck(_dict(model, "neck", "model."))
    return Settings(_backbone(_dict(model, "backbone", "model.")), head, _images(config, model), _selection(tests))


def _backbone(node: dict[str, Any]) -> Backbone:
    where = "model.backbone."
    if _kind(node) != "ResNet":
        raise _refused(f"{where}type", _kind(node), "ResNet")
    if node.get("depth") not in RESNETS:
        raise _refused(f"{where}depth", node.get("depth"), ", ".join(map(str, RESNETS)))
    _check(node, _BACKBONE, where)
    style = node.get("style", "pytorch")
    if style not in ("pytorch", "caffe"):
        raise _refused(f"{where}style", style, "pytorch and caffe")
    norm = node.get("norm_cfg", {"type": "BN", "requires_grad": True})
    if not isinstance(norm, dict) or _kind(norm) not in ("BN", "BN2d", "SyncBN"):
        raise _refused(f"{where}norm_cfg", norm, "BN and SyncBN")
    _check(norm, {"eps": (1e-5, (1e-5,))}, f"{where}norm_cfg.")
    kind = "bn" if not node.get("norm_eval", True) else "eval_bn" if norm.get("requires_grad", True) else "frozen_bn"
    # -1 is none here; 0, the stem alone, is not to be had.
    return Backbone(f"resnet{node['depth']}", style, kind, max(int(node.get("frozen_stages", -1)), 0))


def _check_neck(node: dict[str, Any]) -> None:
    where = "model.neck."
    if _kind(node) != "FPN":
        raise _refused(f"{where}type", _kind(node), "FPN")
    _check(node, _NECK, where)
    extra = node.get("add_extra_convs", False)
    if extra is True:
        extra = "on_input" if node.get("extra_convs_on_inputs", True) else "on_output"
    if extra != "on_output":
        raise _refused(f"{where}add_extra_convs", extra, "on_output")


def _head(node: dict[str, Any]) -> Head:
    where = "model.bbox_head."
    if _kind(node) not in HEADS:
        raise _refused(f"{where}type", _kind(node), " and ".join(HEADS))
    name = HEADS[_kind(node)]
    _check(node, _HEAD, where)
    if name == "vfnet":
        _check(node, _VFNET, where)
        _check(node.get("anchor_generator", {}), _ANCHORS, f"{where}anchor_generator.")
    norm = node.get("norm_cfg", {"type": "GN", "num_groups": 32})
    if not isinstance(norm, dict) or _kind(norm) != "GN":
        raise _refused(f"{where}norm_cfg", norm, "GN")
    _check(norm, {"eps": (1e-5, (1e-5,))}, f"{where}norm_cfg.")
    classes = node.get("num_classes")
    return Head(
        name,
        num_convs=int(node.get("stacked_convs", 4)),
        channels=int(node.get("feat_channels", 256)),
        norm_groups=int(norm.get("num_groups", 32)),
        form=_form(node, where) if name == "fcos" else None,
        num_classes=classes if isinstance(classes, int) else None,
    )


def _form(node: dict[str, Any], where: str) -> Form:
    loss = node.get("loss_bbox", {"type": "IoULoss"})
    kind = _kind(loss) if isinstance(loss, dict) else str(loss)
    if kind == "IoULoss":
        _check(loss, {"linear": (False, (False,)), "mode": ("log", ("log",))}, f"{where}loss_bbox.")
    if kind not in BOX_LOSSES:
        raise _refused(f"{where}loss_bbox.type", kind, " and ".join(BOX_LOSSES))
    return Form(
        conv_bias=node.get("conv_bias", "auto") is True,  # auto: none beside a norm
        center_sampling=bool(node.get("center_sampling", False)),
        center_sample_radius=float(node.get("center_sample_radius", 1.5)),
        centerness_on_reg=bool(node.get("centerness_on_reg", False)),
        norm_on_bbox=bool(node.get("norm_on_bbox", False)),
        loss_bbox=BOX_LOSSES[kind],
    )


def _images(config: Mapping[str, Any], model: dict[str, Any]) -> Images:
    steps = list(_test_steps(config))
    for step in steps:
        if _kind(step) == "LoadImageFromFile":
            _check(step, {"channel_order": ("bgr", ("bgr",))}, "the test pipeline's LoadImageFromFile.")
    preprocessor = model.get("data_preprocessor", config.get("data_preprocessor"))
    normalize = next((step for step in steps if _kind(step) == "Normalize"), config.get("img_norm_cfg"))
    if isinstance(preprocessor, dict) and preprocessor.get("mean") is not None:
        _check(preprocessor, {"pad_size_divisor": (1, (1, 32))}, "model.data_preprocessor.")
        found, rgb = preprocessor, bool(preprocessor.get("bgr_to_rgb", False))
    elif isinstance(normalize, dict):
        found, rgb = normalize, bool(normalize.get("to_rgb", True))
    else:
        raise WeightsError(
            "the checkpoint's config says nowhere how images are normalised (model.data_preprocessor.mean or "
            "img_norm_cfg): take a checkpoint with the whole config of MMDetection 2.x or 3.x."
        )
    min_size, max_size = _image_size(steps)
    mean, std = (_three(found.get(key), key) for key in ("mean", "std"))
    return Images("rgb" if rgb else "bgr", mean, std, min_size, max_size)


def _image_size(steps: list[dict[str, Any]]) -> tuple[int, int]:
    """(short side, long side) of the images that the net is tested on."""
    for step in steps:
        scale = step.get("img_scale", step.get("scale"))
        if _kind(step) == "Resize" and not step.get("keep_ratio", "scale" not in step):
            raise _refused("the test pipeline's Resize.keep_ratio", False, "True")
        if _kind(step) in ("MultiScaleFlipAug", "Resize") and isinstance(scale, list) and scale:
            sides = scale[0] if isinstance(scale[0], list) else scale  # several: of test-time augmentation
            if len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides):
                return min(sides), max(sides)
    return MIN_SIZE, MAX_SIZE


def _test_steps(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The steps of the test pipeline, wherever this version has it."""
    data = config.get("data")
    for place in (
        data.get("test") if isinstance(data, dict) else None,
        config.get("test_dataloader"),
        config.get("test_pipeline"),
    ):
        yield from _typed(place)


def _typed(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        if "type" in node:
            yield node
        for value in node.values():
            yield from _typed(value)
    elif isinstance(node, list):
        for value in node:
            yield from _typed(value)


def _selection(node: dict[str, Any]) -> Selection:
    nms = node.get("nms", {})
    if not isinstance(nms, dict) or _kind(nms) not in ("", "nms"):
        raise _refused("model.test_cfg.nms", nms, "the type nms")
    _check(nms, {"class_agnostic": (False, (False,))}, "model.test_cfg.nms.")
    _check(node, {"min_bbox_size": (0, (0,))}, "model.test_cfg.")
    for key in ("nms_pre", "max_per_img"):
        if int(node.get(key, 1)) < 1:
            raise _refused(f"model.test_cfg.{key}", node[key], "numbers above 0")
    usual = Selection()
    return Selection(
        float(node.get("score_thr", usual.score_thresh)),
        float(nms.get("iou_threshold", nms.get("iou_thr", usual.nms_thresh))),  # iou_thr: early 2.0
        int(node.get("nms_pre", usual.topk_candidates)),
        int(node.get("max_per_img", usual.detections_per_img)),
    )


def _check(node: dict[str, Any], spec: Spec, where: str) -> None:
    for key, (default, ours) in spec.items():
        value = node.get(key, default)
        if value not in ours:
            raise _refused(where + key, value, str(ours[0]))


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=str() | int() | float() | None):
            return node.value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {_key(key): _value(value) for key, value in zip(keys, values, strict=True)}
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords):
            return {_name(word): _value(word.value) for word in keywords}
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            number = _value(operand)
            if isinstance(number, int | float):
                return -number
        case ast.Name(id="inf" | "nan"):  # how Python prints these floats
            return float(node.id)
    raise ValueError(f"{type(node).__name__} is no literal")


def _key(node: ast.expr | None) -> str | int | float | None:
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str | int | float | None):
        raise ValueError("a key is no literal")
    return node.value


def _name(keyword: ast.keyword) -> str:
    if keyword.arg is None:
        raise ValueError("** is no literal")
    return keyword.arg


def _dict(node: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = node.get(key)
    if not isinstance(value, dict):
        raise _refused(where + key, value, "one-stage detectors with a backbone, a neck and a bbox_head")
    return value


def _kind(node: Mapping[str, Any]) -> str:
    """The type of a node; configs written in Python's own way have it with its module."""
    return str(node.get("type", "")).rsplit(".", 1)[-1]


def _three(value: Any, key: str) -> tuple[float, float, float]:
    if not isinstance(value, list) or len(value) != 3 or not all(_is_number(item) for item in value):
        raise _refused(f"the images' {key}", value, "three numbers")
    return float(value[0]), float(value[1]), float(value[2])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _refused(key: str, value: Any, known: str) -> WeightsError:
    return WeightsError(
        f"the checkpoint's config has {key}={value!r}, which msil's detectors have not: only {known} can be imported."
    )
