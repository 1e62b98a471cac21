"""What the tests of this folder share: a run so small that it takes a second or two, and faults in the middle of it."""

from __future__ import annotations

import csv
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from msil.checkpoints.assemble import detector_from_config
from msil.checkpoints.settle import settled
from msil.compose import register, to_config
from msil.config import Config, plain
from msil.data.module import KeyedImages
from msil.interruption import Preempted
from msil.metrics.detections import DetectionMetric
from msil.runs import read_result
from msil.training.experiment import run
from msil.training.module import DetectionModule

Finished = tuple[Config, Path, dict[str, Any]]  # of the fixture `finished`
CONF = Path(__file__).resolve().parents[2] / "conf"

# 16 images of 64 px and 8 to evaluate, two epochs of four steps, a checkpoint at each, on a net of few channels. It
# learns nothing in that time, so its detections are those above a threshold that noise passes.
TINY = (
    "data.num_train=16", "data.num_val=8", "data.image_size=64", "data.batch_size=4", "data.eval_batch_size=4",
    "model.channels=16", "model.head.num_convs=1", "model.head.norm_groups=4", "model.msil.reduction=4",
    "model.score_thresh=0.001", "schedule.epochs=2", "schedule.eval_every=1", "schedule.warmup_steps=0",
    "trainer.accelerator=cpu", "trainer.progress_bar=false", "trainer.save_every=1",
)  # fmt: skip


def tiny_config(runs_dir: Path | str, root: Path | str, *overrides: str) -> Config:
    """The real settings of conf/, made tiny. A choice of a group among `overrides` keeps its values' tiny ones."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="run"):
        return settled(to_config(compose("config", [*TINY, f"runs_dir={runs_dir}", f"data.root={root}", *overrides])))


def module_of(
    config: Config, *, steps_per_epoch: int = 2, metrics: list[DetectionMetric] | None = None, classes: int = 4
) -> DetectionModule:
    torch.manual_seed(config.seed)
    return DetectionModule(
        detector_from_config(config.model, classes, config.data.min_size, config.data.max_size),
        metrics or [],
        config.schedule,
        steps_per_epoch=steps_per_epoch,
        batch_size=config.data.batch_size,
        describe={"config": plain(config), "classes": [str(label) for label in range(classes)]},
    )


def folder(config: Config) -> Path:
    return Path(config.runs_dir) / config.run_name


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def last(config: Config, name: str = "last") -> dict[str, Any]:
    return load(folder(config) / "checkpoints" / f"{name}.ckpt")


def rows(run_dir: Path) -> list[dict[str, str]]:
    """metrics.csv without its empty cells."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if value != ""} for row in csv.DictReader(file)]


def before_reading(monkeypatch: pytest.MonkeyPatch, count: int, act: Callable[[], object]) -> None:
    """Do something real just before the `count`-th training image is read; 4 to a step."""
    read, seen = KeyedImages.__getitem__, []

    def reads(self: KeyedImages, key: tuple[int, int]) -> Any:
        seen.append(key)
        if len(seen) == count:
            act()
        return read(self, key)

    monkeypatch.setattr(KeyedImages, "__getitem__", reads)


def stop(config: Config, images: int, number: signal.Signals = signal.SIGTERM, message: str = "") -> None:
    """Run it until a signal stops it, sent just before so many training images are read."""
    with pytest.MonkeyPatch.context() as patch:
        before_reading(patch, images, lambda: os.kill(os.getpid(), number))
        with pytest.raises(Preempted, match=message) as caught:
            run(config)
    assert caught.value.exit_code == 75


def assert_same_run(ours: Config, theirs: Config) -> None:
    """Weights, optimizer, every logged number and the result are the same, bit for bit; only the speed differs."""
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        assert_same(last(ours)[part], last(theirs)[part], part)
    assert_same(last(ours, "best")["state_dict"], last(theirs, "best")["state_dict"])
    logged = [
        [{key: value for key, value in row.items() if key != "images_per_second"} for row in rows(folder(config))]
        for config in (ours, theirs)
    ]
    assert logged[0] == logged[1]
    results = [read_result(folder(config)) for config in (ours, theirs)]
    assert results[0] is not None and results[1] is not None
    for name in ("metrics", "steps", "epochs"):
        assert results[0][name] == results[1][name]


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
