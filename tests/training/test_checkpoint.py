"""Checkpoint files: whole or not there, and free of code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from msil.training.checkpoint import AtomicCheckpointIO

from .cases import assert_same


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_replaces_the_old_one(tmp_path: Path) -> None:
    io = AtomicCheckpointIO()
    path = tmp_path / "new" / "last.ckpt"
    for step in (1, 2):
        io.save_checkpoint({"step": step, "weight": torch.tensor([1.0, step])}, path)
        assert_same(io.load_checkpoint(path), {"step": step, "weight": torch.tensor([1.0, step])})
    assert visible(path.parent) == ["last.ckpt", "previous.ckpt"]
    assert io.load_checkpoint(path.with_name("previous.ckpt"))["step"] == 1
    for step in (1, 2):  # only what a run resumes from
        io.save_checkpoint({"step": step}, tmp_path / "best" / "best.ckpt")
    assert visible(tmp_path / "best") == ["best.ckpt"]


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    io = AtomicCheckpointIO()
    path = tmp_path / "last.ckpt"
    io.save_checkpoint({"step": 1}, path)

    def half(checkpoint: Any, file: Any) -> None:
        file.write(b"half a checkpoint")
        raise error

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(type(error)):
        io.save_checkpoint({"step": 2}, path)
    assert visible(tmp_path) == ["last.ckpt"]
    assert io.load_checkpoint(path) == {"step": 1}


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return (print, ("code ran",))

    torch.save({"state_dict": Code()}, tmp_path / "bad.ckpt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        # Even where the caller asks for more, as old versions of Lightning do.
        AtomicCheckpointIO().load_checkpoint(tmp_path / "bad.ckpt", weights_only=False)
