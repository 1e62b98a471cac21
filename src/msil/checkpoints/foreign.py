"""Reading another project's checkpoint without running anything that it brings along."""

from __future__ import annotations

import io
import pickletools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from msil.detection.weights import load_state_dict_file
from msil.errors import WeightsError

# Training checkpoints hold log histories, numpy numbers and configurations of these. Nothing of it is needed.
HARMLESS_PACKAGES = ("mmengine", "mmcv", "mmdet", "numpy", "addict")
# How pickle stores a method, which mmengine's log histories do. Like all of them, not called but replaced.
HARMLESS_NAMES = ("builtins.getattr",)


class Inert:
    """Stands for an object of a class that is not loaded: takes whatever that is made of, and does nothing."""

    def __new__(cls, *args: object) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


@dataclass(frozen=True)
class ForeignCheckpoint:
    """state_dict: by name. meta: what the file says of itself, empty if nothing. others: top-level entries not read."""

    state_dict: dict[str, Tensor]
    meta: Mapping[str, Any]
    others: tuple[str, ...]


def read_foreign_checkpoint(path: str | Path) -> ForeignCheckpoint:
    """The state dict and meta of a .pth checkpoint of PyTorch 1.x or 2.x, or the tensors of a .safetensors file.

    A bare state dict is taken as well. Nothing is ever unpickled but tensors and plain values: objects of OpenMMLab's
    packages, numpy and addict become placeholders, whatever they are made of.

    Raises WeightsError for a file that is missing, unreadable, without a state dict, or with any other object.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"there is no checkpoint {path}: give the path of a downloaded or trained file.")
    if path.suffix == ".safetensors":
        return ForeignCheckpoint(load_state_dict_file(path), {}, ())
    content = _load(path)
    meta: object = {}
    others: list[str] = []
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        meta = content.get("meta")
        others = [str(key) for key in content if key not in ("state_dict", "meta")]
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise _no_state_dict(path)
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
        raise _no_state_dict(path)
    state = {key: value.detach() for key, value in content.items()}
    return ForeignCheckpoint(state, meta if isinstance(meta, Mapping) else {}, tuple(others))


def _load(path: Path) -> object:
    try:
        names = _object_names(path)
        refused = sorted(name for name in names if not is_harmless(name))
        if refused:
            raise WeightsError(
                f"{path} holds {', '.join(refused[:3])}, which is not loaded as it could run code: a checkpoint has "
                "only tensors and plain values in its state_dict and meta, so get it from its authors again."
            )
        # A class each, since torch finds the placeholder's name by its class.
        inert = [(type("Inert", (Inert,), {}), name) for name in sorted(names)]
        with safe_globals(inert):  # pyright: ignore[reportArgumentType]
            return torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except OSError as error:
        raise WeightsError(f"the checkpoint {path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise WeightsError(
            f"{path} is not a PyTorch checkpoint, is damaged, or holds objects that are not loaded as they could run "
            f"code ({_reason(error)}): get it from its authors again."
        ) from error


def is_harmless(name: str) -> bool:
    """Whether an object of this dotted name is of those that get a placeholder."""
    return name in HARMLESS_NAMES or ("." in name and name.split(".")[0] in HARMLESS_PACKAGES)


def _object_names(path: Path) -> set[str]:
    """Dotted names of what the file's pickle would import, aside from what torch.load judges by itself."""
    with path.open("rb") as file:
        if file.read(2) == b"PK":
            return set(get_unsafe_globals_in_checkpoint(path))
        # The format before PyTorch 1.6: pickles in a row, the fourth of them the object.
        file.seek(0)
        pickles = io.BytesIO(file.read())
    names = set()
    for _ in range(4):
        for op, argument, _ in pickletools.genops(pickles):
            if op.name == "GLOBAL":
                names.add(str(argument).replace(" ", "."))
    return {name for name in names if is_harmless(name)}


def _reason(error: Exception) -> str:
    text = str(error).strip()
    marker = "WeightsUnpickler error:"
    line = text.split(marker)[-1].strip() if marker in text else text
    return line.splitlines()[0].split(". ")[0].rstrip(".") if line else type(error).__name__


def _no_state_dict(path: Path) -> WeightsError:
    return WeightsError(f"{path} holds no state dict, that is names with a tensor each: give a detector's checkpoint.")
