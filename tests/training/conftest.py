"""The one small run that several tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from msil.training.experiment import run

from .cases import Finished, tiny_config


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Finished:
    """A whole run: its settings, its folder, and what `run` returned. Read only."""
    config = tiny_config(tmp_path_factory.mktemp("runs"), shapes)
    result = run(config)
    return config, Path(config.runs_dir) / config.run_name, result
