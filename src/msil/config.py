"""Every setting and its type. Values live in conf/; nothing here has a default, so a forgotten one is an error."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import PurePath
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict, read_write


class Apply(StrEnum):
    """Which branch gets the gated feature of eq. 5."""

    none = "none"
    cls = "cls"
    reg = "reg"
    both = "both"


class ChannelOrder(StrEnum):
    rgb = "rgb"
    bgr = "bgr"


class Mode(StrEnum):
    train = "train"
    test = "test"


class DataName(StrEnum):
    shapes = "shapes"
    coco = "coco"
    voc = "voc"


class OnBadImage(StrEnum):
    """What a training does about an image that can no longer be read: end, or go on with another one instead."""

    error = "error"
    skip = "skip"


class OptimizerName(StrEnum):
    sgd = "sgd"
    adamw = "adamw"


class Decay(StrEnum):
    step = "step"
    cosine = "cosine"


class Resume(StrEnum):
    auto = "auto"  # from the last checkpoint of an unfinished run
    never = "never"  # from the beginning


class LoggerName(StrEnum):
    csv = "csv"
    wandb = "wandb"
    tensorboard = "tensorboard"


@dataclass
class MSILConfig:
    align: bool = MISSING
    separate: bool = MISSING
    apply: Apply = MISSING
    kernel_size: int = MISSING  # 3 or 1
    reduction: int = MISSING  # of the channel attention's hidden layer
    # Another block in its place: an importable class, block(channels, **options), see docs/extending.md
    block: str | None = MISSING
    options: Any = MISSING  # null or a dict; under a type of dict no key could be given on the command line


@dataclass
class ModelConfig:
    backbone: dict[str, Any] = field(default_factory=dict)  # name, and the fields of msil.detection.backbone's options
    # name, a registered head's or package.module.Class, and the fields of its Options
    head: dict[str, Any] = field(default_factory=dict)
    msil: MSILConfig = field(default_factory=MSILConfig)
    # A whole detector of torchvision's in the place of head, backbone and channels
    detector: str | None = MISSING
    detector_weights: str | None = MISSING  # null: from scratch; imagenet: the backbone's
    weights: str | None = MISSING  # null; else a file of a whole detector: an imported one or a run's checkpoint
    weights_sha256: str | None = MISSING  # of that file; filled in, so that another content is another run
    channels: int = MISSING  # of the FPN and the head
    # Of the net's input channels in their order, of 0..255; null: the backbone's own
    image_mean: list[float] | None = MISSING
    image_std: list[float] | None = MISSING
    channel_order: ChannelOrder = MISSING  # what the net takes; images are read as RGB
    # null: 0.05, 0.6, 1000 and 100; with model.weights, what the file says
    score_thresh: float | None = MISSING
    nms_thresh: float | None = MISSING
    topk_candidates: int | None = MISSING  # a level
    detections_per_img: int | None = MISSING
    # Several views of each image in evaluation and prediction. null: one; with model.weights, what the file says
    test_scales: list[int] | None = MISSING  # short sides in place of data.min_size; data.max_size in proportion
    test_flip: bool | None = MISSING  # the mirrored image too


@dataclass
class DataConfig:
    name: DataName = MISSING
    root: str = MISSING
    train_split: str = MISSING
    val_split: str = MISSING
    split: str | None = MISSING  # mode=test: what to evaluate; null: val_split
    classes: list[str] | None = MISSING  # null: all that the set has
    batch_size: int = MISSING  # images a training step, over all devices together
    eval_batch_size: int = MISSING  # images an evaluation step, on one device
    min_size: int = MISSING  # short side, pixels
    max_size: int = MISSING  # the long side's limit, pixels
    multiscale: list[int] | None = MISSING  # [low, high] of the short side in training; null: min_size
    flip: float = MISSING  # probability of a horizontal flip in training
    device_transforms: bool = MISSING  # resize and flip training images on the device, not in the loader processes
    workers: int = MISSING  # loader processes a device
    strict: bool = MISSING  # refuse boxes that would be clipped or dropped
    on_bad_image: OnBadImage = MISSING  # in training; evaluation never skips
    num_train: int | None = MISSING  # shapes: how many images to make
    num_val: int | None = MISSING
    image_size: int | None = MISSING  # shapes: side in pixels
    seed: int | None = MISSING  # shapes: of the generator


@dataclass
class ScheduleConfig:
    name: str = MISSING
    epochs: int = MISSING
    max_steps: int | None = MISSING  # ends the training early (smoke)
    eval_every: int = MISSING  # epochs
    eval_images: int | None = MISSING  # evaluate only the first so many (smoke); null: all
    optimizer: OptimizerName = MISSING
    lr: float = MISSING
    base_batch_size: int | None = MISSING  # lr is for so many images a step and scales linearly; null: lr as it is
    momentum: float = MISSING  # sgd
    weight_decay: float = MISSING
    # The next three: null, of the head's published recipe
    bias_lr_factor: float | None = MISSING  # of biases outside norm layers
    bias_weight_decay: float | None = MISSING  # of every bias
    warmup_factor: float | None = MISSING  # of the lr at step 0; rises linearly
    warmup_steps: int = MISSING
    decay: Decay = MISSING
    milestones: list[int] = MISSING  # epochs after which the lr drops (decay: step)
    gamma: float = MISSING
    grad_clip: float | None = MISSING  # L2 norm
    # Decay of the exponential moving average of the weights, e.g. 0.999, which is then what is evaluated and what
    # checkpoints hold; null: none. Early on it is (1 + n) / (10 + n) after n steps, if that is less.
    ema: float | None = MISSING


@dataclass
class TrainerConfig:
    accelerator: str = MISSING
    devices: int | str = MISSING
    num_nodes: int = MISSING
    strategy: str = MISSING
    precision: str = MISSING
    accumulate: int = MISSING  # batches that a step's images are taken in, for less memory
    progress_bar: bool = MISSING
    save_every: int = MISSING  # steps between two checkpoints inside an epoch; one is saved after every epoch anyway
    # For speed alone; docs/performance.md has what each of them brings.
    channels_last: bool = MISSING  # feature maps with their channels side by side in memory
    compile: str | None = MISSING  # torch.compile's mode for the net and its loss; null: eager
    require_gpu: bool = MISSING  # refuse to run without one, instead of saying so and taking the CPU


@dataclass
class LoggerConfig:
    name: LoggerName = MISSING
    project: str = MISSING
    entity: str | None = MISSING
    group: str | None = MISSING  # null: the sweep's name inside a sweep
    tags: list[str] = MISSING
    offline: bool | None = MISSING  # null: online with a login and a network, else offline


@dataclass
class Config:
    mode: Mode = MISSING
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    seed: int = MISSING
    resume: Resume = MISSING
    table: str | None = MISSING  # the paper's table that an experiment regenerates
    runs_dir: str = MISSING
    run_name: str = MISSING  # folder below runs_dir; by default made of the values and config_hash


# In the paper's tables under a schedule that trains from scratch in minutes, these nets stand in for its own.
FROM_SCRATCH = ("quick", "smoke")
STAND_INS = {"resnet50": "resnet10", "resnet101": "resnet18_scratch"}

# What changes where or how fast a run happens, not what it computes.
NOT_HASHED = ("trainer", "logger", "resume", "table", "runs_dir", "run_name", "data.workers", "data.eval_batch_size",
              "data.on_bad_image",  # what was skipped is counted in result.json
              "data.device_transforms",  # on a CPU every pixel is the same, a GPU rounds some of them by 1 of 255
              "model.weights")  # of these, weights_sha256 counts  # fmt: skip


def config_hash(values: Mapping[str, Any]) -> str:
    """8 hex digits of the resolved settings, devices, workers, logger and output paths left out.

    `values`: the plain nested dict of a Config; of `trainer`, precision and accumulate count. A setting
    that is null counts as one that does not exist, so that a new optional setting leaves finished runs finished.
    """
    kept = json.loads(json.dumps(values))
    kept["precision"] = kept["trainer"]["precision"]
    if kept["trainer"].get("accumulate", 1) > 1:
        kept["accumulate"] = kept["trainer"]["accumulate"]
    for path in NOT_HASHED:
        *parents, leaf = path.split(".")
        node = kept
        for parent in parents:
            node = node[parent]
        node.pop(leaf, None)
    return hashlib.sha256(json.dumps(_without_nulls(kept), sort_keys=True).encode()).hexdigest()[:8]


def _without_nulls(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {key: _without_nulls(value) for key, value in values.items() if value is not None}


def default_run_name(values: Mapping[str, Any]) -> str:
    """A readable folder name made of the main values, ended by the config hash, e.g.
    `shapes_fcos_resnet10_msil-both_quick_s0_1a2b3c4d`, or `test_coco_val2017_vfnet_r50_1a2b3c4d` for an evaluation of
    the weights vfnet_r50.safetensors."""
    model = values["model"]
    if values["mode"] == "test":
        split = values["data"]["split"] or values["data"]["val_split"]
        return "_".join(["test", values["data"]["name"], split, weights_name(model["weights"]), config_hash(values)])
    names = [
        values["data"]["name"],
        *detector_names(model),
        block_name(model["msil"]),
        *([] if model["weights"] is None else [f"from-{weights_name(model['weights'])}"]),
        values["schedule"]["name"],
        f"s{values['seed']}",
        config_hash(values),
    ]
    return "_".join(str(name) for name in names)


def detector_names(model: Mapping[str, Any]) -> list[str]:
    """fcos, resnet10; or of torchvision's detectors their one name."""
    if model.get("detector"):
        return [model["detector"]]
    return [model["head"]["name"].rpartition(".")[2], PurePath(model["backbone"]["name"]).name]


def block_name(msil: Mapping[str, Any]) -> str:
    """plain, msil-both, msil-cls-noalign-k1, or the class name of a block of the user's own."""
    if str(msil["apply"]) == "none":
        return "plain"
    if msil.get("block"):
        return msil["block"].rpartition(".")[2]
    parts = ["msil", str(msil["apply"])]
    if not msil["align"]:
        parts.append("noalign")
    if not msil["separate"]:
        parts.append("noseparate")
    if msil["kernel_size"] != 3:
        parts.append(f"k{msil['kernel_size']}")
    return "-".join(parts)


def weights_name(path: str | None) -> str:
    """What a file of weights is called: its name without ending, or for a run's checkpoint that of the run."""
    if path is None:
        return "nothing"
    file = PurePath(path)
    return file.parent.parent.name or file.stem if file.parent.name == "checkpoints" else file.stem


def plain(config: DictConfig | Config) -> dict[str, Any]:
    """The resolved settings as a nested dict of str, int, float, bool, None and lists (enums by their value)."""
    node = OmegaConf.structured(config) if isinstance(config, Config) else config
    values = OmegaConf.to_container(node, resolve=True, enum_to_str=True)
    assert isinstance(values, dict)
    return values  # pyright: ignore[reportReturnType]


def to_config(node: DictConfig) -> Config:
    """The composed settings as dataclasses, interpolations resolved and Hydra's own part left out. What the file in
    model.weights says of its net is not in it yet: see msil.checkpoints.settle.

    Raises OmegaConf's errors for a value that is missing, of the wrong type or not resolvable.
    """
    values = copy.deepcopy(node)
    with read_write(values), open_dict(values):
        values.pop("hydra", None)
    return _typed(values)


def _typed(values: DictConfig) -> Config:
    config = OmegaConf.to_object(values)
    assert isinstance(config, Config)
    if config.model.detector is not None:  # it has a head and a backbone of its own
        config.model.head, config.model.backbone = {}, {}
    return config


def register(settle: Callable[[Config], Config] = lambda config: config) -> None:
    """Make `schema` known to Hydra, `${run_name:}` and `${backbones:}` to OmegaConf. Safe to call twice.

    settle: what the name of a run with model.weights is made of; see msil.checkpoints.settle.
    """

    def run_name(*, _root_: DictConfig) -> str:
        """Resolves every setting of the root but run_name itself, and Hydra's own, then names them."""
        given = {key: _root_[key] for key in Config.__dataclass_fields__ if key != "run_name"}
        values = {
            key: OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
            for key, node in given.items()
        }
        merged = OmegaConf.merge(OmegaConf.structured(Config), {**values, "run_name": ""})
        assert isinstance(merged, DictConfig)
        return default_run_name(plain(settle(_typed(merged))))

    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    OmegaConf.register_new_resolver("backbones", _resolve_backbones, replace=True)


def _resolve_backbones(schedule: str, *names: str) -> str:
    """The choices of a table's sweep over model/backbone: the paper's, or under a quick schedule what stands in."""
    return ",".join(STAND_INS[name] if schedule in FROM_SCRATCH else name for name in names)
