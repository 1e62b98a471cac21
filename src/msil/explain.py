"""A command that Hydra refuses, explained in one sentence with the nearest right name.

Hydra itself advises to add an unknown key by `+`, and its messages are several lines.
"""

from __future__ import annotations

import difflib
import itertools
import re
import shlex
import types
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from msil.config import Config, every_setting
from msil.errors import ConfigError, UserError

# Their settings depend on the choice: a head's, a backbone's own.
OPEN_GROUPS = ("model.head", "model.backbone")
# What other programs call a setting.
ALSO_CALLED = {
    "gpu": "trainer.devices", "gpus": "trainer.devices", "max_epochs": "schedule.epochs", "lr0": "schedule.lr",
    "num_epochs": "schedule.epochs", "learning_rate": "schedule.lr", "lr_scheduler": "schedule.decay",
    "img_size": "data.min_size", "imgsz": "data.min_size", "path": "data.root", "batch": "data.batch_size",
    "num_classes": "data.classes", "pretrained": "model.backbone.weights",
}  # fmt: skip
# OmegaConf's messages end in lines about its internals, Hydra's in its search path and the advice to use `+`.
_INTERNALS = ("full_key:", "object_type=", "reference_type=", "To append to", "Config search path")


def parse(line: str) -> Override:
    """One override. Raises ConfigError for what Hydra's grammar does not read."""
    override = _parsed(line)
    if override is not None:
        return override
    setting, equals, value = line.partition("=")
    in_quotes = f'{setting}="{value}"'
    if value and not value.startswith(("[", "{")) and _parsed(in_quotes) is not None:
        raise ConfigError(f"cannot read {line!r}: quote the value, as in {shlex.quote(in_quotes)}.")
    if not equals:  # most often the rest of a path
        raise ConfigError(
            f"cannot read {line!r}: write setting=value, and a value that holds spaces as in 'data.root=\"my photos\"'."
        )
    raise ConfigError(
        f"cannot read {line!r}: write setting=value, a list as [a,b] without spaces, "
        "and quote what holds spaces or brackets, as in 'data.classes=[\"traffic light\",cat]'."
    )


def _parsed(line: str) -> Override | None:
    try:
        override = OverridesParser.create().parse_override(line)
    except HydraException:
        return None
    return override if override.key_or_group else None


def flag_as_setting(name: str, value: str | None, folders: Sequence[Path]) -> UserError:
    """The sentence for --epochs 3, which is no flag of ours. value: what follows it, if anything."""
    guess = nearest(name, [*settings(), *config_groups(folders)])
    typed = f"{guess or 'schedule.epochs'}={'3' if guess is None else value or '...'}"
    return ConfigError(
        f"--{name} is not a flag: settings are typed without dashes, as in {typed}; --help lists the flags."
    )


def explain(error: Exception, overrides: Sequence[Override], folders: Sequence[Path]) -> UserError:
    """The sentence for `error`, which Hydra or OmegaConf raised on these overrides.

    folders: where config groups are looked up.
    """
    if own := raised_inside(error):
        return own
    if reason := _first_wrong(overrides, folders):
        return ConfigError(reason)
    for override in overrides:
        key = override.key_or_group
        if key in str(error) and key.startswith(tuple(f"{section}." for section in OPEN_GROUPS)):
            group = key.rpartition(".")[0].replace(".", "/")
            return ConfigError(f"{key} has no meaning for this {group}: conf/{group}/ has each one's settings.")
    return ConfigError(one_line(error))


def refuse_unknown(overrides: Sequence[Override], folders: Sequence[Path]) -> None:
    """Raises ConfigError for a setting that + adds, which Hydra would take and nothing would read."""
    added = [one for one in overrides if one.type in (OverrideType.ADD, OverrideType.FORCE_ADD)]
    if added and (reason := _first_wrong(added, folders)):
        raise ConfigError(reason)


def _first_wrong(overrides: Sequence[Override], folders: Sequence[Path]) -> str | None:
    groups, leaves = config_groups(folders), settings() | _chosen_settings(folders)
    reasons = (_wrong(override, groups, leaves) for override in overrides if not override.is_hydra_override())
    return next(filter(None, reasons), None)


def config_groups(folders: Sequence[Path]) -> dict[str, list[str]]:
    """Group, e.g. model/msil, to its choices, e.g. full, no_align, no_separate."""
    groups: dict[str, list[str]] = {}
    for folder in folders:
        for file in sorted(folder.rglob("*.yaml")):
            group = file.parent.relative_to(folder).as_posix()
            if group != "." and group.split("/")[0] != "hydra":
                groups.setdefault(group, []).append(file.stem)
    return groups


def settings() -> dict[str, Any]:
    """Every setting's full name, e.g. model.msil.align, to its type."""
    return {path: hint for path, hint, _ in every_setting() if path not in OPEN_GROUPS}


def nearest(name: str, names: Sequence[str]) -> str | None:
    """The name most like the typed one; `align`, `msil.align` and `train.epochs` find those that end alike."""
    ends = {other: re.split("[./]", other)[-1] for other in names}
    end = re.split("[./]", name)[-1]
    if (other := ALSO_CALLED.get(end)) in names:
        return other
    alike = [other for other in names if ends[other] == end]
    close = difflib.get_close_matches(name, alike, n=1, cutoff=0.0) or difflib.get_close_matches(name, names, n=1)
    if close:
        return close[0]
    near = difflib.get_close_matches(end, ends.values(), n=1, cutoff=0.7)
    return next((other for other in names if ends[other] in near), None)


def one_line(error: BaseException) -> str:
    """An error of Hydra or OmegaConf, and what caused it, as one sentence."""
    texts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(texts) < 2:
        lines = [line.strip() for line in str(cause).splitlines()]
        kept = itertools.takewhile(lambda line: not line.startswith(_INTERNALS), lines)
        text = " ".join(line for line in kept if line).rstrip(".")
        key = next((line.removeprefix("full_key:").strip() for line in lines if line.startswith("full_key:")), "")
        if text and text not in texts:
            texts.append(f"{key}: {text}" if key and key not in text else text)
        cause = cause.__cause__
    return ": ".join(texts) + "."


def raised_inside(error: BaseException | None) -> UserError | None:
    """An error of this project's resolvers, which OmegaConf wraps in one of its own."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def _chosen_settings(folders: Sequence[Path]) -> dict[str, Any]:
    """The settings that stand only in the files of the choices of a group, as `settings`; of any type."""
    found: dict[str, Any] = {}
    for folder, section in itertools.product(folders, OPEN_GROUPS):
        for file in sorted(folder.joinpath(*section.split(".")).glob("*.yaml")):
            try:
                values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
            except yaml.YAMLError as error:
                raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}.") from error
            for name in section.split(".") if "model" in values else ():  # @package _global_
                values = values.get(name) or {}
            found |= {f"{section}.{name}": Any for name in values if name != "defaults"}
    return found


def _wrong(override: Override, groups: Mapping[str, list[str]], leaves: Mapping[str, Any]) -> str | None:
    """What is wrong with an override, or None."""
    key = override.key_or_group
    sections = {name.rpartition(".")[0] for name in leaves} - {""}
    if key not in groups and key not in leaves and key not in sections:
        parent, _, name = key.rpartition(".")
        if parent == "model.msil.options":
            return f"{key}: the arguments of a block are typed together, as in '{parent}={{{name}: 2}}'."
        guess = nearest(key, [*leaves, *groups])
        return f"{key} is not a setting." + (f" Did you mean {guess}?" if guess else " --cfg job lists them all.")
    if override.type == OverrideType.DEL:
        return f"{override.input_line}: a setting cannot be removed; {key}=null turns off what can be off."
    if override.type == OverrideType.ADD:
        return f"{override.input_line}: {key} exists already, so leave out the +."
    for value in _values(override):
        if key in groups and not isinstance(value, dict):
            reason = _wrong_choice(key, value, groups, leaves)
        else:
            reason = _wrong_value(key, value, leaves, groups)
        if reason:
            return reason
    return None


def _values(override: Override) -> list[Any]:
    """The one value, or each value of a sweep that lists them."""
    if not override.is_sweep_override():
        return [override.value()]
    if not override.is_choice_sweep() and not override.is_range_sweep():
        return []
    return [Override._convert_value(value) for value in override.sweep_iterator()]  # pyright: ignore[reportArgumentType]


def _wrong_choice(group: str, value: Any, groups: Mapping[str, list[str]], leaves: Mapping[str, Any]) -> str | None:
    choices = groups[group]
    for choice in value if isinstance(value, list) else [value]:
        if choice is None:
            return f"{group}=null is not a choice: leave {group} out to get its default."
        name = str(choice).removesuffix(".yaml")
        if name not in choices:
            elsewhere = [other for other in groups if name in groups[other]]
            guess = _inside(group, name, leaves) or next((f"{other}={name}" for other in elsewhere), None)
            if guess is None and (near := nearest(name.lower(), choices)):
                guess = f"{group}={near}"
            hint = f" Did you mean {guess}?" if guess else ""
            return f"{group}={name} is not a choice.{hint} There are: {', '.join(choices)}."
    return None


def _wrong_value(key: str, value: Any, leaves: Mapping[str, Any], groups: Mapping[str, list[str]]) -> str | None:
    if isinstance(value, dict) and key not in leaves:  # model.msil={align:false,apply:cls}
        for name, inner in value.items():
            path = f"{key.replace('/', '.')}.{name}"
            if path not in leaves and not isinstance(inner, dict):
                guess = nearest(path, list(leaves))
                return f"{path} is not a setting." + (f" Did you mean {guess}?" if guess else "")
            if reason := _wrong_value(path, inner, leaves, groups):
                return reason
        return None
    if key not in leaves:
        group = key.replace(".", "/")
        if group in groups:
            word = "none" if value in (None, False, "off") else str(value)
            if word not in groups[group] and (guess := _inside(group, word, leaves)):
                return f"{key}={value} sets a whole group: write {guess}."
            choice = nearest(word, groups[group]) or groups[group][0]
            return f"{key}={value} sets a whole group: write {group}={choice}."
        first = next(name for name in leaves if name.startswith(key + "."))
        return f"{key}={value} sets a whole group: set one of its settings, as in {first}=..."
    if isinstance(value, str) and "${" in value:
        return None
    try:
        OmegaConf.update(OmegaConf.structured(Config), key, value)
    except OmegaConfBaseException:
        wanted, words = _wanted(leaves[key])
        guess = nearest(str(value).lower(), words) if words else None
        hint = f" Did you mean {key}={guess}?" if guess else ""
        return f"{key}={'null' if value is None else value} must be {wanted}.{hint}"
    return None


def _inside(group: str, value: str, leaves: Mapping[str, Any]) -> str | None:
    """The setting of a group that has this very word as a value, with it: model.msil.apply=none of model.msil."""
    for name, hint in leaves.items():
        words = hint.__members__ if isinstance(hint, type) and issubclass(hint, Enum) else ()
        if name.startswith(group.replace("/", ".") + ".") and value in words:
            return f"{name}={value}"
    return None


def _wanted(hint: Any) -> tuple[str, list[str]]:
    """What a type admits, in words, and the words to guess from."""
    if get_origin(hint) in (Union, types.UnionType):
        parts = [_wanted(part) for part in get_args(hint)]
        return " or ".join(part[0] for part in parts), [word for part in parts for word in part[1]]
    if get_origin(hint) is list:
        (inner,) = get_args(hint)
        example = {int: "whole numbers such as [8,11]", float: "numbers such as [0.5,1]"}
        return f"a list of {example.get(inner, 'words such as [cat,dog]')}", []
    if isinstance(hint, type) and issubclass(hint, Enum):
        names = [member.name for member in hint]
        return f"one of {', '.join(names)}", names
    return {
        bool: ("true or false", ["true", "false"]),
        int: ("a whole number", []),
        float: ("a number", []),
        str: ("a text", []),
        type(None): ("null", ["null"]),
    }[hint]
