"""Which values a setting can have beyond its type, and which settings contradict each other."""

from __future__ import annotations

import importlib
import math
from typing import Any

from msil.config import (
    Config,
    DataConfig,
    DataName,
    Decay,
    LoggerName,
    Mode,
    ModelConfig,
)
from msil.errors import ConfigError

# Path, lowest, highest (both allowed). A value of null passes where the type admits it.
RANGES: tuple[tuple[str, float, float], ...] = (
    ("seed", 0, 2**32 - 1),
    ("model.channels", 1, math.inf),
    ("model.score_thresh", 0, 1),
    ("model.nms_thresh", 0, 1),
    ("model.topk_candidates", 1, math.inf),
    ("model.detections_per_img", 1, math.inf),
    ("model.msil.reduction", 1, math.inf),
    ("data.batch_size", 1, math.inf),
    ("data.eval_batch_size", 1, math.inf),
    ("data.min_size", 32, math.inf),
    ("data.max_size", 32, math.inf),
    ("data.flip", 0, 1),
    ("data.workers", 0, math.inf),
    ("data.num_train", 1, math.inf),
    ("data.num_val", 1, math.inf),
    ("data.image_size", 32, math.inf),
    ("data.seed", 0, 2**32 - 1),
    ("schedule.epochs", 1, math.inf),
    ("schedule.max_steps", 1, math.inf),
    ("schedule.eval_every", 1, math.inf),
    ("schedule.eval_images", 1, math.inf),
    ("schedule.base_batch_size", 1, math.inf),
    ("schedule.momentum", 0, 1),
    ("schedule.weight_decay", 0, math.inf),
    ("schedule.bias_lr_factor", 0, math.inf),
    ("schedule.bias_weight_decay", 0, math.inf),
    ("schedule.warmup_steps", 0, math.inf),
    ("schedule.warmup_factor", 0, 1),
    ("trainer.num_nodes", 1, math.inf),
    ("trainer.save_every", 1, math.inf),
    ("trainer.accumulate", 1, math.inf),
)
POSITIVE = ("schedule.lr", "schedule.gamma", "schedule.grad_clip")
CHOICES: dict[str, tuple[Any, ...]] = {
    "model.msil.kernel_size": (1, 3),
    "trainer.accelerator": ("auto", "cpu", "gpu", "cuda", "mps"),
    "trainer.strategy": ("auto", "ddp"),
    "trainer.compile": (None, "default", "reduce-overhead", "max-autotune"),
    "trainer.precision": ("32-true", "bf16-mixed", "16-mixed"),
}
ONLY_SHAPES = ("num_train", "num_val", "image_size", "seed")


def validate(config: Config) -> None:
    """Raises ConfigError, one sentence naming the setting, for the first value that cannot work."""
    for path, low, high in RANGES:
        _check_range(path, _at(config, path), low, high)
    for path in POSITIVE:
        value = _at(config, path)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{path}={value} must be a number above 0.")
    for path, choices in CHOICES.items():
        value = _at(config, path)
        if value not in choices:
            raise ConfigError(f"{path}={value} must be one of {', '.join(map(str, choices))}.")
    _check_mode(config)
    _check_model(config)
    _check_data(config.data)
    _check_schedule(config)
    _check_accumulation(config)
    _check_devices(config.trainer.devices)
    if config.trainer.require_gpu and config.trainer.accelerator == "cpu":
        raise ConfigError("trainer.require_gpu=true contradicts trainer.accelerator=cpu: leave out one of them.")
    _check_logger(config.logger.name)
    _check_folder(config)


def _at(config: Config, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _check_range(path: str, value: float | None, low: float, high: float) -> None:
    if value is None or (low <= value <= high and math.isfinite(value)):
        return
    limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
    raise ConfigError(f"{path}={value} must be {limits}.")


def _check_model(config: Config) -> None:
    model = config.model
    _check_normalisation(model)
    scales = model.test_scales
    if scales is not None and (not scales or min(scales) < 32 or len(set(scales)) < len(scales)):
        raise ConfigError(
            f"model.test_scales={scales} must be short sides of at least 32 pixels, none twice, e.g. [480,640,800]."
        )
    if model.msil.reduction > model.channels:
        raise ConfigError(
            f"model.msil.reduction={model.msil.reduction} must not exceed model.channels={model.channels}."
        )
    if model.detector is not None:
        _check_torchvision(model)
    elif model.detector_weights is not None:
        raise ConfigError("model.detector_weights is for model=torchvision; set model.backbone.weights.")
    # Late: torch takes seconds, which the checks above need not wait for.
    from msil.checkpoints.assemble import check_model

    check_model(model)
    frozen = model.backbone.get("frozen_stages")
    if frozen and model.backbone.get("weights") is None and model.weights is None:
        raise ConfigError(
            f"model.backbone.frozen_stages={frozen} would freeze random weights: give model.backbone.weights too, or "
            "leave frozen_stages at null."
        )


def _check_normalisation(model: ModelConfig) -> None:
    for name in ("image_mean", "image_std"):
        values = getattr(model, name)
        if values is None:
            continue
        if len(values) != 3 or not all(math.isfinite(value) for value in values):
            raise ConfigError(f"model.{name}={values} must be three numbers, one a channel.")
    if model.image_std is not None and min(model.image_std) <= 0:
        raise ConfigError(f"model.image_std={model.image_std} must be above 0.")


def _check_torchvision(model: ModelConfig) -> None:
    for name in ("test_scales", "test_flip", "topk_candidates"):
        if getattr(model, name):
            raise ConfigError(f"model.{name} has no effect with model=torchvision: leave it out.")
    if model.msil.block is not None:
        raise ConfigError("model.msil.block has no effect with model=torchvision: leave it out.")
    if model.detector_weights not in (None, "imagenet"):
        raise ConfigError(f"model.detector_weights={model.detector_weights} must be imagenet or null.")


def _check_mode(config: Config) -> None:
    if config.mode == Mode.test and config.model.weights is None:
        raise ConfigError("mode=test needs model.weights=FILE, a run's checkpoint or an imported detector.")
    if config.mode == Mode.train and config.data.split is not None:
        raise ConfigError(
            f"data.split={config.data.split} is what mode=test evaluates; training takes data.train_split and "
            "data.val_split."
        )
    if config.data.split is not None and not config.data.split.strip():
        raise ConfigError("data.split must not be empty.")


def _check_data(data: DataConfig) -> None:
    if data.max_size < data.min_size:
        raise ConfigError(f"data.max_size={data.max_size} must be at least data.min_size={data.min_size}.")
    sides = data.multiscale
    if sides is not None and not (len(sides) == 2 and 32 <= sides[0] <= sides[1]):
        raise ConfigError(f"data.multiscale={sides} must be two short sides, at least 32 and rising, e.g. [480,960].")
    if data.classes is not None and (not data.classes or len(set(data.classes)) < len(data.classes)):
        raise ConfigError(f"data.classes={data.classes} must name at least one class, and none twice.")
    for name in ONLY_SHAPES:
        value = getattr(data, name)
        if data.name == DataName.shapes and value is None:
            raise ConfigError(f"data.{name} must be a number for data=shapes.")
        if data.name != DataName.shapes and value is not None:
            raise ConfigError(f"data.{name}={value} has no meaning for data={data.name.value}, only for data=shapes.")
    for name in ("root", "train_split", "val_split"):
        if not getattr(data, name).strip():
            raise ConfigError(f"data.{name} must not be empty.")


def _check_schedule(config: Config) -> None:
    schedule = config.schedule
    milestones = schedule.milestones
    if any(epoch < 1 for epoch in milestones) or milestones != sorted(set(milestones)):
        raise ConfigError(f"schedule.milestones={milestones} must be rising epochs from 1 on, e.g. [8,11].")
    if schedule.decay == Decay.step and schedule.gamma > 1:
        raise ConfigError(f"schedule.gamma={schedule.gamma} must not exceed 1: the lr is multiplied by it.")
    if schedule.ema is not None and not 0 < schedule.ema < 1:
        raise ConfigError(f"schedule.ema={schedule.ema} must be above 0 and below 1, e.g. 0.999, or null for none.")


def _check_accumulation(config: Config) -> None:
    parts, images = config.trainer.accumulate, config.data.batch_size
    if images % parts:
        raise ConfigError(
            f"trainer.accumulate={parts} must divide data.batch_size={images}: a step's images are taken in so many "
            "batches of one size."
        )


def _check_devices(devices: int | str) -> None:
    listed = str(devices).split(",")
    if devices == "auto" or devices == -1 or (isinstance(devices, int) and devices >= 1):
        return
    if isinstance(devices, str) and all(item.strip().isdecimal() for item in listed):
        return
    raise ConfigError(f"trainer.devices={devices} must be a number of devices, auto, or indices such as '0,1'.")


def _check_logger(name: LoggerName) -> None:
    if name == LoggerName.tensorboard:
        try:
            importlib.import_module("tensorboard")
        except ImportError as error:
            raise ConfigError(
                f'logger=tensorboard needs the package tensorboard ({error}): run pip install -e ".[tensorboard]" -c '
                "constraints.txt, or leave logger out."
            ) from error


def _check_folder(config: Config) -> None:
    name = config.run_name
    if not name or name in (".", "..") or "/" in name or "\\" in name or len(name.encode()) > 200:
        raise ConfigError(f"run_name={name} must be a plain folder name of at most 200 bytes, without slashes.")
    if config.table is not None and not config.table.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(f"table={config.table} must be a plain word such as table1.")
    if not config.runs_dir.strip():
        raise ConfigError("runs_dir must not be empty.")
