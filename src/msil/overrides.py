"""Checks what was typed, before Hydra and before any job: one sentence, with the nearest right name.

Hydra alone answers a wrong key with the advice to add it by `+`, and a wrong value in a sweep after some jobs ran.
"""

from __future__ import annotations

import difflib
import itertools
import types
import typing
from collections.abc import Sequence
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, ValueType
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from msil.config import Config, to_config
from msil.errors import ConfigError, UserError
from msil.sweep.slurm import check_launcher
from msil.untrusted import refuse_code
from msil.validate import validate

# Their settings depend on the choice: a head's, a backbone's own.
OPEN_GROUPS = ("model.head", "model.backbone")
# OmegaConf's messages end in lines about its internals, Hydra's in its search path and the advice to use `+`.
_INTERNALS = ("full_key:", "object_type=", "reference_type=", "To append to", "Config search path")


def check_command_line(arguments: Sequence[str], conf: Path) -> None:
    """Raises ConfigError if the command `run.py *arguments` cannot work; does nothing for --help and its like.

    `conf`: the folder that holds config.yaml. A single run's values are checked here too, a sweep's by its launcher.
    """
    flags = get_args_parser().parse_args(list(arguments))
    if flags.help or flags.hydra_help or flags.info or flags.shell_completion:
        return
    if flags.experimental_rerun:
        raise ConfigError("--experimental-rerun reads a pickle, which can run code: give the settings themselves.")
    if flags.config_path or flags.config_name:  # settings all of the user's own, which only Hydra checks further
        typed_now = [override for override in map(_parse, flags.overrides) if not override.is_sweep_override()]
        own = conf if flags.config_path is None else conf.parent / flags.config_path
        refuse_code(_compose(typed_now, _folders(own.resolve(), flags.config_dir), flags.config_name or "config"))
        return
    if flags.multirun and flags.cfg:
        raise ConfigError("--cfg shows the settings of one run: leave out -m and what it sweeps.")
    folders = _folders(conf, flags.config_dir)
    overrides = check_overrides(flags.overrides, folders)
    config = _compose(overrides, folders)
    refuse_code(config)
    _check_swept_choices(overrides, folders)
    if flags.multirun or config.hydra.mode == RunMode.MULTIRUN:
        params = config.hydra.sweeper.get("params") or {}
        check_overrides([f"{key}={value}" for key, value in params.items()], folders)
        launcher = OmegaConf.to_container(config.hydra.launcher, resolve=True)
        check_launcher(typing.cast(dict[str, Any], launcher), config.trainer.devices)
        return
    for override in overrides:
        if override.key_or_group == "hydra.launcher.dry_run":  # nobody means it to train
            raise ConfigError(f"{override.input_line} is for a sweep: add -m, or leave it out for a single run.")
        if override.is_sweep_override() and not override.is_hydra_override():
            raise ConfigError(
                f"{override.input_line} names several values: add -m to run one job for each, "
                "or write [a,b] if one list is meant."
            )
    check_weights(config, [override.key_or_group for override in overrides])
    if not flags.cfg:
        validate(typed(config))


def _folders(conf: Path, config_dir: str | None) -> list[Path]:
    return [conf] + ([Path(config_dir).resolve()] if config_dir else [])


def _check_swept_choices(overrides: Sequence[Override], folders: Sequence[Path]) -> None:
    """Raises ConfigError if a choice of a sweep, from a file of the user's own, would run code."""
    if not folders[1:]:
        return
    groups = config_groups(folders)
    for override in overrides:
        if override.is_sweep_override() and override.key_or_group in groups:
            for choice in _values(override) or groups[override.key_or_group]:
                line = _parse(f"{override.key_or_group}={choice}")
                refuse_code(_compose([*overrides, line], folders))


def check_weights(config: DictConfig, keys: Sequence[str]) -> None:
    """Raises ConfigError for a typed setting, of these keys, that model.detector or the file in model.weights
    overrules."""
    if config.model.detector is not None:
        for key in keys:
            if key.replace("/", ".").startswith(("model.head", "model.backbone", "model.channel", "model.image_")):
                raise ConfigError(f"{key} has no effect with model.detector={config.model.detector}: leave it out.")
    if config.model.weights is not None:
        from msil.checkpoints.settle import check_typed  # late: it needs torch

        check_typed(_resolved(config), keys)


def typed(config: DictConfig) -> Config:
    """As msil.config.to_config, with the net of the file in model.weights; a value that is missing, mistyped or not
    resolvable is a ConfigError."""
    return settled(_resolved(config))


def settled(config: Config) -> Config:
    """`config` with the net of the file in model.weights. Raises WeightsError for that file."""
    if config.model.weights is None:
        return config
    from msil.checkpoints.settle import settled as with_file  # late: it needs torch

    return with_file(config)


def _resolved(config: DictConfig) -> Config:
    try:
        return to_config(config)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} must be given, as {error.full_key}=...") from error
    except OmegaConfBaseException as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, UserError):  # of the file in model.weights, which run_name is made of
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise ConfigError(one_line(error)) from error


def check_overrides(lines: Sequence[str], folders: Sequence[Path]) -> list[Override]:
    """The parsed overrides. Raises ConfigError for an unknown key or choice and a value of the wrong type.

    `folders`: where config groups are looked up. Hydra's own overrides (`hydra.*`) are left to Hydra.
    """
    groups = config_groups(folders)
    parsed = [_parse(line) for line in lines]
    for override in parsed:
        if not override.is_hydra_override():
            _check_override(override, groups, folders)
    return parsed


def config_groups(folders: Sequence[Path]) -> dict[str, list[str]]:
    """Group, e.g. model/msil, to its choices, e.g. full, no_align, no_separate."""
    groups: dict[str, list[str]] = {}
    for folder in folders:
        for file in sorted(folder.rglob("*.yaml")):
            group = file.parent.relative_to(folder).as_posix()
            if group != "." and group.split("/")[0] != "hydra":
                groups.setdefault(group, []).append(file.stem)
    return groups


def settings(owner: type = Config, prefix: str = "") -> dict[str, tuple[type, str, Any]]:
    """Every setting's full name, e.g. model.msil.align, to (the dataclass that holds it, its field, its type)."""
    found: dict[str, tuple[type, str, Any]] = {}
    for name, hint in get_type_hints(owner).items():
        if is_dataclass(hint):
            found.update(settings(typing.cast(type, hint), f"{prefix}{name}."))
        elif prefix + name not in OPEN_GROUPS:
            found[prefix + name] = (owner, name, hint)
    return found


def chosen_settings(folders: Sequence[Path]) -> dict[str, tuple[type, str, Any]]:
    """The settings that stand only in the files of the choices of a group, as `settings`; of any type."""
    found: dict[str, tuple[type, str, Any]] = {}
    for folder, section in itertools.product(folders, OPEN_GROUPS):
        for file in sorted(folder.joinpath(*section.split(".")).glob("*.yaml")):
            values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
            for name in section.split(".") if section.split(".")[0] in values else ():  # @package _global_
                values = values.get(name) or {}
            found |= {f"{section}.{name}": (dict, name, Any) for name in values if name != "defaults"}
    return found


def nearest(name: str, names: Sequence[str]) -> str | None:
    """The name most like the typed one; a typed tail (`align`, `msil.align`) finds its full name."""
    dotted = name.replace("/", ".")
    tails = [other for other in names if other.replace("/", ".").endswith("." + dotted)]
    if tails:
        return tails[0]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return close[0]
    by_tail = {other.replace("/", ".").rpartition(".")[2]: other for other in reversed(names)}
    close = difflib.get_close_matches(dotted.rpartition(".")[2], list(by_tail), n=1, cutoff=0.7)
    return by_tail[close[0]] if close else None


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


def _parse(line: str) -> Override:
    try:
        override = OverridesParser.create().parse_override(line)
        if not override.key_or_group:
            raise HydraException("no name before the =")
        return override
    except HydraException as error:
        raise ConfigError(
            f"cannot read {line!r}: write setting=value, a list as [a,b] without spaces, "
            "and quote what holds spaces or brackets, as in 'data.classes=[\"traffic light\",cat]'."
        ) from error


def _check_override(override: Override, groups: dict[str, list[str]], folders: Sequence[Path]) -> None:
    key = override.key_or_group
    leaves = settings() | chosen_settings(folders)
    sections = {name.rpartition(".")[0] for name in leaves} - {""}
    known = key in groups or key in leaves or key in sections
    if not known:
        parent, _, name = key.rpartition(".")
        if parent == "model.msil.options":
            raise ConfigError(f"{key}: the arguments of a block are typed together, as in '{parent}={{{name}: 2}}'.")
        guess = nearest(key, [*leaves, *groups])
        raise ConfigError(
            f"{key} is not a setting." + (f" Did you mean {guess}?" if guess else " --cfg job lists them all.")
        )
    if override.type == OverrideType.DEL:
        raise ConfigError(f"{override.input_line}: a setting cannot be removed; {key}=null turns off what can be off.")
    if override.type == OverrideType.ADD:
        raise ConfigError(f"{override.input_line}: {key} exists already, so leave out the +.")
    if _is_glob(override) and key not in groups:
        raise ConfigError(f"{override.input_line}: glob lists the choices of a group, and {key} is none.")
    for value in _values(override):
        if key in groups and not isinstance(value, dict):
            _check_choice(key, value, groups[key])
        else:
            _check_value(key, value, leaves, groups)
    if key == "experiment" and (override.is_sweep_override() or isinstance(override.value(), list)):
        raise ConfigError(
            f"{override.input_line} would lose the sweeps of both files: run one experiment after the other, "
            "in a command each."
        )


def _values(override: Override) -> list[Any]:
    """The one value, or each value of a sweep; none where a sweep cannot be listed before it runs (glob, interval)."""
    if not override.is_sweep_override():
        return [override.value()]
    if override.is_interval_sweep() or _is_glob(override):
        return []
    return [Override._convert_value(value) for value in override.sweep_iterator()]  # type: ignore[arg-type]


def _is_glob(override: Override) -> bool:
    return override.value_type is ValueType.GLOB_CHOICE_SWEEP


def _check_choice(group: str, value: Any, choices: Sequence[str]) -> None:
    for choice in value if isinstance(value, list) else [value]:
        if choice is None:
            raise ConfigError(f"{group}=null is not a choice: leave {group} out to get its default.")
        name = str(choice).removesuffix(".yaml")
        if name not in choices:
            guess = nearest(name, list(choices))
            raise ConfigError(
                f"{group}={name} is not a choice."
                + (f" Did you mean {group}={guess}?" if guess else "")
                + f" There are: {', '.join(choices)}."
            )


def _check_value(key: str, value: Any, leaves: dict[str, tuple[type, str, Any]], groups: dict[str, list[str]]) -> None:
    if isinstance(value, dict) and key not in leaves:  # model.msil={align:false,apply:cls}
        for name, inner in value.items():
            path = f"{key.replace('/', '.')}.{name}"
            if path not in leaves and not isinstance(inner, dict):
                guess = nearest(path, list(leaves))
                raise ConfigError(f"{path} is not a setting." + (f" Did you mean {guess}?" if guess else ""))
            _check_value(path, inner, leaves, groups)
        return
    if key not in leaves:
        group = key.replace(".", "/")
        if group in groups:
            choice = nearest(str(value), groups[group]) or groups[group][0]
            raise ConfigError(f"{key}={value} sets a whole group: write {group}={choice}.")
        first = next(name for name in leaves if name.startswith(key + "."))
        raise ConfigError(f"{key}={value} sets a whole group: set one of its settings, as in {first}=...")
    if isinstance(value, str) and "${" in value:
        return
    owner, name, hint = leaves[key]
    if hint is Any:  # of a head or a backbone, which checks it
        return
    try:
        OmegaConf.structured(owner)[name] = value
    except OmegaConfBaseException as error:
        shown = "null" if value is None else value
        wanted, words = _wanted(hint)
        guess = nearest(str(value), words) if words else None
        raise ConfigError(
            f"{key}={shown} must be {wanted}." + (f" Did you mean {key}={guess}?" if guess else "")
        ) from error


def _wanted(hint: Any) -> tuple[str, list[str]]:
    """What a type admits, in words, and the words to guess from."""
    if get_origin(hint) in (Union, types.UnionType):
        parts = [_wanted(part) for part in get_args(hint)]
        return " or ".join(part[0] for part in parts), [word for part in parts for word in part[1]]
    if get_origin(hint) is list:
        (inner,) = get_args(hint)
        return ("a list of whole numbers such as [8,11]" if inner is int else "a list of words such as [cat,dog]"), []
    if isinstance(hint, type) and issubclass(hint, Enum):
        names = [member.name for member in hint]
        return ("one of " if len(names) > 1 else "") + ", ".join(names), names
    return {
        bool: ("true or false", ["true", "false"]),
        int: ("a whole number", []),
        float: ("a number", []),
        str: ("a text", []),
        type(None): ("null", ["null"]),
    }[hint]


def _compose(overrides: Sequence[Override], folders: Sequence[Path], name: str = "config") -> DictConfig:
    """The settings with Hydra's own, sweeps left out: they take the values that the files give."""
    lines = [str(override.input_line) for override in overrides if not override.is_sweep_override()]
    if folders[1:]:
        lines.append(f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in folders[1:])}]")
    try:
        with initialize_config_dir(str(folders[0]), version_base="1.3", job_name="run"):
            return compose(name, lines, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        for override in overrides:
            key = override.key_or_group
            if key in str(error) and key.startswith(tuple(f"{section}." for section in OPEN_GROUPS)):
                section, _, name = key.rpartition(".")
                group = section.replace(".", "/")
                raise ConfigError(
                    f"{key} has no meaning for this {group}: conf/{group}/ has each one's settings."
                ) from error
        raise ConfigError(one_line(error)) from error
