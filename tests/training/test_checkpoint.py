"""Checkpoints: whole or not there, free of code, and enough to rebuild the detector that a run trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from msil.checkpoints.assemble import detector_from_config
from msil.checkpoints.load import load_detector
from msil.config import Config, ModelConfig, plain
from msil.data.coco import CocoDataset
from msil.detection import Detections, Detector
from msil.metrics.coco import CocoMetric
from msil.training.checkpoint import AtomicCheckpointIO

from .cases import assert_same, load


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


def test_colleagues_may_read_a_checkpoint(tmp_path: Path) -> None:
    """As any other file of the run: by the umask, not the 0600 of a temporary file."""
    AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    (tmp_path / "other").touch()
    assert (tmp_path / "last.ckpt").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return (print, ("code ran",))

    torch.save({"state_dict": Code()}, tmp_path / "bad.ckpt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        # Even where the caller asks for more, as old versions of Lightning do.
        AtomicCheckpointIO().load_checkpoint(tmp_path / "bad.ckpt", weights_only=False)


# What a run leaves


@pytest.mark.parametrize("name", ["last", "best"])
def test_a_run_s_checkpoint_holds_its_settings(finished: tuple[Config, Path, Any], shapes: Path, name: str) -> None:
    config, run_dir, _ = finished
    checkpoint = load(run_dir / "checkpoints" / f"{name}.ckpt")
    assert checkpoint["msil"]["config"] == plain(config)
    assert checkpoint["msil"]["classes"] == ["circle", "square", "triangle", "cross"]
    assert checkpoint["msil"]["category_ids"] == list(CocoDataset(shapes, "val").category_ids)
    assert all(key.startswith("detector.") for key in checkpoint["state_dict"])


def predicted(detector: Detector, dataset: CocoDataset) -> list[Detections]:
    return detector.predict([dataset[i][0] for i in range(4)])


def test_the_checkpoint_s_own_settings_rebuild_the_detector(finished: tuple[Config, Path, Any], shapes: Path) -> None:
    """Nothing but the file is needed, and the detections are the run's own, bit for bit."""
    config, run_dir, _ = finished
    file = run_dir / "checkpoints" / "last.ckpt"
    checkpoint = load(file)
    values = checkpoint["msil"]["config"]
    model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), values["model"]))
    assert isinstance(model, ModelConfig)
    assert model == config.model
    sides = (values["data"]["min_size"], values["data"]["max_size"])

    run_s_own = detector_from_config(model, len(checkpoint["msil"]["classes"]), *sides)
    run_s_own.load_state_dict({key.removeprefix("detector."): v for key, v in checkpoint["state_dict"].items()})
    rebuilt, description = load_detector(file)
    assert not rebuilt.training
    assert description.classes == tuple(checkpoint["msil"]["classes"])
    assert (description.min_size, description.max_size) == sides
    dataset = CocoDataset(shapes, "val")
    expected = predicted(run_s_own, dataset)
    assert sum(len(found.boxes) for found in expected) > 100
    for ours, theirs in zip(predicted(rebuilt, dataset), expected, strict=True):
        assert_same(vars(ours), vars(theirs))


def test_the_final_ap_is_that_of_the_last_checkpoint(finished: tuple[Config, Path, Any], shapes: Path) -> None:
    """The file, evaluated anew on one image at a time, gives the run's numbers."""
    config, run_dir, result = finished
    detector = detector_from_config(config.model, 4, config.data.min_size, config.data.max_size)
    state = load(run_dir / "checkpoints" / "last.ckpt")["state_dict"]
    detector.load_state_dict({key.removeprefix("detector."): value for key, value in state.items()})
    dataset = CocoDataset(shapes, "val")
    metric = CocoMetric(dataset.annotations)
    for i in range(len(dataset)):
        metric.update(detector.predict([dataset[i][0]]), [dataset.image_id(i)])
    assert metric.compute_final() == pytest.approx(result["metrics"], abs=1e-6, nan_ok=True)
