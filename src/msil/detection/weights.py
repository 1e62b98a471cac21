"""Files of tensors, torchvision's ImageNet weights, and what keeps weights from fitting.

The functions of msil.detection.renaming, which give other projects' keys our names, are here too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor
from torchvision.models import WeightsEnum, get_model_weights

from msil.detection.renaming import from_mmdet, from_torchvision
from msil.errors import WeightsError

__all__ = ["differences", "from_mmdet", "from_torchvision", "imagenet_state_dict", "load_state_dict_file"]

_IMAGENET = ("resnet18", "resnet34", "resnet50", "resnet101")


def load_file(path: str | Path, *, mmap: bool = False) -> Any:
    """Content of a file written by torch.save, or the tensors of a .safetensors file, on the CPU.

    Only tensors and plain values are unpickled, never code. mmap: tensors are read from the file when they are used.

    Raises WeightsError for a file that is missing or unreadable, or holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"there is no weights file {path}: give the path of a file with a state dict.")
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
            "are not loaded as they can run code: save it again with torch.save(model.state_dict(), path)."
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


def listed(names: Sequence[str], count: int) -> str:
    """The first `count` names, and how many more there are."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def imagenet_state_dict(name: str) -> dict[str, Tensor]:
    """torchvision's ImageNet weights (IMAGENET1K_V1) of a ResNet, fc included; downloaded once, its hash checked.

    Raises WeightsError if there are none for that depth, or if they can be neither downloaded nor read.
    """
    scratch = "model.backbone.weights=null to train from scratch"
    if name not in _IMAGENET:
        raise WeightsError(f"there are no ImageNet weights for {name}, only for {', '.join(_IMAGENET)}: set {scratch}.")
    instead = f"model.backbone.weights=<path> to a torchvision {name} file, or {scratch}"
    return torchvision_state_dict(get_model_weights(name)["IMAGENET1K_V1"], name, instead)


def torchvision_state_dict(weights: WeightsEnum, name: str, instead: str) -> dict[str, Tensor]:
    """The file of torchvision's `weights` of the net `name`, downloaded once into torch.hub's folder, its hash checked;
    only tensors are unpickled.

    Raises WeightsError, with the setting to make `instead`, if it can be neither downloaded nor read.
    """
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    if cached.is_file():
        return load_state_dict_file(cached)
    try:
        return dict(weights.get_state_dict(check_hash=True, progress=True, weights_only=True))
    except (OSError, RuntimeError, HTTPException) as error:  # no network, a full disk, a wrong hash
        raise WeightsError(
            f"the ImageNet weights of {name} cannot be had from {weights.url} ({error}): put the file {cached.name} "
            f"into {cached.parent}, or set {instead}."
        ) from error
