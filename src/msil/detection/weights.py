"""Files of tensors, torchvision's ImageNet weights, what keeps weights from fitting, and other projects' keys in ours.

The same tensor is the same parameter in MMDetection, torchvision and here; only its name differs. MMDetection: the
heads of 2.x and 3.x, and FCOSHead's names of 1.x. torchvision: fcos_resnet50_fpn, retinanet_resnet50_fpn and its v2.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor
from torchvision.models import WeightsEnum, get_model_weights

from msil.errors import WeightsError, listed

_IMAGENET = ("resnet18", "resnet34", "resnet50", "resnet101")

# Pattern of a module's name there: its name here, "name[3]" for item 3 of the stacked tensor "name", None: dropped.
Rules = Mapping[str, str | None]

_ENDS = ("weight", "bias", "running_mean", "running_var", "scale", "project")
_UNKNOWN = "?"  # no module has that name; None says "dropped"

_BACKBONE: Rules = {"fc": None, r"(conv1|bn1|layer[1-4]\.\d+\.(?:conv[1-3]|bn[1-3]|downsample\.[01]))": r"\1"}
_NECK: Rules = {r"(lateral_convs|fpn_convs)\.(\d+)\.conv": r"\1.\2"}
_HEAD: Rules = {
    "integral": None,
    r"(cls|reg)_convs\.(\d+)\.conv": r"\1_tower.\2.conv",
    r"(cls|reg)_convs\.(\d+)\.gn": r"\1_tower.\2.norm",
    r"(scales|scales_refine)\.(\d+)": r"\1[\2]",
    # conv_: FCOS, in MMDetection 1.x and early 2.0 fcos_.
    "(?:conv|fcos|vfnet|retina|atss|gfl|tood)_cls": "cls_logits",
    "(?:conv|fcos|vfnet|retina|atss|gfl|tood)_reg": "bbox_reg",
    "(?:conv|fcos|atss)_centerness": "bbox_ctrness",
    # VFNet
    r"vfnet_reg_conv\.conv": "reg_conv.conv",
    r"vfnet_reg_conv\.gn": "reg_conv.norm",
    "vfnet_reg_refine_dconv": "reg_star",
    "vfnet_reg_refine": "bbox_refine",
    "vfnet_cls_dconv": "cls_star",
    # TOOD
    r"(inter_convs\.\d+\.conv|(?:cls|reg)_decomp\.layer_attention\.[02])": r"\1",
    r"(inter_convs\.\d+)\.gn": r"\1.norm",
    r"((?:cls|reg)_decomp)\.reduction_conv\.conv": r"\1.reduction.conv",
    r"((?:cls|reg)_decomp)\.reduction_conv\.gn": r"\1.reduction.norm",
    r"(cls_prob|reg_offset)_module\.([02])": r"\1.\2",
}
# Prefix there: prefix here, rules.
_MMDET: dict[str, tuple[str, Rules]] = {
    "backbone.": ("backbone.", _BACKBONE),
    "neck.": ("fpn.", _NECK),
    "bbox_head.": ("head.", _HEAD),
}
_TORCHVISION: dict[str, tuple[str, Rules]] = {
    "backbone.body.": ("backbone.", _BACKBONE),
    "backbone.fpn.": ("fpn.", {
        r"inner_blocks\.(\d+)(?:\.0)?": r"lateral_convs.\1",  # without the .0: torchvision up to 0.12
        r"layer_blocks\.(\d+)(?:\.0)?": r"fpn_convs.\1",
        r"extra_blocks\.p6": "fpn_convs.3",
        r"extra_blocks\.p7": "fpn_convs.4",
    }),
    "head.": ("head.", {
        r"classification_head\.cls_logits": "cls_logits",
        r"regression_head\.(bbox_reg|bbox_ctrness)": r"\1",
        # A Sequential for each layer: RetinaNet since torchvision 0.13, and its v2.
        r"classification_head\.conv\.(\d+)\.0": r"cls_tower.\1.conv",
        r"classification_head\.conv\.(\d+)\.1": r"cls_tower.\1.norm",
        r"regression_head\.conv\.(\d+)\.0": r"reg_tower.\1.conv",
        r"regression_head\.conv\.(\d+)\.1": r"reg_tower.\1.norm",
    }),
}  # fmt: skip


def load_file(path: str | Path, *, mmap: bool = False) -> Any:
    """Content of a file written by torch.save, or the tensors of a .safetensors file, on the CPU.

    Only tensors and plain values are unpickled, never code. mmap: tensors are read from the file when they are used.

    Raises WeightsError for a file that is missing or unreadable, or holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        found = (
            f"{path} is a folder without checkpoints/last.ckpt" if path.is_dir() else f"there is no weights file {path}"
        )
        raise WeightsError(f"{found}: give the path of a file with a state dict, or the folder of a training run.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file as load_safetensors  # late: .pth files need torch alone

            return load_safetensors(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zipfile(path))
    except OSError as error:
        raise WeightsError(f"the weights file {path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # SafetensorError; and a damaged file can make the unpickler raise anything
        raise WeightsError(
            f"{path} is not a weights file, is damaged, or holds objects other than tensors and plain values, which "
            "are not loaded as they can run code: take another file (of a run best.ckpt or previous.ckpt), or save the "
            "weights alone by torch.save(model.state_dict(), path)."
        ) from error


def load_state_dict_file(path: str | Path) -> dict[str, Tensor]:
    """State dict of a file written by torch.save or of a .safetensors file, on the CPU.

    The file holds the state dict itself, or a checkpoint with it under "state_dict" (MMDetection, Lightning). The
    prefix "detector.", which a run's checkpoint has on every key, is taken off.

    Raises WeightsError for a file that is missing, unreadable or holds no state dict; see load_file.
    """
    return state_dict_of(load_file(path), path)


def state_dict_of(content: Any, path: str | Path) -> dict[str, Tensor]:
    """As load_state_dict_file, of a file's content."""
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not (
        isinstance(content, Mapping)
        and content
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())
    ):
        raise WeightsError(
            f"{path} holds no state dict, that is names with a tensor each: save it again with "
            "torch.save(model.state_dict(), path)."
        )
    prefix = "detector." if all(key.startswith("detector.") for key in content) else ""
    return {key.removeprefix(prefix): value.detach() for key, value in content.items()}


def differences(own: Mapping[str, Tensor], state_dict: Mapping[str, Tensor], count: int = 2) -> str:
    """What keeps `state_dict` from being loaded into a module whose own is `own`, with the first `count` keys of each
    kind; empty if nothing does."""
    # Old torchvision files lack the batch counters, and FrozenBatchNorm2d has none.
    found = {
        "lacks": [key for key in own if key not in state_dict and not key.endswith("num_batches_tracked")],
        "has the unknown": [key for key in state_dict if key not in own and not key.endswith("num_batches_tracked")],
        "has other shapes of": [k for k in own if k in state_dict and own[k].shape != state_dict[k].shape],
    }
    return ", and ".join(f"{what} {listed(keys, count)}" for what, keys in found.items() if keys)


# The schedule may have set frozen_stages.
FROM_SCRATCH = "model.backbone.weights=null model.backbone.frozen_stages=null to train from scratch"


def imagenet_state_dict(name: str) -> dict[str, Tensor]:
    """torchvision's ImageNet weights (IMAGENET1K_V1) of a ResNet, fc included; downloaded once, its hash checked.

    Raises WeightsError if there are none for that depth, or if they can be neither downloaded nor read.
    """
    if name not in _IMAGENET:
        raise WeightsError(
            f"there are no ImageNet weights for {name}, only for {', '.join(_IMAGENET)}: set {FROM_SCRATCH}."
        )
    instead = f"model.backbone.weights=<path> to a torchvision {name} file, or {FROM_SCRATCH}"
    return torchvision_state_dict(get_model_weights(name)["IMAGENET1K_V1"], name, instead)


def torchvision_state_dict(weights: WeightsEnum, name: str, instead: str) -> dict[str, Tensor]:
    """The file of torchvision's `weights` of the net `name`, downloaded once into torch.hub's folder, its hash checked;
    only tensors are unpickled.

    Raises WeightsError, with the setting to make `instead`, if it can be neither downloaded nor read.
    """
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    if cached.is_file():
        try:
            return load_state_dict_file(cached)
        except WeightsError as error:
            raise WeightsError(
                f"the ImageNet weights of {name} in {cached} cannot be read: delete that file, and it is downloaded "
                "again."
            ) from error
    try:
        return dict(weights.get_state_dict(check_hash=True, progress=True, weights_only=True))
    except (OSError, RuntimeError, HTTPException) as error:  # no network, a full disk, a wrong hash
        raise WeightsError(
            f"the ImageNet weights of {name} cannot be had from {weights.url} ({error}): put the file {cached.name} "
            f"into {cached.parent}, or set {instead}."
        ) from error


def from_mmdet(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of one of MMDetection's detectors, or of its backbone, neck or head alone, in our keys.

    Keys with the prefixes backbone., neck. and bbox_head. come back with backbone., fpn. and head., for a Detector.
    Keys without prefix must all be of one part and come back without prefix, for a ResNet, an FPN or a head. The level
    scales become one tensor (levels,), and VFNet's refining ones another; the classifier's fc and buffers that do not
    matter are dropped. Tensors are passed on, not copied.

    Keys do not tell everything. The caller has to know: in which form an FCOS head runs (norm_on_bbox,
    centerness_on_reg have the same keys), that the ResNet is of the style of the weights ("pytorch" and "caffe" have
    the same keys and another stride), whether P7 is made of ReLU(P6) (FCOS, VFNet) or of P6 (the others), what image
    channels and mean the net was trained with. msil.checkpoints.layouts has these of the published detectors.

    Raises WeightsError, with the key, for one that is not known, of another part, or another name of a tensor.
    """
    keys = list(state_dict)
    if any(key.startswith(tuple(_MMDET)) for key in keys):
        names = {key: _name(_MMDET, key) for key in keys}
    else:  # one part's: that which the first key is of
        rules = next((rules for _, rules in _MMDET.values() if keys and _of_part(rules, keys[0]) != _UNKNOWN), {})
        names = {key: _of_part(rules, key) for key in keys}
    what = (
        "MMDetection's ResNet, FPN or heads FCOS, VFNet, RetinaNet, ATSS, GFL, TOOD (conv and GroupNorm towers): give "
        "such a detector's state dict, or one part's without prefix."
    )
    return _renamed(state_dict, names, what)


def from_torchvision(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of torchvision's fcos_resnet50_fpn, retinanet_resnet50_fpn or its v2 in our keys, for a Detector.

    FCOS's head has no level scales: they come as ones (5,). The classifier's channels are passed on as they are: of
    each of a cell's anchors, channel 0 is torchvision's background, channel i the category id i (of its COCO weights:
    91 channels, 80 of them in use). Tensors are passed on, not copied. The detector for them has point_offset=0
    (FCOS) or whole_anchors=True (RetinaNet).

    Raises WeightsError, with the key, for one that is not known.
    """
    # A tower in one Sequential, by the distance of two convolutions. FCOS: conv, GroupNorm, ReLU. RetinaNet up to 0.12:
    # conv, ReLU.
    fcos = any("bbox_ctrness" in key for key in state_dict)
    step = 3 if fcos else 2

    def nested(match: re.Match[str]) -> str:
        layer, place = divmod(int(match[1]), step)
        return f"_head.conv.{layer}.{place if place < step - 1 else 'relu'}."

    names = {key: _name(_TORCHVISION, re.sub(r"_head\.conv\.(\d+)\.(?!\d)", nested, key)) for key in state_dict}
    what = "torchvision's fcos_resnet50_fpn, retinanet_resnet50_fpn and its v2: give the state dict of one of these."
    return _renamed(state_dict, names, what) | ({"head.scales": torch.ones(5)} if fcos else {})


def _name(parts: Mapping[str, tuple[str, Rules]], key: str) -> str | None:
    for theirs, (ours, rules) in parts.items():
        if key.startswith(theirs):
            name = _of_part(rules, key.removeprefix(theirs))
            return name if name in (None, _UNKNOWN) else f"{ours}{name}"
    return _UNKNOWN


def _of_part(rules: Rules, key: str) -> str | None:
    module, _, end = key.rpartition(".")
    for pattern, name in rules.items():
        match = re.fullmatch(pattern, module)
        if match and end == "num_batches_tracked":  # only a BatchNorm without momentum reads it
            return None
        if match and end in _ENDS:
            return None if name is None else match.expand(name) + ("" if end == "scale" else f".{end}")
    return _UNKNOWN


def _renamed(state_dict: Mapping[str, Tensor], names: Mapping[str, str | None], what: str) -> dict[str, Tensor]:
    """The tensors under their new names; {"name[0]": a, "name[1]": b} become {"name": stack(a, b)}."""
    sources: dict[str, str] = {}
    for key, name in names.items():
        if name == _UNKNOWN:
            raise WeightsError(f"the key {key} is none of {what}")
        if name is not None and sources.setdefault(name, key) != key:
            raise WeightsError(f"the keys {sources[name]} and {key} are two names of one tensor: drop one of them.")
    plain = {name: state_dict[key] for name, key in sources.items() if "[" not in name}
    stacked: defaultdict[str, list[Tensor]] = defaultdict(list)
    for name in sorted(name for name in sources if "[" in name):  # levels have one digit
        stacked[name.partition("[")[0]].append(state_dict[sources[name]])
    return plain | {name: torch.stack(items) for name, items in stacked.items()}
