"""A command as it is typed, before Hydra reads it: flags anywhere, ~ as the home folder, a file's own settings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import Override

from msil.compose import CONF
from msil.errors import quoted
from msil.explain import flag_as_setting
from msil.runs import weights_file

_HOME = re.compile(r"(?<=[=,\[\"'])~(?=/)")
# Of a run's section `data`, which split and size of images and which of its images.
_DATA = ("root", "train_split", "val_split", "val_fraction", "annotations", "images", "title", "classes", "num_train",
         "num_val", "image_size", "seed")  # fmt: skip


def normalised(words: Sequence[str]) -> list[str]:
    """The same command with its flags, such as -m, before the settings, where argparse needs them, and with the home
    folder in the place of a path's ~.

    Raises ConfigError for a setting that is typed as a flag.
    """
    options = get_args_parser()._actions
    known = [name for option in options for name in option.option_strings]
    takes_value = {name for option in options for name in option.option_strings if option.nargs is None}
    flags, settings = [], []
    rest = iter(words)
    for word in rest:
        if word.startswith("-"):
            name, equals, value = word.removeprefix("--").partition("=")
            if word.startswith("--") and not any(one.startswith(f"--{name}") for one in known):
                after = value if equals else next(rest, None)
                raise flag_as_setting(name, None if after is None or after.startswith("-") else after, [CONF])
            flags.append(word)
            if word in takes_value:
                flags += [value for value in [next(rest, None)] if value is not None]
        else:
            settings.append(_HOME.sub(str(Path.home()), word))
    return [*flags, *settings]


def inherited(overrides: Sequence[Override]) -> list[str]:
    """What a command takes from the file in model.weights, as overrides to stand before its own: the size and bits
    of images, and the run's data set unless another is typed. Of a bare state dict, nothing.

    Raises WeightsError for a file that is missing or unreadable.
    """
    typed = {one.key_or_group: one for one in overrides if not one.is_sweep_override()}
    path = typed["model.weights"].value() if "model.weights" in typed else None
    if not isinstance(path, str):
        return []
    from msil.checkpoints.description import read_description, run_settings  # late: torch takes seconds

    description = read_description(weights_file(path))
    if description is None:
        return []
    values: dict[str, Any] = {"data.min_size": description.min_size, "data.max_size": description.max_size}
    settings = run_settings(weights_file(path))
    if settings is not None:
        values["data.bits"] = settings["data"].get("bits")
    if settings is not None and "data" not in typed:
        data, taken = settings["data"], {*_DATA}
        if typed.keys() & {"data.root", "data.annotations", "data.images"}:  # other images: all of them, by their name
            taken -= {"val_fraction", "title"}
        values = {"data": data["name"], **values, **{f"data.{name}": data.get(name) for name in _DATA if name in taken}}
    return [f"{key}={quoted(value)}" for key, value in values.items() if value is not None]
