"""Every setting: its type, default, limits and meaning. conf/ holds what a choice of a group changes.

Standard library alone: `load_detector` reads settings without OmegaConf.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import Field, dataclass, field
from enum import Enum, StrEnum
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

Section = TypeVar("Section")

MISSING: Any = "???"  # OmegaConf's word: a value that must be given


def setting(
    default: Any,
    meaning: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[Any, ...] | None = None,
) -> Any:
    """A field with what it means and its limits, which `msil.check` holds it to: low <= value <= high,
    above < value < below, a value of `choices`. A value of null passes where the type admits it."""
    limits = {"meaning": meaning, "low": low, "high": high, "above": above, "below": below, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=limits)
    return field(default=default, metadata=limits)


Apply = StrEnum("Apply", ["none", "cls", "reg", "both"])  # the branches that get the gated feature of eq. 6
ChannelOrder = StrEnum("ChannelOrder", ["rgb", "bgr"])
Mode = StrEnum("Mode", ["train", "test"])
DataName = StrEnum("DataName", ["shapes", "coco", "voc", "yolo", "auto"])
Augment = StrEnum("Augment", ["none", "flip", "standard", "strong"])
OptimizerName = StrEnum("OptimizerName", ["sgd", "adamw"])
Decay = StrEnum("Decay", ["step", "cosine"])
Warmup = StrEnum("Warmup", ["linear", "constant"])
Resume = StrEnum("Resume", ["auto", "never"])
LoggerName = StrEnum("LoggerName", ["csv", "wandb", "tensorboard"])


@dataclass
class MSILConfig:
    align: bool = setting(True, "align both features with shared weights (eq. 3)")
    separate: bool = setting(True, "one gate a branch (eq. 5), not one for both")
    apply: Apply = setting(Apply.both, "branches that get the gated feature (eq. 6); none: the plain detector")
    kernel_size: int = setting(3, "of the block's convolutions", choices=(1, 3))
    reduction: int = setting(16, "of the channel attention's hidden layer; at most model.channels", low=1)
    init_gate: float | None = setting(None, "gates at the start; null: 0.5, in a fast start 0.99", above=0, below=1)
    block: str | None = setting(None, "another block in its place, package.module.Class(channels, **options)")
    # Any: under a type of dict no key could be given on the command line.
    options: Any = setting(None, "arguments of model.msil.block, a dict")


@dataclass
class ModelConfig:
    # name and the fields of msil.detection.backbone's options, or package.module.Class and its arguments; name (a
    # registered head's or package.module.Class) and the fields of its Options.
    backbone: dict[str, Any] = field(default_factory=dict)
    head: dict[str, Any] = field(default_factory=dict)
    msil: MSILConfig = field(default_factory=MSILConfig)
    detector: str | None = setting(None, "one of torchvision's detectors in the place of backbone, head and channels")
    detector_weights: str | None = setting(None, "of model.detector: null, from scratch; imagenet, its backbone's")
    weights: str | None = setting(None, "a whole detector's file, to test or to start from")
    weights_sha256: str | None = setting(None, "of that file; filled in, so that other content is another run")
    channels: int = setting(64, "of the FPN and the head", low=1)
    image_mean: list[float] | None = setting([123.675, 116.28, 103.53], "of the net's input, 0..255; null: the net's")
    image_std: list[float] | None = setting([58.395, 57.12, 57.375], "of the same input")
    channel_order: ChannelOrder = setting(ChannelOrder.rgb, "channel order of the net's input; images are read as RGB")
    score_thresh: float | None = setting(None, "of the class; null: 0.05, or that of model.weights", low=0, high=1)
    nms_thresh: float | None = setting(None, "IoU of NMS; null: 0.6, or that of model.weights", low=0, high=1)
    topk_candidates: int | None = setting(None, "a level, before NMS; null: 1000, or that of model.weights", low=1)
    detections_per_img: int | None = setting(None, "detections an image; null: 100, or that of model.weights", low=1)
    test_scales: list[int] | None = setting(None, "test-time augmentation: short sides in place of data.min_size")
    test_flip: bool | None = setting(None, "test-time augmentation: the mirrored image too")


@dataclass
class DataConfig:
    name: DataName = MISSING
    root: str = MISSING
    train_split: str = setting("train", "split to train on")
    val_split: str = setting("val", "split to evaluate on")
    split: str | None = setting(None, "mode=test: what to evaluate; null: val_split")
    val_fraction: float | None = setting(
        None, "of train_split's images, held out by their names as val_split; null: there is one", above=0, below=1
    )
    # Any: a file, or a dict of one for each split.
    annotations: Any = setting(None, "data=coco: a COCO json of any name; a dict names one for each split")
    images: str | None = setting(None, "the folder of its images, in place of root")
    title: str | None = setting(None, "the set's name in run names; null: root's, or that of the layout at its default")
    # Any: a list of names, or a dict of new ones.
    classes: Any = setting(None, "the classes in their order, or new names, {car: vehicle}; null: all of the data set")
    batch_size: int = setting(16, "images a training step, over all devices together", low=1)
    eval_batch_size: int = setting(4, "images an evaluation step, on one device", low=1)
    min_size: int = setting(800, "short side, pixels", low=32)
    max_size: int = setting(1333, "limit of the long side, pixels", low=32)
    multiscale: list[int] | None = setting(None, "[low, high] of the short side in training; null: min_size")
    flip: float = setting(0.5, "probability of a horizontal flip in training", low=0, high=1)
    augment: Augment | None = setting(
        None, "none: no flip, no multiscale; standard: colours, scale and crop too; strong: zoom-out, IoU crop too"
    )
    device_transforms: bool = setting(False, "transform training images on the device, not in the workers")
    workers: int = setting(2, "loader processes a device", low=0)
    filter_empty: bool | None = setting(None, "train on images with a box alone; null: true")
    max_dets: int | None = setting(None, "detections an image and class that COCO's AP counts; null: 100", low=1)
    bits: int | None = setting(None, "of 16-bit image files, how many hold the picture; null: 16", low=8, high=16)
    strict: bool = setting(False, "refuse boxes that would be clipped or dropped")
    num_train: int | None = setting(None, "shapes: training images", low=1)
    num_val: int | None = setting(None, "shapes: validation images", low=1)
    image_size: int | None = setting(None, "shapes: side, pixels", low=32)
    seed: int | None = setting(None, "shapes: of the generator", low=0, high=2**32 - 1)


@dataclass
class ScheduleConfig:
    name: str = MISSING
    epochs: int = setting(12, "passes over the training images", low=1)
    max_steps: int | None = setting(None, "ends the training early", low=1)
    eval_every: int = setting(1, "epochs between evaluations", low=1)
    eval_images: int | None = setting(None, "evaluate the first so many only; null: all", low=1)
    optimizer: OptimizerName = setting(OptimizerName.sgd, "SGD with momentum, or AdamW")
    lr: float = setting(0.01, "learning rate", above=0)
    base_batch_size: int | None = setting(None, "lr is for so many images a step and scales; null: as it is", low=1)
    backbone_lr_factor: float | None = setting(None, "of the backbone's parameters; null: 1", low=0)
    momentum: float = setting(0.9, "momentum of sgd", low=0, high=1)
    weight_decay: float = setting(0.0001, "decay of weights; biases have bias_weight_decay", low=0)
    bias_lr_factor: float | None = setting(None, "of biases outside norms; null: of the head's published recipe", low=0)
    bias_weight_decay: float | None = setting(None, "of every bias; null: of the head's published recipe", low=0)
    warmup_factor: float | None = setting(None, "of the lr at step 0; null: of the head's recipe", low=0, high=1)
    warmup_steps: int = setting(500, "steps of the warm-up; at most a quarter of the training", low=0)
    warmup: Warmup | None = setting(None, "rising to the lr, or constant at warmup_factor of it; null: linear")
    decay: Decay = setting(Decay.step, "by gamma at milestones, or half a cosine")
    milestones: list[int] = setting([8, 11], "epochs after which the lr drops (decay=step)")
    gamma: float = setting(0.1, "factor of each drop", above=0)
    grad_clip: float | None = setting(None, "limit of the gradients' L2 norm", above=0)
    ema: float | None = setting(
        None, "decay of an average of the weights, e.g. 0.999, which is evaluated and kept", above=0, below=1
    )


@dataclass
class TrainerConfig:
    accelerator: str = setting("auto", "auto: a GPU if there is one", choices=("auto", "cpu", "gpu", "cuda", "mps"))
    devices: int | str = setting(1, "a number, auto, or indices such as '0,1'")
    num_nodes: int = setting(1, "number of machines", low=1)
    strategy: str = setting("auto", "ddp: a process a device", choices=("auto", "ddp"))
    precision: str = setting("32-true", "numbers of the forward pass", choices=("32-true", "bf16-mixed", "16-mixed"))
    accumulate: int = setting(1, "batches that a step's images are taken in, for less memory", low=1)
    progress_bar: bool = setting(True, "show progress on the terminal")
    save_every: int = setting(500, "steps between checkpoints; one is saved after every epoch too", low=1)
    keep_optimizer: bool = setting(True, "a finished run keeps the optimizer's state, to go on for more epochs")
    channels_last: bool = setting(True, "feature maps in channels_last memory format")
    compile: str | None = setting(None, "torch.compile's mode for the net and its loss",
                                  choices=("default", "reduce-overhead", "max-autotune"))  # fmt: skip
    require_gpu: bool = setting(False, "refuse to run without a GPU")


@dataclass
class LoggerConfig:
    name: LoggerName = setting(LoggerName.csv, "beside metrics.csv, which every run writes")
    project: str = setting("msil", "W&B project")
    entity: str | None = setting(None, "W&B entity")
    group: str | None = setting(None, "null: the sweep's name inside a sweep")
    tags: list[str] = setting([], "W&B tags")
    offline: bool | None = setting(None, "null: online with a login and a network, else offline")


@dataclass
class Config:
    mode: Mode = setting(Mode.train, "test: evaluate model.weights on data.split")
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    seed: int = setting(0, "of weights, data order and augmentation", low=0, high=2**32 - 1)
    resume: Resume = setting(Resume.auto, "an unfinished run goes on from its last checkpoint; never: from the start")
    table: str | None = setting(None, "the paper's table that an experiment regenerates")
    runs_dir: str = setting("runs", "folder of all runs")
    run_name: str = MISSING  # folder below runs_dir; by default made of the values and config_hash


def every_setting(section: type = Config, prefix: str = "") -> Iterator[tuple[str, Any, Field[Any]]]:
    """Each setting's full name, type and field; a field made by `setting` has its limits as metadata."""
    hints = get_type_hints(section)
    for own in dataclasses.fields(section):
        if dataclasses.is_dataclass(hints[own.name]):
            yield from every_setting(hints[own.name], f"{prefix}{own.name}.")
        else:
            yield f"{prefix}{own.name}", hints[own.name], own


# Trained from scratch, these nets of ours take the rows of the paper's.
STAND_INS = {"resnet50": "resnet10", "resnet101": "resnet18"}

# What changes where or how fast a run happens, not what it computes.
NOT_HASHED = ("trainer", "logger", "resume", "table", "runs_dir", "run_name", "data.workers", "data.eval_batch_size",
              "data.title",
              "data.device_transforms",  # on a CPU every pixel is the same, a GPU rounds some of them otherwise
              "model.weights")  # of these, weights_sha256 counts  # fmt: skip

# What `computed` has at the top level, as typed.
_TYPED = {name: f"trainer.{name}" for name in ("precision", "accumulate")}


def config_hash(values: Mapping[str, Any]) -> str:
    """8 hex digits of what the settings compute. `values`: the plain nested dict of a Config.

    A setting that is null counts as one that does not exist, so that a new optional setting leaves finished runs
    finished.
    """
    return hashlib.sha256(json.dumps(_without_nulls(computed(values)), sort_keys=True).encode()).hexdigest()[:8]


def computed(values: Mapping[str, Any], without: Iterable[str] = ()) -> dict[str, Any]:
    """The settings that change a run's numbers: not those of NOT_HASHED, nor the paths of `without`. Of `trainer`,
    precision and accumulate (above 1) stay, at the top level."""
    kept = json.loads(json.dumps(values))
    trainer = kept.get("trainer") or {}
    kept["precision"] = trainer.get("precision")
    if trainer.get("accumulate", 1) > 1:
        kept["accumulate"] = trainer["accumulate"]
    for path in (*NOT_HASHED, *without):
        *parents, leaf = path.split(".")
        node = kept
        for parent in parents:
            node = node.get(parent) or {}
        node.pop(leaf, None)
    return kept


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Full names of the settings that compute something else in two runs, as typed, to both values; None: null, or a
    setting that is not there."""
    sides = [dict(leaves(computed(values))) for values in (before, now)]
    names = dict.fromkeys(path for side in sides for path in side)
    pairs = {path: (sides[0].get(path), sides[1].get(path)) for path in names}
    return {_TYPED.get(path, path): pair for path, pair in pairs.items() if pair[0] != pair[1]}


def leaves(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """model.head.name -> fcos ...; without nulls, since older runs lack the newer settings."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from leaves(value, f"{path}.{name}" if path else name)
    elif values is not None:
        yield path, values


def _without_nulls(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {key: _without_nulls(value) for key, value in values.items() if value is not None}


def plain(section: Any) -> dict[str, Any]:
    """A section of the settings as a nested dict of str, int, float, bool, None and lists (enums by their value)."""
    return json.loads(json.dumps(dataclasses.asdict(section)))


def from_plain(kind: type[Section], values: Mapping[str, Any]) -> Section:
    """The inverse of `plain`; what `values` lacks has its default.

    Raises ValueError for a name that is no setting or a value of another type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{kind.__name__} is {values!r}")
    hints = get_type_hints(kind)
    unknown = sorted(values.keys() - hints.keys())
    if unknown:
        raise ValueError(f"{unknown[0]} is not a setting of {kind.__name__}")
    return kind(**{name: _typed(value, hints[name], name) for name, value in values.items()})


def _typed(value: Any, hint: Any, name: str) -> Any:
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for kind in kinds:
        plain_kind = get_origin(kind) or kind
        if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
            return from_plain(kind, value)  # pyright: ignore[reportArgumentType]
        if isinstance(kind, type) and issubclass(kind, Enum) and isinstance(value, str):
            return kind(value)
        if plain_kind is list and isinstance(value, list | tuple):
            return list(value)
        if kind is Any or type(value) is plain_kind or (kind is float and type(value) is int):
            return value
    raise ValueError(f"{name} is {value!r}")
