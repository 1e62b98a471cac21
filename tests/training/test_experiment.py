"""A whole run, made tiny: what it leaves, that it is not repeated, and that it comes out the same again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from msil import MSIL
from msil.checkpoints.assemble import detector_from_config
from msil.config import config_hash, plain
from msil.detection import Detector, FCOSHead
from msil.errors import ConfigError, DataError
from msil.metrics.matching import match_coco
from msil.metrics.precision import scores
from msil.metrics.record import read_record
from msil.runs import REQUIRED_KEYS, is_finished, read_result
from msil.training.experiment import run

from .cases import Finished, assert_same_run, folder, last, load, rows, tiny_config

# What a run leaves


def test_a_run_leaves_its_settings_and_a_complete_result(finished: Finished) -> None:
    config, run_dir, returned = finished
    assert yaml.safe_load((run_dir / "config.yaml").read_text()) == plain(config)
    result = read_result(run_dir)
    assert result is not None and set(result) >= set(REQUIRED_KEYS)
    assert is_finished(run_dir, config_hash(plain(config)))
    # On disk it is what `run` returned, NaN as null.
    assert "NaN" not in (run_dir / "result.json").read_text()
    for key, value in returned.items():
        if key != "metrics":
            assert json.loads(json.dumps(value)) == result[key], key
    assert set(result["metrics"]) == {
        "AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"
    }  # fmt: skip
    for name, value in returned["metrics"].items():
        assert result["metrics"][name] == (None if math.isnan(value) else value)
        assert math.isnan(value) or 0 <= value <= 1
    # 2 epochs of 16 images in batches of 4.
    expected = {"epochs": 2, "steps": 8, "train_images": 16, "val_images": 8, "flops_image_size": [64, 64], "seed": 0}
    assert {name: result[name] for name in expected} == expected
    assert result["classes"] == ["circle", "square", "triangle", "cross"]
    assert result["parameters"] == result["trainable_parameters"] > 0  # nothing is frozen from scratch
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    state = last(config)["state_dict"]
    assert result["parameters"] == sum(v.numel() for key, v in state.items() if not key.endswith(buffers))


def test_a_run_leaves_its_numbers_by_step(finished: Finished) -> None:
    _, run_dir, returned = finished
    found = rows(run_dir)
    steps, evaluations = [row for row in found if "loss" in row], [row for row in found if "AP" in row]
    assert [(int(row["epoch"]), int(row["step"])) for row in steps] == [(step // 4, step) for step in range(8)]
    assert [(int(row["epoch"]), int(row["step"])) for row in evaluations] == [(0, 3), (1, 7)]
    losses = ("loss_cls", "loss_bbox", "loss_centerness")
    for row in steps:
        assert set(row) == {"loss", *losses, "lr", "images_per_second", "step", "epoch"}
        assert float(row["loss"]) == pytest.approx(sum(float(row[name]) for name in losses), rel=1e-5)
    # faster-coco-eval while training and pycocotools at the end, on one net.
    assert float(found[-1]["AP"]) == pytest.approx(returned["metrics"]["AP"], abs=1e-6)
    # AdamW at 0.002 without warm-up, and half a cosine over 8 steps.
    expected = [0.001 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert [float(row["lr"]) for row in steps] == pytest.approx(expected, rel=1e-12)


# What is kept is what was scored: judged again, it gives pycocotools' numbers of result.json.
def test_the_kept_detections_give_the_reported_numbers(finished: Finished) -> None:
    _, run_dir, result = finished
    record = read_record(run_dir)
    found = scores(match_coco(record))
    for name, value in found.items():
        assert value == pytest.approx(result["metrics"][name], abs=1e-9, nan_ok=True), name
    assert record.classes.tolist() == result["classes"] and len(record.image_ids) == result["val_images"]
    root = Path(result["config"]["data"]["root"])
    for name, (height, width) in zip(record.file_names, record.sizes, strict=True):
        with Image.open(root / str(name)) as picture:
            assert picture.size == (width, height)


def test_a_run_leaves_checkpoints_and_pictures_and_nothing_else(finished: Finished) -> None:
    _, run_dir, _ = finished
    kept = {path.name: load(path) for path in (run_dir / "checkpoints").iterdir()}
    assert {name: len(one["optimizer_states"]) for name, one in kept.items()} == {"best.ckpt": 0, "last.ckpt": 1}
    assert {path.name for path in run_dir.iterdir()} - {".lock"} == {
        "config.yaml", "result.json", "evaluation.npz", "metrics.csv", "checkpoints", "predictions.png", "curves.png"
    }  # fmt: skip
    for name in ("predictions.png", "curves.png"):
        with Image.open(run_dir / name) as picture:
            picture.load()
            assert min(picture.size) >= 200


def test_every_parameter_is_trained(finished: Finished) -> None:
    config, _, _ = finished
    L.seed_everything(config.seed, verbose=False)
    initial = detector_from_config(config.model, 4, config.data.min_size, config.data.max_size)
    trained = last(config)["state_dict"]
    same = [name for name, value in initial.named_parameters() if torch.equal(value, trained[f"detector.{name}"])]
    assert same == []


# The folder


def test_a_finished_run_is_returned_not_repeated(finished: Finished, shapes: Path) -> None:
    """Also with other devices and workers, which do not change the result."""
    config, run_dir, first = finished
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file() and path.name != ".lock"}
    name = f"run_name={config.run_name}"
    other = tiny_config(config.runs_dir, shapes, name, "data.workers=2", "trainer.devices=2", "logger=wandb")
    for again in (config, other):
        second = run(again)
        assert second.pop("skipped") is True and "skipped" not in first
        assert second == read_result(run_dir)
    after = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before


@pytest.mark.parametrize("damage", [None, b"\xff\0["])
def test_a_folder_with_other_settings_is_refused(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes | None
) -> None:
    first = tiny_config(tmp_path, shapes, "run_name=mine", "schedule.max_steps=1", "schedule.eval_images=1")
    monkeypatch.setattr("sys.argv", ["/bin/pytest", "run_name=mine"])
    run(first)
    settings = tmp_path / "mine" / "config.yaml"
    other = tiny_config(tmp_path, shapes, "run_name=mine", "schedule.lr=0.001")
    if damage is not None:
        settings.write_bytes(damage)
        other = first
    before = settings.read_bytes()
    what = (
        r" \(schedule.max_steps: 1 -> null, .*\): give its own \(python pytest run_name=mine\) to continue"
        if damage is None
        else ", and its config.yaml was damaged or edited: set an"
    )
    with pytest.raises(ConfigError, match="mine holds a run with other settings" + what):
        run(other)
    assert settings.read_bytes() == before


def test_data_errors_come_before_any_training(tmp_path: Path) -> None:
    nowhere = ("data=coco", "data.min_size=64", "data.max_size=64", "data.num_train=null", "data.num_val=null")
    config = tiny_config(tmp_path, tmp_path / "nowhere", *nowhere, "data.image_size=null")
    with pytest.raises(DataError, match="nowhere"):
        run(config)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/.* cannot be used \(Not a directory\): mend it, or set runs_dir"):
        run(tiny_config(tmp_path / "file", tmp_path))


# The same again


def test_a_seed_gives_the_same_run_again(finished: Finished, tmp_path: Path, shapes: Path) -> None:
    """Whatever happened before in this process, and also where a worker loads and a device transforms the images."""
    config = tiny_config(tmp_path, shapes, "data.workers=1", "data.device_transforms=true")
    assert config.run_name == finished[0].run_name
    torch.manual_seed(12345)
    run(config)
    assert_same_run(config, finished[0])


def test_a_run_that_ends_between_two_evaluations_is_still_evaluated(tmp_path: Path, shapes: Path) -> None:
    overrides = ("schedule.max_steps=5", "schedule.eval_every=2", "schedule.eval_images=3")
    config = tiny_config(tmp_path, shapes, *overrides)
    result = run(config)
    assert (result["steps"], result["val_images"]) == (5, 3)
    found = rows(folder(config))
    assert [int(row["step"]) for row in found if "loss" in row] == [0, 1, 2, 3, 4]
    (evaluated,) = [row for row in found if "AP" in row]
    assert int(evaluated["step"]) == 4  # of the step after which it was made, as any other evaluation's
    assert float(evaluated["AP"]) == pytest.approx(result["metrics"]["AP"], abs=1e-6)


def test_every_model_setting_reaches_the_detector() -> None:
    of_detector = {
        "score_thresh": 0.11, "nms_thresh": 0.22, "topk_candidates": 33, "detections_per_img": 44,
        "channel_order": "bgr", "test_flip": True,
    }  # fmt: skip
    of_head = {
        "num_convs": 3, "norm_groups": 8, "conv_bias": False, "center_sampling": False, "center_sample_radius": 1.25,
        "centerness_on_reg": False, "norm_on_bbox": False, "loss_bbox": "iou", "point_offset": 0.25,
        "fast_start": False,
    }  # fmt: skip
    of_block = {"align": False, "separate": False, "apply": "cls", "kernel_size": 1, "reduction": 2}
    others = {"channels": 32, "image_mean": [1, 2, 3], "image_std": [4, 5, 6], "test_scales": [48, 64]}
    values = {"": of_detector | others, "head.": of_head, "msil.": of_block, "backbone.": {"norm": "bn"}}
    words = [f"model.{part}{name}={json.dumps(v)}" for part, own in values.items() for name, v in own.items()]
    detector = detector_from_config(tiny_config("runs", "data", *words).model, 7, 123, 456)
    assert isinstance(detector, Detector)
    head = detector.head
    assert {name: getattr(detector, name) for name in of_detector} == of_detector
    assert (detector.min_size, detector.max_size, detector.test_scales) == (123, 456, (48, 64))
    assert (detector.image_mean.tolist(), detector.image_std.tolist()) == ([1, 2, 3], [4, 5, 6])
    assert (head.num_classes, head.channels, head.options) == (7, 32, FCOSHead.Options(**of_head))
    assert {type(m) for m in detector.backbone.modules()} & {nn.BatchNorm2d, nn.GroupNorm} == {nn.BatchNorm2d}
    block = MSIL(32, **of_block)
    assert isinstance(head.msil, MSIL) and (head.msil.to_cls, head.msil.to_reg) == (True, False)
    shapes = {name: value.shape for name, value in block.state_dict().items()}
    assert {name: value.shape for name, value in head.msil.state_dict().items()} == shapes
