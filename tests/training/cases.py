"""What the tests of this folder share: a run so small that it takes a second or two."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from msil.checkpoints.assemble import detector_from_config
from msil.checkpoints.settle import settled
from msil.compose import register, to_config
from msil.config import Config, plain
from msil.metrics.coco import CocoMetric
from msil.metrics.voc import VOCMetric
from msil.training.module import DetectionModule

CONF = Path(__file__).resolve().parents[2] / "conf"

# 16 images of 64 px and 8 to evaluate, two epochs of two steps, on a net of few channels. It learns nothing in that
# time, so its detections are those above a threshold that noise passes.
TINY = (
    "data.num_train=16", "data.num_val=8", "data.image_size=64", "data.batch_size=8", "data.eval_batch_size=4",
    "model.channels=16", "model.head.num_convs=1", "model.head.norm_groups=4", "model.msil.reduction=4",
    "model.score_thresh=0.001", "schedule.epochs=2", "schedule.eval_every=1", "schedule.warmup_steps=0",
    "trainer.accelerator=cpu", "trainer.progress_bar=false",
)  # fmt: skip


def tiny_config(runs_dir: Path | str, root: Path | str, *overrides: str) -> Config:
    """The real settings of conf/, made tiny. A choice of a group among `overrides` keeps its values' tiny ones."""
    register(settled)
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="run"):
        return settled(to_config(compose("config", [*TINY, f"runs_dir={runs_dir}", f"data.root={root}", *overrides])))


def module_of(
    config: Config, *, steps_per_epoch: int = 2, metrics: list[CocoMetric | VOCMetric] | None = None, classes: int = 4
) -> DetectionModule:
    torch.manual_seed(config.seed)
    return DetectionModule(
        detector_from_config(config.model, classes, config.data.min_size, config.data.max_size),
        metrics or [],
        config.schedule,
        steps_per_epoch=steps_per_epoch,
        batch_size=config.data.batch_size,
        accumulate=config.trainer.accumulate,
        describe={"config": plain(config), "classes": [str(label) for label in range(classes)]},
    )


def rows(run_dir: Path) -> list[dict[str, str]]:
    """metrics.csv without its empty cells."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if value != ""} for row in csv.DictReader(file)]


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def assert_same(ours: Any, theirs: Any, where: str = "") -> None:
    """Nested dicts, lists and tensors are equal bit for bit."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{where}/{number}")
    else:
        assert ours == theirs, where
