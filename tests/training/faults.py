"""What the tests of faults share: a run of eight steps, and something real that happens in the middle of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from msil.config import Config
from msil.data.module import AugmentedImages
from msil.runs import read_result

from .cases import assert_same, load

# Four steps an epoch, a checkpoint at each.
SETTINGS = ("data.batch_size=4", "trainer.save_every=1", "schedule.eval_every=2")


def folder(config: Config) -> Path:
    return Path(config.runs_dir) / config.run_name


def last(config: Config) -> dict[str, Any]:
    return load(folder(config) / "checkpoints" / "last.ckpt")


def assert_like(config: Config, whole: Config) -> None:
    ours, theirs = last(config), last(whole)
    for part in ("state_dict", "optimizer_states", "global_step"):
        assert_same(ours[part], theirs[part], part)
    ours, theirs = read_result(folder(config)), read_result(folder(whole))
    assert ours is not None and theirs is not None
    assert ours["metrics"] == theirs["metrics"]


def before_reading(monkeypatch: pytest.MonkeyPatch, count: int, act: Callable[[], object]) -> None:
    """Do something real just before the `count`-th training image is read; 4 to a step."""
    read, seen = AugmentedImages.__getitem__, []

    def reads(self: AugmentedImages, key: tuple[int, int]) -> Any:
        seen.append(key)
        if len(seen) == count:
            act()
        return read(self, key)

    monkeypatch.setattr(AugmentedImages, "__getitem__", reads)
