"""A run with data.device_transforms is the run without it, on the CPU to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from msil.training.divergence import TrainingDiverged
from msil.training.experiment import run

from .cases import load, tiny_config
from .faults import SETTINGS, assert_like, folder
from .test_divergence import break_losses

# 64 px pictures become 40 to 90 px large. Parts of a batch, and a finished run's name that knows nothing of the switch.
CHANGED = ("data.min_size=80", "data.max_size=90", "data.multiscale=[40,90]", "trainer.accumulate=2", *SETTINGS)


def test_the_same_weights_losses_and_metrics(tmp_path: Path, shapes: Path) -> None:
    off = tiny_config(tmp_path / "off", shapes, *CHANGED)
    on = tiny_config(tmp_path / "on", shapes, *CHANGED, "data.device_transforms=true")
    run(off), run(on)
    assert on.run_name == off.run_name
    assert_like(on, off)


def test_the_batch_kept_of_a_bad_step_is_the_one_that_the_net_saw(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []
    for switch in ("false", "true"):
        settings = ("data.min_size=80", "data.max_size=80", *SETTINGS, f"data.device_transforms={switch}")
        config = tiny_config(tmp_path / switch, shapes, *settings)
        with monkeypatch.context() as patch:
            break_losses(patch, {1}, float("nan"))
            with pytest.raises(TrainingDiverged):
                run(config)
        kept.append(load(folder(config) / "nan_batch_rank0.pt"))
    off, on = kept
    assert [tuple(image.shape) for image in on["images"]] == [(3, 80, 80)] * 4
    assert all((a == b).all() for a, b in zip(on["images"], off["images"], strict=True))
    for ours, theirs in zip(on["targets"], off["targets"], strict=True):
        assert ours["image_id"] == theirs["image_id"] and (ours["boxes"] == theirs["boxes"]).all()
