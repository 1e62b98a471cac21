"""Weights of others: files of tensors, torchvision's ImageNet weights, MMDetection's keys in our names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.models import ResNet18_Weights, ResNet34_Weights, ResNet50_Weights, ResNet101_Weights

from msil.errors import WeightsError

_IMAGENET = {
    "resnet18": ResNet18_Weights.IMAGENET1K_V1,
    "resnet34": ResNet34_Weights.IMAGENET1K_V1,
    "resnet50": ResNet50_Weights.IMAGENET1K_V1,
    "resnet101": ResNet101_Weights.IMAGENET1K_V1,
}


class Part(NamedTuple):
    """A part of the reference's detector: its prefix there, its prefix here, and what its keys become.

    rules: (pattern, replacement) for re.fullmatch of the key without prefix; the first that matches counts.
        Replacement None drops the key. A result "name[3]" is item 3 of the stacked tensor "name".
    """

    theirs: str
    ours: str
    rules: tuple[tuple[str, str | None], ...]


_PARTS = (
    Part(
        "backbone.",
        "backbone.",
        (
            (r"(?:bn1|layer[1-4]\..*)\.num_batches_tracked", None),  # only a BatchNorm without momentum reads it
            (r"fc\..*", None),
            (r"(conv1\.weight)", r"\1"),
            (r"(bn1\.(?:weight|bias|running_mean|running_var))", r"\1"),
            (r"(layer[1-4]\.\d+\.(?:conv[1-3]|downsample\.0)\.weight)", r"\1"),
            (r"(layer[1-4]\.\d+\.(?:bn[1-3]|downsample\.1)\.(?:weight|bias|running_mean|running_var))", r"\1"),
        ),
    ),
    Part("neck.", "fpn.", ((r"(lateral_convs|fpn_convs)\.(\d+)\.conv\.(weight|bias)", r"\1.\2.\3"),)),
    Part(
        "bbox_head.",
        "head.",
        (
            (r"integral\.project", None),
            (r"(cls|reg)_convs\.(\d+)\.conv\.(weight|bias)", r"\1_tower.\2.conv.\3"),
            (r"(cls|reg)_convs\.(\d+)\.gn\.(weight|bias)", r"\1_tower.\2.norm.\3"),
            (r"scales\.(\d+)\.scale", r"scales[\1]"),
            (r"conv_cls\.(weight|bias)", r"cls_logits.\1"),
            (r"conv_reg\.(weight|bias)", r"bbox_reg.\1"),
            (r"conv_centerness\.(weight|bias)", r"bbox_ctrness.\1"),
        ),
    ),
)


def from_mmdet(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of MMDetection's FCOS (either form), or of its backbone, neck or head alone, in our keys.

    Keys with the prefixes backbone., neck. and bbox_head. come back with backbone., fpn. and head., for a Detector.
    Keys without prefix must all be of one part and come back without prefix, for a ResNet, an FPN or an FCOSHead.
    The level scales become one tensor (levels,); the classifier's fc and buffers that do not matter are dropped.
    Tensors are passed on, not copied.

    Keys do not tell everything. The caller has to know: in which form the head runs (norm_on_bbox, centerness_on_reg
    have the same keys), that the ResNet is of style "pytorch" (a "caffe" one has the same keys and another stride),
    that P7 is made of ReLU(P6) (FCOS and VFNet; ATSS, GFL and TOOD have the same keys without the ReLU).

    Raises WeightsError, with the key, for one that is not known, a mixture of keys with and without prefix or of
    several parts without, and a level scale that is missing.
    """
    prefixed = [key for key in state_dict if key.startswith(tuple(part.theirs for part in _PARTS))]
    if prefixed and len(prefixed) < len(state_dict):
        bare = next(key for key in state_dict if key not in prefixed)
        raise WeightsError(
            f"the key {bare} has no part's prefix while {prefixed[0]} has one: "
            "give a whole detector's state dict with prefixes, or one part's without."
        )
    if prefixed:
        renamed = {}
        for key, value in state_dict.items():
            part = next(part for part in _PARTS if key.startswith(part.theirs))
            name = _rename(part, key.removeprefix(part.theirs), key)
            if name is not None:
                renamed[part.ours + name] = value
    else:
        part = _part_of(state_dict)
        names = {key: _rename(part, key, key) for key in state_dict}
        renamed = {name: state_dict[key] for key, name in names.items() if name is not None}
    return _stack_items(renamed)


def load_state_dict_file(path: str | Path) -> dict[str, Tensor]:
    """State dict of a file written by torch.save, on the CPU. Only tensors and plain values are unpickled, never code.

    The file holds the state dict itself, or a checkpoint with it under "state_dict" (MMDetection, Lightning). The
    prefix "detector.", which a run's checkpoint has on every key, is taken off.

    Raises WeightsError for a file that is missing, unreadable or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"there is no weights file {path}: give the path of a file with a state dict.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise WeightsError(f"the weights file {path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise WeightsError(
            f"{path} is not a weights file, is damaged, or holds objects other than tensors and plain values, which "
            "are not loaded as they can run code: save it again with torch.save(model.state_dict(), path)."
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content or not all(map(_is_entry, content.items())):
        raise WeightsError(
            f"{path} holds no state dict, that is names with a tensor each: save it again with "
            "torch.save(model.state_dict(), path)."
        )
    prefix = "detector." if all(key.startswith("detector.") for key in content) else ""
    return {key.removeprefix(prefix): value.detach() for key, value in content.items()}


def differences(own: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]) -> str:
    """In words, what keeps `state_dict` from being loaded into a module whose own is `own`; empty if nothing does."""
    # Old torchvision files lack the batch counters, and FrozenBatchNorm2d has none.
    found = {
        "lacks": [key for key in own if key not in state_dict and not key.endswith("num_batches_tracked")],
        "has the unknown": [key for key in state_dict if key not in own and not key.endswith("num_batches_tracked")],
        "has other shapes of": [k for k in own if k in state_dict and own[k].shape != state_dict[k].shape],
    }
    return ", and ".join(f"{what} {_first(keys)}" for what, keys in found.items() if keys)


def _first(keys: list[str], count: int = 2) -> str:
    more = f" and {len(keys) - count} more" if len(keys) > count else ""
    return ", ".join(keys[:count]) + more


def imagenet_state_dict(name: str) -> dict[str, Tensor]:
    """torchvision's ImageNet weights (IMAGENET1K_V1) of a ResNet, fc included; downloaded once, its hash checked.

    Raises WeightsError if there are none for that depth, or if they can be neither downloaded nor read.
    """
    if name not in _IMAGENET:
        raise WeightsError(
            f"there are no ImageNet weights for {name}, only for {', '.join(_IMAGENET)}: set "
            "model.backbone.weights=null to train from scratch."
        )
    url = _IMAGENET[name].url
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if cached.is_file():
        return load_state_dict_file(cached)
    try:
        return dict(_IMAGENET[name].get_state_dict(check_hash=True, progress=True, weights_only=True))
    except (OSError, RuntimeError, HTTPException) as error:  # no network, a full disk, a wrong hash
        raise WeightsError(
            f"the ImageNet weights of {name} cannot be had from {url} ({error}): put the file {cached.name} into "
            f"{cached.parent}, or set model.backbone.weights=<path> to a torchvision {name} file, or "
            "model.backbone.weights=null to train from scratch."
        ) from error


def _is_entry(item: tuple[object, object]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _part_of(state_dict: Mapping[str, Tensor]) -> Part:
    """The part that all keys, which have no prefix, belong to."""
    first: tuple[Part, str] | None = None
    for key in state_dict:
        part = next((part for part in _PARTS if any(re.fullmatch(rule, key) for rule, _ in part.rules)), None)
        if part is None:
            raise _unknown(key)
        if first is not None and first[0] is not part:
            raise WeightsError(
                f"the keys {first[1]} and {key} are of different parts of a detector and have no prefix: convert each "
                "part alone, or give a whole detector's state dict."
            )
        first = first or (part, key)
    return first[0] if first is not None else _PARTS[0]


def _rename(part: Part, key: str, full_key: str) -> str | None:
    for pattern, replacement in part.rules:
        match = re.fullmatch(pattern, key)
        if match:
            return None if replacement is None else match.expand(replacement)
    raise _unknown(full_key)


def _stack_items(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """{"name[0]": a, "name[1]": b} -> {"name": stack(a, b)}; other keys as they are."""
    plain: dict[str, Tensor] = {}
    stacks: defaultdict[str, dict[int, Tensor]] = defaultdict(dict)
    for key, value in state_dict.items():
        match = re.fullmatch(r"(.+)\[(\d+)\]", key)
        if match:
            stacks[match[1]][int(match[2])] = value
        else:
            plain[key] = value
    for name, items in stacks.items():
        missing = [str(i) for i in range(max(items)) if i not in items]
        if missing:
            raise WeightsError(f"{name} lacks the levels {', '.join(missing)}: the state dict is incomplete.")
        plain[name] = torch.stack([items[i] for i in sorted(items)])
    return plain


def _unknown(key: str) -> WeightsError:
    return WeightsError(
        f"the key {key} is none of MMDetection's ResNet, FPN or FCOSHead (conv and GroupNorm towers): "
        "only state dicts of these can be converted."
    )
