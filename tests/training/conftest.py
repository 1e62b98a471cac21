"""The one small run that several tests look at, and the shapes it learns from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from msil.config import Config
from msil.data.shapes import write_shapes
from msil.training.experiment import run

from .cases import tiny_config


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "shapes"
    return write_shapes(root, num_train=16, num_val=8, image_size=64, seed=0)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> tuple[Config, Path, dict[str, Any]]:
    """A whole run: its settings, its folder, and what `run` returned. Read only."""
    config = tiny_config(tmp_path_factory.mktemp("runs"), shapes)
    result = run(config)
    return config, Path(config.runs_dir) / config.run_name, result
