"""Which settings a run with `model.weights` really has: those of the net come from the file."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from msil.checkpoints.assemble import DETECTION
from msil.checkpoints.description import explicit, read_description, run_settings
from msil.config import Config, Mode, ModelConfig
from msil.errors import ConfigError

# Of a group that was typed, what has to agree with the file; the rest of the group's values are only its defaults.
_IDENTITY = {
    "model/backbone": ("backbone.name",),
    "model/head": ("head.name", "head.centerness_on_reg", "head.norm_on_bbox"),
}


def settled(config: Config) -> Config:
    """`config` with the net of the file in model.weights, where there is one that describes itself.

    From the command come the settings of detection, and in training the MSIL switches and the backbone's norm and
    frozen_stages; of these the MSIL switches always, the others where they are not null. No backbone weights are read
    besides. A test scores the file's classes, renamed as its run had them, unless data.classes is given.

    Raises WeightsError for a file that is missing or unreadable.
    """
    typed, data = config.model, config.data
    if typed.weights is None:
        return config
    description = read_description(typed.weights)
    model = typed if description is None else description.model
    backbone, msil = explicit(model.backbone), model.msil
    if config.mode == Mode.train and description is not None:
        names = ("norm", "frozen_stages")
        backbone |= {name: value for name in names if (value := typed.backbone.get(name)) is not None}
        msil = typed.msil
    if config.mode == Mode.test and description is not None and data.classes is None:
        own = (run_settings(typed.weights) or {}).get("data", {}).get("classes")
        names = {name: name for name in description.classes}
        data = dataclasses.replace(data, classes={**own, **names} if isinstance(own, dict) else [*names])
    model = dataclasses.replace(
        model,
        weights=typed.weights,
        weights_sha256=_sha256(typed.weights, os.stat(typed.weights).st_mtime_ns),
        backbone=backbone,
        msil=msil,
        **{name: value for name in DETECTION if (value := getattr(typed, name)) is not None},
    )
    return dataclasses.replace(config, data=data, model=model)


def check_typed(composed: Config, keys: Sequence[str]) -> None:
    """Raises ConfigError for a typed setting or group of the net that the file in model.weights overrules.

    composed: before `settled`. keys: names of the typed overrides, e.g. model/head, model.channels.
    """
    model = settled(composed).model
    for key in keys:
        if key == "model":
            raise ConfigError(
                "model.weights brings its own net: leave out model=..., and write settings one by one, as in "
                "model.msil.align=false."
            )
        if not key.startswith(("model.", "model/")):
            continue
        holds, remedy = f"{key} was typed, but {composed.model.weights} holds", f"leave {key} out, or give the weights"
        if model.detector is not None and key.startswith(("model/head", "model/backbone")):
            raise ConfigError(f"{holds} torchvision's {model.detector}: {remedy} of another net.")
        for path in _IDENTITY.get(key, (key.replace("/", ".").removeprefix("model."),)):
            ours, theirs = _at(composed.model, path), _at(model, path)
            if ours != theirs:
                raise ConfigError(
                    f"{holds} a net with model.{path}={_plain(theirs)}, not {_plain(ours)}: {remedy} of another net."
                )


def _at(model: ModelConfig, path: str) -> Any:
    value: Any = model
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else getattr(value, name)
    return value


def _plain(value: Any) -> object:
    return "null" if value is None else dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # pyright: ignore[reportArgumentType]


@lru_cache(maxsize=16)
def _sha256(path: str, modified: int) -> str:
    """Of the file's content; `modified` makes a changed file another entry of the cache."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
