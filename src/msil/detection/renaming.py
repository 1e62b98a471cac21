"""State dicts of MMDetection and torchvision in our names: pure functions of names and tensors.

The same tensor is the same parameter in all three; only its name differs. MMDetection: the heads of 2.x and 3.x, and
FCOSHead's names of 1.x. torchvision: fcos_resnet50_fpn, retinanet_resnet50_fpn and its v2.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from msil.errors import WeightsError

Rules = tuple[tuple[str, str | None], ...]


class Part(NamedTuple):
    """A part of another project's detector: its prefix there, its prefix here, and what its keys become.

    rules: (pattern, replacement) for re.fullmatch of the key without prefix; the first that matches counts.
        Replacement None drops the key. A result "name[3]" is item 3 of the stacked tensor "name".
    """

    theirs: str
    ours: str
    rules: Rules


# ResNet's keys are the same in all three.
_BACKBONE: Rules = (
    (r"(?:bn1|layer[1-4]\..*)\.num_batches_tracked", None),  # only a BatchNorm without momentum reads it
    (r"fc\..*", None),
    (r"(conv1\.weight)", r"\1"),
    (r"(bn1\.(?:weight|bias|running_mean|running_var))", r"\1"),
    (r"(layer[1-4]\.\d+\.(?:conv[1-3]|downsample\.0)\.weight)", r"\1"),
    (r"(layer[1-4]\.\d+\.(?:bn[1-3]|downsample\.1)\.(?:weight|bias|running_mean|running_var))", r"\1"),
)
_TOWERS: Rules = (
    (r"integral\.project", None),
    (r"(cls|reg)_convs\.(\d+)\.conv\.(weight|bias)", r"\1_tower.\2.conv.\3"),
    (r"(cls|reg)_convs\.(\d+)\.gn\.(weight|bias)", r"\1_tower.\2.norm.\3"),
    (r"scales\.(\d+)\.scale", r"scales[\1]"),
)
_FCOS: Rules = (
    (r"(?:conv|fcos)_cls\.(weight|bias)", r"cls_logits.\1"),  # fcos_: MMDetection 1.x and early 2.0
    (r"(?:conv|fcos)_reg\.(weight|bias)", r"bbox_reg.\1"),
    (r"(?:conv|fcos)_centerness\.(weight|bias)", r"bbox_ctrness.\1"),
)
_VFNET: Rules = (
    (r"vfnet_reg_conv\.conv\.(weight|bias)", r"reg_conv.conv.\1"),
    (r"vfnet_reg_conv\.gn\.(weight|bias)", r"reg_conv.norm.\1"),
    (r"vfnet_reg\.(weight|bias)", r"bbox_reg.\1"),
    (r"vfnet_reg_refine_dconv\.weight", r"reg_star.weight"),
    (r"vfnet_reg_refine\.(weight|bias)", r"bbox_refine.\1"),
    (r"vfnet_cls_dconv\.weight", r"cls_star.weight"),
    (r"vfnet_cls\.(weight|bias)", r"cls_logits.\1"),
    (r"scales_refine\.(\d+)\.scale", r"scales_refine[\1]"),
)
_ATSS: Rules = (
    (r"atss_cls\.(weight|bias)", r"cls_logits.\1"),
    (r"atss_reg\.(weight|bias)", r"bbox_reg.\1"),
    (r"atss_centerness\.(weight|bias)", r"bbox_ctrness.\1"),
)
_GFL: Rules = (
    (r"gfl_cls\.(weight|bias)", r"cls_logits.\1"),
    (r"gfl_reg\.(weight|bias)", r"bbox_reg.\1"),
)
_RETINA: Rules = (
    (r"retina_cls\.(weight|bias)", r"cls_logits.\1"),
    (r"retina_reg\.(weight|bias)", r"bbox_reg.\1"),
)
_TOOD: Rules = (
    (r"inter_convs\.(\d+)\.conv\.(weight|bias)", r"inter_convs.\1.conv.\2"),
    (r"inter_convs\.(\d+)\.gn\.(weight|bias)", r"inter_convs.\1.norm.\2"),
    (r"(cls|reg)_decomp\.layer_attention\.([02])\.(weight|bias)", r"\1_decomp.layer_attention.\2.\3"),
    (r"(cls|reg)_decomp\.reduction_conv\.conv\.(weight|bias)", r"\1_decomp.reduction.conv.\2"),
    (r"(cls|reg)_decomp\.reduction_conv\.gn\.(weight|bias)", r"\1_decomp.reduction.norm.\2"),
    (r"cls_prob_module\.([02])\.(weight|bias)", r"cls_prob.\1.\2"),
    (r"reg_offset_module\.([02])\.(weight|bias)", r"reg_offset.\1.\2"),
    (r"tood_cls\.(weight|bias)", r"cls_logits.\1"),
    (r"tood_reg\.(weight|bias)", r"bbox_reg.\1"),
)
# MMDetection's heads by its own names, and the keys that each has alone.
_HEADS = {
    "FCOSHead": _FCOS, "VFNetHead": _VFNET, "ATSSHead": _ATSS, "GFLHead": _GFL, "TOODHead": _TOOD, "RetinaHead": _RETINA
}  # fmt: skip
_MMDET = (
    Part("backbone.", "backbone.", _BACKBONE),
    Part("neck.", "fpn.", ((r"(lateral_convs|fpn_convs)\.(\d+)\.conv\.(weight|bias)", r"\1.\2.\3"),)),
    Part("bbox_head.", "head.", (*_TOWERS, *(rule for rules in _HEADS.values() for rule in rules))),
)


_TORCHVISION_BACKBONE = Part("backbone.body.", "backbone.", _BACKBONE)
_TORCHVISION_FPN = Part(
    "backbone.fpn.",
    "fpn.",
    (
        # Without the .0: torchvision up to 0.12.
        (r"inner_blocks\.(\d+)(?:\.0)?\.(weight|bias)", r"lateral_convs.\1.\2"),
        (r"layer_blocks\.(\d+)(?:\.0)?\.(weight|bias)", r"fpn_convs.\1.\2"),
        (r"extra_blocks\.p6\.(weight|bias)", r"fpn_convs.3.\1"),
        (r"extra_blocks\.p7\.(weight|bias)", r"fpn_convs.4.\1"),
    ),
)
_BRANCHES = (("classification_head", "cls_tower"), ("regression_head", "reg_tower"))
_PREDICTORS: Rules = (
    (r"classification_head\.(cls_logits\.(?:weight|bias))", r"\1"),
    (r"regression_head\.((?:bbox_reg|bbox_ctrness)\.(?:weight|bias))", r"\1"),
)


def _flat_towers(step: int, kinds: tuple[str, ...]) -> Rules:
    """Towers in one Sequential, `step` modules a layer: those of `kinds` first, then what has no parameters."""
    return tuple(
        (rf"{theirs}\.conv\.{step * i + offset}\.(weight|bias)", rf"{ours}.{i}.{kind}.\1")
        for theirs, ours in _BRANCHES
        for i in range(4)
        for offset, kind in enumerate(kinds)
    )


_NESTED_TOWERS: Rules = tuple(
    (rf"{theirs}\.conv\.(\d+)\.{offset}\.(weight|bias)", rf"{ours}.\1.{kind}.\2")
    for theirs, ours in _BRANCHES
    for offset, kind in enumerate(("conv", "norm"))
)
# FCOS: conv, GroupNorm, ReLU. RetinaNet up to 0.12: conv, ReLU; since then, and v2, a Sequential a layer.
_TORCHVISION = tuple(
    (_TORCHVISION_BACKBONE, _TORCHVISION_FPN, Part("head.", "head.", (*towers, *_PREDICTORS)))
    for towers in (_flat_towers(3, ("conv", "norm")), _flat_towers(2, ("conv",)), _NESTED_TOWERS)
)


def from_mmdet(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of one of MMDetection's detectors, or of its backbone, neck or head alone, in our keys.

    Keys with the prefixes backbone., neck. and bbox_head. come back with backbone., fpn. and head., for a Detector.
    Keys without prefix must all be of one part and come back without prefix, for a ResNet, an FPN or a head. The level
    scales become one tensor (levels,), and VFNet's refining ones another; the classifier's fc and buffers that do not
    matter are dropped. Tensors are passed on, not copied.

    Keys do not tell everything. The caller has to know: in which form an FCOS head runs (norm_on_bbox,
    centerness_on_reg have the same keys), that the ResNet is of the style of the weights ("pytorch" and "caffe" have
    the same keys and another stride), whether P7 is made of ReLU(P6) (FCOS, VFNet) or of P6 (the others), what image
    channels and mean the net was trained with. msil.checkpoints.importer reads these off the checkpoint, or asks.

    Raises WeightsError, with the key, for one that is not known, a mixture of keys with and without prefix, of several
    parts without, or of two heads, and a level scale that is missing.
    """
    return _renamed(state_dict, mmdet_names(state_dict))


def mmdet_names(keys: Iterable[str]) -> dict[str, str | None]:
    """What from_mmdet makes of each key: our name, "name[i]" for item i of a stacked tensor, None for a dropped one.

    Raises WeightsError as from_mmdet.
    """
    keys = list(keys)
    prefixed = [key for key in keys if key.startswith(tuple(part.theirs for part in _MMDET))]
    if prefixed and len(prefixed) < len(keys):
        bare = next(key for key in keys if key not in set(prefixed))
        raise WeightsError(
            f"the key {bare} has no part's prefix while {prefixed[0]} has one: "
            "give a whole detector's state dict with prefixes, or one part's without."
        )
    if prefixed:
        names = {key: _prefixed_name(_MMDET, key) for key in keys}
    else:
        part = _part_of(keys)
        names = {key: _name(part, key) for key in keys}
    for key in keys:
        if names[key] is _UNKNOWN:
            raise _unknown_to_mmdet(key)
    _check_one_head(keys)
    return names


def from_torchvision(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of torchvision's fcos_resnet50_fpn, retinanet_resnet50_fpn or its v2 in our keys, for a Detector.

    FCOS's head has no level scales: they come as ones (5,). The classifier's channels are passed on as they are: of
    each of a cell's anchors, channel 0 is torchvision's background, channel i the category id i (of its COCO weights:
    91 channels, 80 of them in use). Tensors are passed on, not copied. The detector for them has point_offset=0
    (FCOS) or whole_anchors=True (RetinaNet).

    Raises WeightsError, with the key, for one that is not known.
    """
    renamed = _renamed(state_dict, torchvision_names(state_dict))
    if any(name.startswith("head.bbox_ctrness.") for name in renamed):
        renamed["head.scales"] = torch.ones(5)
    return renamed


def torchvision_names(keys: Iterable[str]) -> dict[str, str | None]:
    """What from_torchvision makes of each key: our name, or None for a dropped one. Raises WeightsError as it."""
    keys = list(keys)
    readings = [{key: _prefixed_name(parts, key) for key in keys} for parts in _TORCHVISION]
    names = min(readings, key=lambda reading: list(reading.values()).count(_UNKNOWN))
    for key, name in names.items():
        if name is _UNKNOWN:
            raise WeightsError(
                f"the key {key} is none of torchvision's fcos_resnet50_fpn, retinanet_resnet50_fpn and its v2: only "
                "state dicts of these can be converted."
            )
    return names


# A name that no rule can yield, since None says "dropped".
_UNKNOWN = "?"


def _prefixed_name(parts: tuple[Part, ...], key: str) -> str | None:
    part = next((part for part in parts if key.startswith(part.theirs)), None)
    name = _UNKNOWN if part is None else _name(part, key.removeprefix(part.theirs))
    return name if part is None or name is None or name is _UNKNOWN else part.ours + name


def _name(part: Part, key: str) -> str | None:
    for pattern, replacement in part.rules:
        match = re.fullmatch(pattern, key)
        if match:
            return None if replacement is None else match.expand(replacement)
    return _UNKNOWN


def _part_of(keys: list[str]) -> Part:
    """The part of MMDetection's detector that all keys, which have no prefix, belong to."""
    first: tuple[Part, str] | None = None
    for key in keys:
        part = next((part for part in _MMDET if _name(part, key) is not _UNKNOWN), None)
        if part is None:
            raise _unknown_to_mmdet(key)
        if first is not None and first[0] is not part:
            raise WeightsError(
                f"the keys {first[1]} and {key} are of different parts of a detector and have no prefix: convert each "
                "part alone, or give a whole detector's state dict."
            )
        first = first or (part, key)
    return first[0] if first is not None else _MMDET[0]


def _check_one_head(keys: list[str]) -> None:
    """The heads share names on our side, so that one would overwrite the other."""
    found = {}
    for name, rules in _HEADS.items():
        part = Part("", "", rules)
        found[name] = next((key for key in keys if _name(part, key.removeprefix("bbox_head.")) is not _UNKNOWN), None)
    (first, key), (second, other) = ([(n, k) for n, k in found.items() if k is not None] + [("", None)] * 2)[:2]
    if key is not None and other is not None:
        raise WeightsError(f"the key {key} is of {first} and {other} of {second}: give the state dict of one head.")


def _renamed(state_dict: Mapping[str, Tensor], names: Mapping[str, str | None]) -> dict[str, Tensor]:
    """The tensors under their new names; {"name[0]": a, "name[1]": b} become {"name": stack(a, b)}."""
    plain: dict[str, Tensor] = {}
    stacks: defaultdict[str, dict[int, Tensor]] = defaultdict(dict)
    sources: dict[str, str] = {}
    for key, name in names.items():
        if name is None:
            continue
        if name in sources:
            raise WeightsError(f"the keys {sources[name]} and {key} are two names of one tensor: drop one of them.")
        sources[name] = key
        match = re.fullmatch(r"(.+)\[(\d+)\]", name)
        if match:
            stacks[match[1]][int(match[2])] = state_dict[key]
        else:
            plain[name] = state_dict[key]
    for name, items in stacks.items():
        missing = [str(i) for i in range(max(items)) if i not in items]
        if missing:
            raise WeightsError(f"{name} lacks the levels {', '.join(missing)}: the state dict is incomplete.")
        plain[name] = torch.stack([items[i] for i in sorted(items)])
    return plain


def _unknown_to_mmdet(key: str) -> WeightsError:
    return WeightsError(
        f"the key {key} is none of MMDetection's ResNet, FPN or {', '.join(_HEADS)} (conv and GroupNorm towers): "
        "only state dicts of these can be converted."
    )
