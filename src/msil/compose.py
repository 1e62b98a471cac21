"""Settings through Hydra and OmegaConf: the schema, the resolvers of conf/, a command's composed settings."""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from msil.config import STAND_INS, Config, plain
from msil.errors import ConfigError
from msil.explain import explain
from msil.runs import default_run_name, weights_file

_CHECKOUT = Path(__file__).resolve().parents[2] / "conf"
CONF = _CHECKOUT if _CHECKOUT.is_dir() else Path(__file__).resolve().parent / "conf"  # of a wheel

# In the paper's tables under a schedule that trains from scratch in minutes, these nets stand in for its own.
FROM_SCRATCH = ("quick", "smoke")
_CHOICES = {"resnet18": "resnet18_scratch"}  # of model/backbone, where the net's own name starts from ImageNet


def composed_by_hydra(flags: argparse.Namespace, overrides: Sequence[Override]) -> DictConfig:
    """The settings with Hydra's own, sweeps left out: they take the values that the files give."""
    folders = config_folders(flags)
    lines = [str(override.input_line) for override in overrides if not override.is_sweep_override()]
    if folders[1:]:
        lines.append(f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in folders[1:])}]")
    try:
        with initialize_config_dir(str(folders[0]), version_base="1.3", job_name="run"):
            return compose(flags.config_name or "config", lines, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        raise explain(error, overrides, folders) from error


def config_folders(flags: argparse.Namespace) -> list[Path]:
    for flag in ("config_path", "config_dir"):
        if vars(flags)[flag] is not None and not Path(vars(flags)[flag]).is_dir():
            raise ConfigError(f"--{flag.replace('_', '-')} {vars(flags)[flag]} is no folder: name one that is there.")
    first = CONF if flags.config_path is None else Path(flags.config_path).resolve()
    return [first, *([Path(flags.config_dir).resolve()] if flags.config_dir else [])]


def to_config(node: DictConfig) -> Config:
    """The composed settings as dataclasses, interpolations resolved and Hydra's own part left out. What the file in
    model.weights says of its net is not in it yet: see msil.checkpoints.settle.

    Raises OmegaConf's errors for a value that is missing, of the wrong type or not resolvable.
    """
    values = copy.deepcopy(node)
    with read_write(values), open_dict(values):
        values.pop("hydra", None)
    config = OmegaConf.to_object(values)
    assert isinstance(config, Config)
    if config.model.weights is not None:
        config.model.weights = str(weights_file(config.model.weights))
    config.data.classes = _names(config.data.classes)
    if config.data.images is not None:
        root, files = config.data.root, config.data.annotations
        if isinstance(files, dict):
            config.data.annotations = {split: _placed(file, root) for split, file in files.items()}
        else:
            config.data.annotations = _placed(files, root)
        config.data.root = config.data.images = _placed(config.data.images, root)
    if config.model.detector is not None:  # it has a head and a backbone of its own
        config.model.head, config.model.backbone = {}, {}
    return config


def _names(classes: Any) -> Any:
    """Classes with names such as 1, which YAML and Hydra read as numbers, as text."""
    if isinstance(classes, dict):
        return {_names(own): _names(new) for own, new in classes.items()}
    if isinstance(classes, list):
        return [_names(name) for name in classes]
    return str(classes) if type(classes) is int else classes


def _placed(path: Any, root: str) -> Any:
    """A path as typed, or below data.root where it is there alone."""
    below = os.path.join(root, path) if isinstance(path, str) else ""
    return below if below and not os.path.exists(path) and os.path.exists(below) else path


def register() -> None:
    """Make `schema` known to Hydra, `${run_name:}` and `${backbones:}` to OmegaConf. Safe to call twice."""
    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("run_name", _resolve_run_name, replace=True)
    OmegaConf.register_new_resolver("backbones", _resolve_backbones, replace=True)


def _resolve_run_name(*, _root_: DictConfig) -> str:
    values = copy.deepcopy(_root_)
    with read_write(values):
        values.run_name = ""  # whose value is asked for
    config = to_config(values)
    if config.model.weights is not None:
        from msil.checkpoints.settle import settled  # late: torch takes seconds

        config = settled(config)
    return default_run_name(plain(config))


def _resolve_backbones(schedule: str, *names: str) -> str:
    """The choices of a table's sweep over model/backbone: the paper's, or under a quick schedule what stands in."""
    if schedule in FROM_SCRATCH:
        nets = [STAND_INS[name] for name in names]
        names = tuple(_CHOICES.get(net, net) for net in nets)
    return ",".join(names)
