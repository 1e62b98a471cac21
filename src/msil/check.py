"""A composed command -> a Config whose values can work: types, limits, and rules over several settings."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from msil.compose import to_config
from msil.config import (
    Apply,
    Augment,
    Config,
    DataConfig,
    DataName,
    Decay,
    LoggerName,
    Mode,
    ModelConfig,
    OptimizerName,
    every_setting,
)
from msil.errors import ConfigError, install
from msil.explain import one_line, raised_inside

ONLY_SHAPES = ("num_train", "num_val", "image_size", "seed")
SLURM = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"


def checked(composed: DictConfig, typed: Sequence[str] = ()) -> Config:
    """The settings of one run, with the net of the file in model.weights.

    typed: names of the settings that the command gives, none of which may be without effect.
    Raises ConfigError, one sentence naming the setting, or WeightsError for that file.
    """
    try:
        config = to_config(composed)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} must be given, as {error.full_key}=...") from error
    except OmegaConfBaseException as error:
        raise raised_inside(error) or ConfigError(one_line(error)) from error
    idle = _idle(config)
    for key in typed:
        for name, reason in idle.items():
            if f"{key.replace('/', '.')}.".startswith(f"{name}."):
                raise ConfigError(f"{key} has no effect with {reason}: leave out one of them.")
    if config.model.weights is not None:
        from msil.checkpoints.settle import check_typed, settled  # late: torch takes seconds

        check_typed(config, typed)
        config = settled(config)
    check(config)
    return config


def _idle(config: Config) -> dict[str, str]:
    """Settings that change nothing beside another one -> that one, as typed."""
    model, data, schedule = config.model, config.data, config.schedule
    switches = [f"model.msil.{name}" for name in ("align", "separate", "kernel_size", "reduction")]
    rules: list[tuple[bool, str, Sequence[str]]] = [
        (model.detector is not None, f"model.detector={model.detector}",
         ("model.head", "model.backbone", "model.channels", "model.channel_order", "model.image_mean",
          "model.image_std")),
        (model.msil.apply == Apply.none, "model.msil.apply=none",
         (*switches, "model.msil.block", "model.msil.options")),
        (model.msil.block is None, "model.msil.block=null", ("model.msil.options",)),
        (model.msil.block is not None, f"model.msil.block={model.msil.block}", switches),
        (data.augment == Augment.none, "data.augment=none", ("data.flip",)),
        (schedule.optimizer != OptimizerName.sgd, "schedule.optimizer=adamw", ("schedule.momentum",)),
        (schedule.decay == Decay.cosine, "schedule.decay=cosine", ("schedule.milestones", "schedule.gamma")),
        (schedule.warmup_steps == 0, "schedule.warmup_steps=0", ("schedule.warmup_factor",)),
        (config.logger.name != LoggerName.wandb, f"logger={config.logger.name.value}",
         [f"logger.{name}" for name in ("project", "entity", "group", "tags", "offline")]),
        (config.mode == Mode.test, "mode=test",
         [f"schedule.{own.name}" for own in fields(schedule) if own.name != "eval_images"]
         + ["data.augment", "data.flip", "data.multiscale", "data.filter_empty", "data.device_transforms"]),
    ]  # fmt: skip
    return {name: reason for there, reason, names in rules if there for name in names}


def check(config: Config) -> None:
    """Raises ConfigError for the first value that cannot work."""
    for path, _, own in every_setting():
        if own.metadata:
            _check_limits(path, attrgetter(path)(config), **own.metadata)
    _check_mode(config)
    _check_data(config.data)
    _check_schedule(config)
    _check_trainer(config)
    _check_names(config)
    _check_model(config.model)


def _check_limits(
    path: str, value: Any, *, meaning: str, low: Any, high: Any, above: Any, below: Any, choices: Any
) -> None:
    if value is None:
        return
    if choices is not None and value not in choices:
        raise ConfigError(f"{path}={value} must be one of {', '.join(map(str, choices))}.")
    if above is not None and not above < value < (math.inf if below is None else below):
        wanted = "" if below is None else f" and below {below}"
        raise ConfigError(f"{path}={value} must be a number above {above}{wanted}.")
    if (low is not None and not low <= value <= (math.inf if high is None else high)) or value == math.inf:
        raise ConfigError(f"{path}={value} must be {f'at least {low}' if high is None else f'from {low} to {high}'}.")


def _check_mode(config: Config) -> None:
    if config.mode == Mode.test and config.model.weights is None:
        raise ConfigError("mode=test needs model.weights=FILE, a run's checkpoint or an imported detector.")
    if config.mode == Mode.train and config.data.split is not None:
        raise ConfigError(
            f"data.split={config.data.split} is what mode=test evaluates; training takes data.train_split and "
            "data.val_split."
        )


def _check_data(data: DataConfig) -> None:
    if data.max_size < data.min_size:
        raise ConfigError(f"data.max_size={data.max_size} must be at least data.min_size={data.min_size}.")
    sides = data.multiscale
    if sides is not None and not (len(sides) == 2 and 32 <= sides[0] <= sides[1]):
        raise ConfigError(f"data.multiscale={sides} must be two short sides, at least 32 and rising, e.g. [480,960].")
    if data.augment == Augment.none and sides is not None:
        raise ConfigError(f"data.multiscale={sides} has no effect with data.augment=none: set one of them to null.")
    if data.augment == Augment.flip and data.flip == 0:
        raise ConfigError("data.augment=flip mirrors nothing with data.flip=0: leave out one of them.")
    names = [*data.classes, *data.classes.values()] if isinstance(data.classes, dict) else data.classes
    words = isinstance(names, list) and names and all(isinstance(name, str) and name for name in names)
    if names is not None and not words:
        raise ConfigError(
            f"data.classes={data.classes} must be a list of words such as [cat,dog], new names such as "
            "{car: vehicle, bus: vehicle}, or null."
        )
    if names is data.classes and names is not None and len(set(names)) < len(names):
        raise ConfigError(f"data.classes={names} must name none twice.")
    for name in ONLY_SHAPES:
        value = getattr(data, name)
        if data.name == DataName.shapes and value is None:
            raise ConfigError(f"data.{name} must be a number for data=shapes.")
        if data.name != DataName.shapes and value is not None:
            raise ConfigError(f"data.{name}={value} has no meaning for data={data.name.value}, only for data=shapes.")
    _check_place(data)
    for name in ("root", "train_split", "val_split", "split", "images", "title"):
        value = getattr(data, name)
        if value is not None and not value.strip():
            raise ConfigError(f"data.{name} must not be empty.")


def _check_place(data: DataConfig) -> None:
    files = data.annotations
    if (files is None) != (data.images is None) or (files is not None and data.name != DataName.coco):
        raise ConfigError("data.annotations=FILE and data.images=FOLDER go together, and with data=coco.")
    named = list(files.values()) if isinstance(files, dict) else [files]
    if files is not None and not (named and all(isinstance(name, str) and name.strip() for name in named)):
        raise ConfigError(
            f"data.annotations={files} must be a file, or one for each split, {{train: a.json, val: b.json}}."
        )
    if data.val_fraction is not None and data.train_split == data.val_split:
        raise ConfigError(
            f"data.val_fraction holds images out of data.train_split={data.train_split} as data.val_split, which needs "
            "another name."
        )


def _check_schedule(config: Config) -> None:
    schedule = config.schedule
    milestones = schedule.milestones
    if any(epoch < 1 for epoch in milestones) or milestones != sorted(set(milestones)):
        raise ConfigError(f"schedule.milestones={milestones} must be rising epochs from 1 on, e.g. [8,11].")
    if schedule.decay == Decay.step and schedule.gamma > 1:
        raise ConfigError(f"schedule.gamma={schedule.gamma} must not exceed 1: the lr is multiplied by it.")


def _check_trainer(config: Config) -> None:
    trainer = config.trainer
    if config.data.batch_size % trainer.accumulate:
        raise ConfigError(
            f"trainer.accumulate={trainer.accumulate} must divide data.batch_size={config.data.batch_size}: a step's "
            "images are taken in so many batches of one size."
        )
    if trainer.require_gpu and trainer.accelerator == "cpu":
        raise ConfigError("trainer.require_gpu=true contradicts trainer.accelerator=cpu: leave out one of them.")
    devices = trainer.devices
    if isinstance(devices, int):
        usable = devices >= 1 or devices == -1
    else:
        usable = devices == "auto" or all(index.strip().isdecimal() for index in devices.split(","))
    if not usable:
        raise ConfigError(f"trainer.devices={devices} must be a number of devices, auto, or indices such as '0,1'.")
    if config.logger.name == LoggerName.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            f"logger=tensorboard needs the package tensorboard: run {install('tensorboard')}, or leave logger out."
        )


def _check_names(config: Config) -> None:
    name = config.run_name
    if not name or name in (".", "..") or "/" in name or "\\" in name or len(name.encode()) > 200:
        raise ConfigError(f"run_name={name} must be a plain folder name of at most 200 bytes, without slashes.")
    if config.table is not None and not config.table.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(f"table={config.table} must be a plain word such as table1.")
    if not config.runs_dir.strip():
        raise ConfigError("runs_dir must not be empty.")


def _check_model(model: ModelConfig) -> None:
    for name in ("image_mean", "image_std"):
        values = getattr(model, name)
        if values is not None and (len(values) != 3 or not all(math.isfinite(value) for value in values)):
            raise ConfigError(f"model.{name}={values} must be three numbers, one a channel.")
    if model.image_std is not None and min(model.image_std) <= 0:
        raise ConfigError(f"model.image_std={model.image_std} must be above 0.")
    scales = model.test_scales
    if scales is not None and (not scales or min(scales) < 32 or len(set(scales)) < len(scales)):
        raise ConfigError(
            f"model.test_scales={scales} must be short sides of at least 32 pixels, none twice, e.g. [480,640,800]."
        )
    if model.msil.reduction > model.channels:
        raise ConfigError(
            f"model.msil.reduction={model.msil.reduction} must not exceed model.channels={model.channels}."
        )
    if model.msil.init_gate is not None and model.msil.init_gate <= 0.5 and not model.msil.separate:
        raise ConfigError(
            f"model.msil.init_gate={model.msil.init_gate} must be above 0.5 with model.msil.separate=false."
        )
    if model.detector is not None:
        _check_torchvision(model)
    elif model.detector_weights is not None:
        raise ConfigError("model.detector_weights is for model=torchvision; set model.backbone.weights.")
    from msil.checkpoints.assemble import check_model  # late: torch takes seconds

    check_model(model)
    frozen = model.backbone.get("frozen_stages")
    if frozen and model.backbone.get("weights") is None and model.weights is None:
        raise ConfigError(
            f"model.backbone.frozen_stages={frozen} would freeze random weights: set model.backbone.weights=imagenet "
            "or to a file, or model.backbone.frozen_stages=null."
        )


def _check_torchvision(model: ModelConfig) -> None:
    for name in ("test_scales", "test_flip", "topk_candidates", "msil.block"):
        if attrgetter(name)(model):
            raise ConfigError(f"model.{name} has no effect with model=torchvision: leave it out.")
    if model.detector_weights not in (None, "imagenet"):
        raise ConfigError(f"model.detector_weights={model.detector_weights} must be imagenet or null.")


def check_launcher(launcher: Mapping[str, Any], devices: int | str) -> None:
    """Raises ConfigError for SLURM's launcher (docs/clusters.md) where it is not installed or would start another
    number of processes. launcher: the resolved hydra.launcher; devices: trainer.devices."""
    if launcher["_target_"] != SLURM:
        return
    if importlib.util.find_spec("submitit") is None:
        raise ConfigError(f"hydra/launcher=submitit_slurm is not installed: {install('slurm')}")
    tasks = launcher["tasks_per_node"]
    if isinstance(devices, int) and devices > 0 and devices != tasks:
        raise ConfigError(
            f"trainer.devices={devices} needs as many tasks on each node, and hydra.launcher.tasks_per_node is"
            f" {tasks}: set hydra.launcher.gpus_per_node={devices}, which tasks_per_node follows."
        )
