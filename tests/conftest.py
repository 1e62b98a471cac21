"""Fixtures of all tests."""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

torch.set_num_threads(1)

# Neither the tests nor the processes they start reach a network.
_NO_NETWORK = Path(__file__).parent / "no_network"
runpy.run_path(str(_NO_NETWORK / "sitecustomize.py"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_NO_NETWORK), os.environ.get("PYTHONPATH")]))


class Golden:
    """The reference numbers of tests/golden; its README.md says what they are."""

    folder = Path(__file__).parent / "golden"

    def __call__(self, name: str, prefix: str = "") -> dict[str, Tensor]:
        """Arrays of NAME.npz whose key starts with `prefix`, which is taken off; read anew by each call."""
        with np.load(self.folder / f"{name}.npz") as file:
            keys = [key for key in file.files if key != "meta" and key.startswith(prefix)]
            return {key.removeprefix(prefix): torch.from_numpy(file[key]) for key in keys}

    def misc(self) -> dict[str, Any]:
        return json.loads((self.folder / "misc.json").read_text())

    def fill(self, state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        """State dict of the keys and shapes of `state`, filled from `seed` as the reference's was."""
        return self._functions()["fill"](state, seed)

    def rand(self, seed: int, *shape: int) -> Tensor:
        return self._functions()["rand"](seed, *shape)

    def _functions(self) -> dict[str, Any]:
        return runpy.run_path(str(self.folder / "fill.py"))


@pytest.fixture(scope="session")
def golden() -> Golden:
    return Golden()


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 images of 64 pixels to train on and 8 to evaluate. Read only."""
    from msil.data.shapes import write_shapes  # late: most of the tests need none

    return write_shapes(tmp_path_factory.mktemp("data") / "shapes", num_train=16, num_val=8, image_size=64, seed=0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Its trainings are forked, which PyTorch refuses once torch.compile or the ONNX exporter has started autograd's
    # threads: first, in each of pytest-xdist's workers too (--no-loadscope-reorder).
    items.sort(key=lambda item: item.path.name != "test_resume.py")
