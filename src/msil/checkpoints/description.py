"""What a file of weights says of itself, so that the net that it is of can be built again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from msil.checkpoints.assemble import backbone_options
from msil.config import ModelConfig, from_plain, plain
from msil.errors import ConfigError, WeightsError


@dataclass(frozen=True)
class Description:
    """model: the detector's settings; msil.apply is none where the file holds no MSIL.
    min_size, max_size: what it resizes images to. classes, category_ids: of its labels, in their order.
    source: where the weights come from, in words.
    """

    model: ModelConfig
    min_size: int
    max_size: int
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    source: str


def to_text(description: Description) -> str:
    """As json, for the header of a safetensors file."""
    return json.dumps({**vars(description), "model": plain(description.model)})


def read_description(path: str | Path) -> Description | None:
    """What an imported .safetensors file or a run's checkpoint says of itself; None for a bare state dict.

    Raises WeightsError for a file that is missing or unreadable, or a description that is not of this version.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"there is no weights file {path}: give the path of a detector's file.")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get("msil")
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path} cannot be read as a safetensors file ({error}): make it anew.") from error
        return None if text is None else _parse(lambda: json.loads(text), path)
    own = _saved_by_run(path)
    return None if own is None else _parse(lambda: _of_run(own), path)


def run_settings(path: str | Path) -> Mapping[str, Any] | None:
    """The resolved settings of the run that wrote this checkpoint; None for a file that no run wrote.

    Raises WeightsError for a file that is missing or unreadable.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"there is no weights file {path}: give the path of a detector's file.")
    own = None if path.suffix == ".safetensors" else _saved_by_run(path)
    return None if own is None else own.get("config")


def _saved_by_run(path: Path) -> Mapping[str, Any] | None:
    """What a run saves under "msil" in its checkpoints; None in other files of torch."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise WeightsError(f"{path} is not a weights file, is damaged, or holds code, which is not loaded.") from error
    own = content.get("msil") if isinstance(content, Mapping) else None
    return own if isinstance(own, Mapping) else None


def _of_run(own: Mapping[str, Any]) -> dict[str, Any]:
    """What a run saves under "msil", by the names of Description."""
    config = own["config"]
    return {
        "model": config["model"],
        "min_size": config["data"]["min_size"],
        "max_size": config["data"]["max_size"],
        "classes": own["classes"],
        "category_ids": own["category_ids"],
        "source": f"run {config['run_name']}",
    }


def explicit(backbone: Mapping[str, Any]) -> dict[str, Any]:
    """The same backbone without weights of its own to read: what they decide is written out."""
    return {**backbone, "weights": None, **backbone_options(backbone).decided()} if backbone else {}


def _parse(read: Callable[[], Mapping[str, Any]], path: Path) -> Description:
    try:
        values = read()
        model = from_plain(ModelConfig, values["model"])
        return Description(
            dataclasses.replace(model, backbone=explicit(model.backbone), weights=None, weights_sha256=None),
            int(values["min_size"]),
            int(values["max_size"]),
            tuple(values["classes"]),
            tuple(values["category_ids"]),
            str(values["source"]),
        )
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise WeightsError(
            f"{path} was written by another version of msil and does not describe a detector of this one ({reason}): "
            "import it again, or load it with the version that wrote it."
        ) from error
