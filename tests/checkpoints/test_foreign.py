"""Reading others' checkpoints: what loads, and that nothing in a file is ever run."""

from __future__ import annotations

import pickle
import sys
from collections import deque
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from msil.checkpoints.foreign import read_foreign_checkpoint
from msil.checkpoints.importer import import_checkpoint
from msil.errors import WeightsError

from .theirs import config_3x, numbered_state, save


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return numbered_state("vfnet")


class Evil:
    """Creates a marker file when unpickled by Python's own unpickler."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (exec, (f"open({str(self.path)!r}, 'w')",))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["meta", "message_hub", "state_dict"])
def test_code_is_never_run(place: str, zipped: bool, state: dict, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    content: dict[str, Any] = {"state_dict": dict(state), "meta": {}}
    content.setdefault(place, {})["evil"] = Evil(marker)
    torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"evil\.pth .*(builtins\.exec|GLOBAL exec)"):
        import_checkpoint(tmp_path / "evil.pth", "mmdet", tmp_path / "o.safetensors", style="pytorch")
    assert not marker.exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)  # the trap does work
    assert marker.exists()


class Named:
    """Pickled as a call of a global of any name, without importing it."""

    def __init__(self, name: str) -> None:
        self.name = name


class NamingPickler(pickle._Pickler):  # pyright: ignore[reportAttributeAccessIssue]
    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, Named):
            module, _, name = obj.name.rpartition(".")
            self.write(f"c{module}\n{name}\n)R".encode())
        else:
            super().save(obj, save_persistent_id)


@pytest.mark.parametrize(
    "name",
    ["os.system", "posix.system", "builtins.eval", "subprocess.Popen", "mmenginex.a", "nt.system", "runpy.run_path",
     "torch.load", "torch.utils.collect_env.run"],
)  # fmt: skip
def test_objects_of_others_are_refused_by_name(name: str, tmp_path: Path) -> None:
    class Module(ModuleType):
        Pickler, Unpickler, dumps = NamingPickler, pickle.Unpickler, pickle.dumps

    torch.save(
        {"state_dict": {"a": torch.zeros(1)}, "meta": Named(name)}, tmp_path / "a.pth", pickle_module=Module("m")
    )
    with pytest.raises(WeightsError, match=name.replace(".", r"\.")):
        read_foreign_checkpoint(tmp_path / "a.pth")


def test_training_checkpoints_of_mmengine_load(state: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its log histories, which hold methods and numpy arrays, though mmengine is not there to load them."""

    class HistoryBuffer:
        def __init__(self) -> None:
            self.history = np.arange(3.0)
            self.methods = {"min": HistoryBuffer.min}

        def min(self) -> float:
            return self.history.min()

    name = "mmengine.logging.history_buffer"
    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = name, "HistoryBuffer"
    HistoryBuffer.min.__module__, HistoryBuffer.min.__qualname__ = name, "HistoryBuffer.min"
    module = ModuleType(name)
    module.HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        for part in ("mmengine", "mmengine.logging"):
            patch.setitem(sys.modules, part, ModuleType(part))
        patch.setitem(sys.modules, name, module)
        hub = {"log_scalars": {"train/loss": HistoryBuffer()}, "iter": np.int64(3), "state": np.random.get_state()}
        momentum = {"state": {0: {"momentum_buffer": torch.zeros(2)}}}
        path = save(tmp_path / "epoch_12.pth", state, config_3x("vfnet"), message_hub=hub, optimizer=momentum)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)  # it is as torch.load alone refuses it
    before = torch.serialization.get_safe_globals()
    report = import_checkpoint(path, "mmdet", tmp_path / "o.safetensors")
    assert torch.serialization.get_safe_globals() == before
    assert "message_hub (beside the state_dict)" in report.left_over


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a PyTorch checkpoint"),
        (b"<html>404</html>", "is not a PyTorch checkpoint"),
        (b"PK\x03\x04 cut off", "is not a PyTorch checkpoint"),
        (b"\x80\x02}q\x00.", "is not a PyTorch checkpoint"),
        ({"meta": {}}, "holds no state dict"),
        ({"state_dict": {}}, "holds no state dict"),
        ({"state_dict": {"a": 1}}, "holds no state dict"),
        ([torch.zeros(1)], "holds no state dict"),
        ({"state_dict": {"a": torch.zeros(1)}, "meta": {"hooks": deque([1])}}, r"collections\.deque"),
    ],
)
def test_damaged_and_other_files_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(WeightsError, match=message):
        import_checkpoint(path, "mmdet", tmp_path / "o.safetensors", style="pytorch")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"there is no checkpoint .*absent\.pth"):
        import_checkpoint(tmp_path / "absent.pth", "mmdet", tmp_path / "o.safetensors")
