"""What a file of weights says of itself, so that the net that it is of can be built again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from msil.checkpoints.assemble import backbone_options
from msil.config import ModelConfig, from_plain, plain
from msil.detection.weights import load_file
from msil.errors import ConfigError, WeightsError
from msil.runs import weights_file


@dataclass(frozen=True)
class Description:
    """model: the detector's settings; msil.apply is none where the file holds no MSIL.
    min_size, max_size: what it resizes images to. classes, category_ids: of its labels, in their order.
    source: where the weights come from, in words. bits: of 16-bit image files, how many held the picture.
    """

    model: ModelConfig
    min_size: int
    max_size: int
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    source: str
    bits: int = 16


def to_text(description: Description) -> str:
    """As json, for the header of a safetensors file."""
    return json.dumps({**vars(description), "model": plain(description.model)})


def described(values: Mapping[str, Any]) -> Description:
    """From the names of Description, with model.* as plain values. Settings that are not given have their defaults.

    Raises ConfigError, KeyError, TypeError or ValueError for what describes no detector.
    """
    model = from_plain(ModelConfig, values["model"])
    return Description(
        dataclasses.replace(model, backbone=explicit(model.backbone), weights=None, weights_sha256=None),
        int(values["min_size"]),
        int(values["max_size"]),
        tuple(values["classes"]),
        tuple(values["category_ids"]),
        str(values["source"]),
        int(values.get("bits") or 16),
    )


def read_description(path: str | Path) -> Description | None:
    """What an imported .safetensors file or a run's checkpoint says of itself; None for a bare state dict.

    Raises WeightsError for a file that is missing or unreadable, or a description that is not of this version.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors" and path.is_file():
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get("msil")
            return None if text is None else described(json.loads(text))
        own = _saved_by_run(path)
        if own is None:
            return None
        config = own["config"]
        names = {key: own[key] for key in ("classes", "category_ids")}
        sizes = {key: config["data"].get(key) for key in ("min_size", "max_size", "bits")}
        return described({"model": config["model"], "source": f"run {config['run_name']}", **names, **sizes})
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read as a safetensors file ({error}): make it anew.") from error
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{path} was written by another version of msil and does not describe a detector of this one "
            f"({str(error).splitlines()[0]}): import it again, or load it with the version that wrote it."
        ) from error


def run_settings(path: str | Path) -> Mapping[str, Any] | None:
    """The resolved settings of the run that wrote this checkpoint; None for a file that no run wrote.

    Raises WeightsError for a file that is missing or unreadable.
    """
    own = _saved_by_run(weights_file(path))
    return None if own is None else own.get("config")


def trained_on(path: str | Path, data: Mapping[str, Any], split: str, digests: Mapping[str, str]) -> bool:
    """Whether a run's checkpoint was trained on images of a split of `data`, a run's settings under "data". digests:
    the split's, see msil.data.fingerprint. False where the checkpoint has none, or held out the very part that is asked
    for."""
    own = _saved_by_run(weights_file(path)) or {}
    before = own["config"]["data"] if own else {}
    trained = own.get("data", {}).get(before.get("train_split"), {})
    fraction = data.get("val_fraction")
    held_out = fraction is not None and split == data["val_split"] and before.get("val_fraction") == fraction
    # Which images are held out depends on the boxes too.
    return trained.get("images") == digests["images"] and not (held_out and trained == digests)


def _saved_by_run(path: Path) -> Mapping[str, Any] | None:
    """What a run saves under "msil" in its checkpoints; None in other files."""
    content = load_file(path, mmap=True)
    own = content.get("msil") if isinstance(content, Mapping) else None
    return own if isinstance(own, Mapping) else None


def explicit(backbone: Mapping[str, Any]) -> dict[str, Any]:
    """The same backbone without weights of its own to read: what they decide is written out."""
    return {**backbone, "weights": None, **backbone_options(backbone).decided()} if backbone else {}
