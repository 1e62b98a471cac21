"""The configuration that MMDetection's checkpoints carry as Python text, read without executing it.

1.x and 2.x: meta["config"], with img_norm_cfg and its steps in the pipelines, and meta["CLASSES"].
3.x: meta["cfg"], with model.data_preprocessor, and meta["dataset_meta"]["classes"]. Defaults are MMDetection 3.3's.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from msil.checkpoints.conventions import MAX_SIZE, MIN_SIZE, NORM_EPS, SELECTION, Images, Settings
from msil.errors import WeightsError

RESNETS = (18, 34, 50, 101)
BOX_LOSSES = {"IoULoss": "iou", "GIoULoss": "giou"}

# Keys whose other values make another net: MMDetection's default, and what ours has. a.b: key b of the dict a.
Spec = dict[str, tuple[Any, tuple[Any, ...]]]


def _only(values: Mapping[str, Any]) -> Spec:
    """These values, which are MMDetection's defaults too."""
    return {key: (value, (value,)) for key, value in values.items()}


_BACKBONE = _only({
    "num_stages": 4, "out_indices": [0, 1, 2, 3], "strides": [1, 2, 2, 2], "dilations": [1, 1, 1, 1], "in_channels": 3,
    "base_channels": 64, "deep_stem": False, "avg_down": False, "conv_cfg": None, "dcn": None, "plugins": None,
    "norm_cfg.eps": NORM_EPS,
}) | {"stem_channels": (None, (64, None))}  # fmt: skip
_NECK = _only({
    "num_outs": 5, "conv_cfg": None, "norm_cfg": None, "act_cfg": None, "upsample_cfg": {"mode": "nearest"},
}) | {"start_level": (0, (1,)), "end_level": (-1, (-1, 3))}  # fmt: skip
_TESTS = _only({"nms.type": "nms", "nms.class_agnostic": False, "min_bbox_size": 0})
_HEAD = _only({"dcn_on_last_conv": False, "conv_cfg": None, "norm_cfg.eps": NORM_EPS})
_STRIDES = [8, 16, 32, 64, 128]
_RANGES = [[-1, 64], [64, 128], [128, 256], [256, 512], [512, 1e8]]
_POINTS = _only({"regress_ranges": _RANGES}) | {"strides": ([4, 8, 16, 32, 64], (_STRIDES,))}


def _anchors(scale: int, octaves: int, ratios: list[float]) -> dict[str, Any]:
    """Of a cell."""
    return {
        "anchor_generator.type": "AnchorGenerator", "anchor_generator.octave_base_scale": scale,
        "anchor_generator.scales_per_octave": octaves, "anchor_generator.ratios": ratios,
        "anchor_generator.strides": _STRIDES,
    }  # fmt: skip


def _given(values: Mapping[str, Any]) -> Spec:
    """These values, which a config must give. Those of 1.x, whose boxes are a pixel wider, have other keys."""
    return {key: (None, (value,)) for key, value in values.items()} | _only(
        {"anchor_generator.scales": None, "anchor_generator.center_offset": 0.0}
    )


def _deltas(stds: list[float]) -> Spec:
    kind = "DeltaXYWHBBoxCoder"
    return _only({"bbox_coder.type": kind, "bbox_coder.target_means": [0.0] * 4}) | {
        "bbox_coder.target_stds": ([1.0] * 4, (stds,))
    }


_SQUARE = _anchors(8, 1, [1.0])


def _box_loss(loss: dict[str, Any]) -> str:
    if _kind(loss) not in BOX_LOSSES:
        raise _refused("model.bbox_head.loss_bbox.type", _kind(loss), " and ".join(BOX_LOSSES))
    return BOX_LOSSES[_kind(loss)]


@dataclass(frozen=True)
class Head:
    """One of MMDetection's. detector: the type of model around it. name: ours. spec: as above.
    norm: its default norm_cfg. options: keys that are options of ours by the same name: default, and how to read it."""

    detector: str
    name: str
    spec: Spec
    norm: dict[str, Any] | None = field(default_factory=lambda: {"type": "GN", "num_groups": 32})
    options: Mapping[str, tuple[Any, Callable[[Any], Any]]] = field(default_factory=dict)


HEADS = {
    "FCOSHead": Head("FCOS", "fcos", _POINTS | _only({"loss_bbox.linear": False, "loss_bbox.mode": "log"}), options={
        "conv_bias": ("auto", lambda bias: bias is True),  # auto: none beside a norm
        "center_sampling": (False, bool), "center_sample_radius": (1.5, float), "centerness_on_reg": (False, bool),
        "norm_on_bbox": (False, bool), "loss_bbox": ({"type": "IoULoss"}, _box_loss),
    }),
    "VFNetHead": Head("VFNet", "vfnet", _POINTS | _only(_SQUARE | {
        "anchor_generator.center_offset": 0.0, "use_atss": True, "bbox_norm_type": "reg_denom", "gradient_mul": 0.1,
        "use_vfl": True,
    })),
    "RetinaHead": Head(
        "RetinaNet", "retinanet", _given(_anchors(4, 3, [0.5, 1.0, 2.0])) | _deltas([1.0] * 4), norm=None
    ),
    "ATSSHead": Head("ATSS", "atss", _given(_SQUARE) | _deltas([0.1, 0.1, 0.2, 0.2]) | _only({"pred_kernel_size": 3})),
    "GFLHead": Head("GFL", "gfl", _given(_SQUARE), options={"reg_max": (16, int)}),
    "TOODHead": Head("TOOD", "tood", _given(_SQUARE) | _only({"anchor_type": "anchor_free", "num_dcn": 0})),
}  # fmt: skip


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

    Raises WeightsError, naming the key and its value, for a detector that is none of HEADS on a ResNet and an FPN as
    published (deformable convolutions, ResNeXt, other strides ...), or a configuration that does not say how images
    are normalised.
    """
    try:
        return _settings(config)
    except (TypeError, ValueError, AttributeError) as error:
        raise WeightsError(
            f"the checkpoint's config is not as MMDetection writes it ({error}): take a checkpoint of its 2.x or 3.x."
        ) from error


def _settings(config: Mapping[str, Any]) -> Settings:
    model = _dict(config, "model", "")
    detectors = [head.detector for head in HEADS.values()]
    if _kind(model) not in (*detectors, "SingleStageDetector"):
        raise _refused("model.type", _kind(model), ", ".join(detectors))
    node = _dict(model, "bbox_head", "model.")
    head = _head(node) | _extra_levels(_dict(model, "neck", "model."))
    tests = model.get("test_cfg")
    if not isinstance(tests, dict):  # up to 2.0 it was outside the model; 3.x has the test loop's there
        outside = config.get("test_cfg")
        tests = outside if isinstance(outside, dict) and "type" not in outside else {}
    classes = node.get("num_classes")
    return Settings(
        head,
        _backbone(_dict(model, "backbone", "model.")),
        _images(config, model),
        _selection(tests),
        int(node.get("feat_channels", 256)),
        classes if isinstance(classes, int) else None,
    )


def _backbone(node: dict[str, Any]) -> dict[str, Any]:
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
    kind = "bn" if not node.get("norm_eval", True) else "eval_bn" if norm.get("requires_grad", True) else "frozen_bn"
    # MMDetection: -1 freezes nothing, 0 the stem alone; ours has no setting for the stem alone.
    frozen = max(int(node.get("frozen_stages", -1)), 0)
    return {"name": f"resnet{node['depth']}", "style": style, "norm": kind, "frozen_stages": frozen}


def _extra_levels(node: dict[str, Any]) -> dict[str, Any]:
    """The neck's part of the head's options: what P6 and P7 are made of."""
    where = "model.neck."
    if _kind(node) != "FPN":
        raise _refused(f"{where}type", _kind(node), "FPN")
    _check(node, _NECK, where)
    extra = node.get("add_extra_convs", False)
    if extra is True:
        extra = "on_input" if node.get("extra_convs_on_inputs", True) else "on_output"
    if extra not in ("on_input", "on_output"):
        raise _refused(f"{where}add_extra_convs", extra, "on_input and on_output")
    return {"extra_convs": extra, "relu_before_extra_convs": bool(node.get("relu_before_extra_convs", False))}


def _head(node: dict[str, Any]) -> dict[str, Any]:
    where = "model.bbox_head."
    if _kind(node) not in HEADS:
        raise _refused(f"{where}type", _kind(node), ", ".join(HEADS))
    head = HEADS[_kind(node)]
    _check(node, _HEAD | head.spec, where)
    norm = node.get("norm_cfg", head.norm)
    if norm is not None and (not isinstance(norm, dict) or _kind(norm) != "GN"):
        raise _refused(f"{where}norm_cfg", norm, "GN and None")
    return {
        "name": head.name,
        "num_convs": int(node.get("stacked_convs", 4)),
        "norm_groups": None if norm is None else int(norm.get("num_groups", 32)),
        **{key: read(node.get(key, default)) for key, (default, read) in head.options.items()},
    }


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


def _selection(node: dict[str, Any]) -> dict[str, Any]:
    _check(node, _TESTS, "model.test_cfg.")
    for key in ("nms_pre", "max_per_img"):
        if int(node.get(key, 1)) < 1:
            raise _refused(f"model.test_cfg.{key}", node[key], "numbers above 0")
    nms = node.get("nms", {})
    found = {
        "score_thresh": node.get("score_thr"),
        "nms_thresh": nms.get("iou_threshold", nms.get("iou_thr")),  # iou_thr: early 2.0
        "topk_candidates": node.get("nms_pre"),
        "detections_per_img": node.get("max_per_img"),
    }
    return {key: usual if found[key] is None else type(usual)(found[key]) for key, usual in SELECTION.items()}


def _check(node: dict[str, Any], spec: Spec, where: str) -> None:
    for key, (default, ours) in spec.items():
        value: Any = node
        for word in key.split("."):
            value = value.get(word, default) if isinstance(value, dict) else default
        if isinstance(value, str):  # a type may come with its module
            value = value.rsplit(".", 1)[-1]
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
