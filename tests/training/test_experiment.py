"""Whole runs, made tiny: what they leave, that they are not repeated, and that they continue bit for bit."""

from __future__ import annotations

import fcntl
import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from msil import MSIL, build_detector
from msil.checkpoints.assemble import detector_from_config
from msil.config import Config, config_hash, plain
from msil.data.module import AugmentedImages
from msil.detection import Detector, FCOSHead
from msil.errors import ConfigError, DataError
from msil.lock import Locked
from msil.metrics.matching import match_coco
from msil.metrics.precision import scores
from msil.metrics.record import read_record
from msil.runs import REQUIRED_KEYS, is_finished, read_result
from msil.training import experiment
from msil.training.divergence import TrainingDiverged
from msil.training.experiment import run

from .cases import assert_same, load, rows, tiny_config

Finished = tuple[Config, Path, dict[str, Any]]


def folder(config: Config) -> Path:
    return Path(config.runs_dir) / config.run_name


def weights(config: Config, name: str = "last") -> dict[str, Any]:
    return load(folder(config) / "checkpoints" / f"{name}.ckpt")["state_dict"]


# What a run leaves


def test_a_run_leaves_its_settings(finished: Finished) -> None:
    config, run_dir, _ = finished
    assert yaml.safe_load((run_dir / "config.yaml").read_text()) == plain(config)


def test_a_run_leaves_a_complete_result(finished: Finished) -> None:
    config, run_dir, returned = finished
    result = read_result(run_dir)
    assert result is not None
    assert set(result) >= set(REQUIRED_KEYS)
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
    # 2 epochs of 16 images in batches of 8.
    expected = {"epochs": 2, "steps": 4, "train_images": 16, "val_images": 8, "flops_image_size": [64, 64], "seed": 0}
    assert {name: result[name] for name in expected} == expected
    assert result["classes"] == ["circle", "square", "triangle", "cross"]
    assert result["machine"]["processes"] == 1
    assert result["parameters"] == result["trainable_parameters"] > 0  # nothing is frozen from scratch
    state = weights(config)
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert result["parameters"] == sum(v.numel() for key, v in state.items() if not key.endswith(buffers))


def test_a_run_leaves_its_numbers_by_step(finished: Finished) -> None:
    _, run_dir, returned = finished
    found = rows(run_dir)
    assert [int(row["step"]) for row in found] == [0, 1, 1, 2, 3, 3]  # two steps and an evaluation, twice
    assert [int(row["epoch"]) for row in found] == [0, 0, 0, 1, 1, 1]
    losses = {"loss", "loss_cls", "loss_bbox", "loss_centerness", "lr", "images_per_second"}
    for number, row in enumerate(found):
        evaluation = number in (2, 5)
        expected = {"AP", "AP50", "AP75", "APs", "APm", "APl"} if evaluation else losses
        assert set(row) == expected | {"step", "epoch"}
    for row in found:
        if "loss" in row:
            parts = sum(float(row[name]) for name in ("loss_cls", "loss_bbox", "loss_centerness"))
            assert float(row["loss"]) == pytest.approx(parts, rel=1e-5)
    # faster-coco-eval while training and pycocotools at the end, on one net.
    assert float(found[-1]["AP"]) == pytest.approx(returned["metrics"]["AP"], abs=1e-6)
    # AdamW at 0.002 without warm-up; the cosine over 4 steps is 1, (1 + sqrt(1/2)) / 2, 1/2, (1 - sqrt(1/2)) / 2.
    root = math.sqrt(0.5)
    expected_lr = [0.002 * factor for factor in (1, (1 + root) / 2, 0.5, (1 - root) / 2)]
    assert [float(row["lr"]) for row in found if "lr" in row] == pytest.approx(expected_lr, rel=1e-5)


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
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert {path.name for path in run_dir.iterdir()} - {".lock"} == {
        "config.yaml", "result.json", "evaluation.npz", "metrics.csv", "checkpoints", "predictions.png", "curves.png"
    }  # fmt: skip
    for name in ("predictions.png", "curves.png"):
        with Image.open(run_dir / name) as picture:
            picture.load()
            assert min(picture.size) >= 200
            assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 10  # not one blank page


def test_a_finished_run_is_returned_not_repeated(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    config, run_dir, first = finished
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file() and path.name != ".lock"}

    def trained(*_: Any) -> None:
        raise AssertionError("it was trained again")

    monkeypatch.setattr(experiment, "train", trained)
    second = run(config)
    assert second.pop("skipped") is True
    assert "skipped" not in first
    assert second == read_result(run_dir)
    after = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before


# The folder


def test_a_folder_with_other_settings_is_refused(finished: Finished, shapes: Path) -> None:
    config, run_dir, _ = finished
    other = tiny_config(config.runs_dir, shapes, f"run_name={config.run_name}", "schedule.lr=0.001")
    before = (run_dir / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"holds a run with other settings \(hash .*; set another run_name"):
        run(other)
    assert (run_dir / "config.yaml").read_text() == before


BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True))


@pytest.mark.parametrize("damage", ["", "[1, 2]", "{", "\0", "[" * 100_000, BOMB])
def test_a_damaged_settings_file_is_a_sentence(tmp_path: Path, shapes: Path, damage: str) -> None:
    config = tiny_config(tmp_path, shapes, "run_name=mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text(damage)
    with pytest.raises(ConfigError, match=r"mine/config\.yaml is damaged: set another run_name or delete that folder"):
        run(config)
    assert (tmp_path / "mine" / "config.yaml").read_text() == damage


def test_other_devices_and_workers_are_the_same_run(finished: Finished, shapes: Path) -> None:
    config, _, _ = finished
    name = f"run_name={config.run_name}"
    other = tiny_config(config.runs_dir, shapes, name, "data.workers=2", "trainer.devices=2", "logger=wandb")
    assert run(other)["skipped"]


def test_a_folder_in_use_is_refused(tmp_path: Path, shapes: Path) -> None:
    config = tiny_config(tmp_path, shapes, "run_name=mine")
    (tmp_path / "mine").mkdir()
    with (tmp_path / "mine" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(
            Locked, match=r"mine is in use by another run \(.*\); wait for it, stop it or set another run_name"
        ):
            run(config)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == [".lock"]


def test_data_errors_come_before_any_training(tmp_path: Path) -> None:
    nowhere = ("data=coco", "data.min_size=64", "data.max_size=64", "data.num_train=null", "data.num_val=null")
    config = tiny_config(tmp_path, tmp_path / "nowhere", *nowhere, "data.image_size=null")
    with pytest.raises(DataError, match="nowhere"):
        run(config)
    assert not (folder(config) / "checkpoints").exists()


# The same again


def test_a_seed_gives_the_same_weights_again(finished: Finished, tmp_path: Path, shapes: Path) -> None:
    config, _, first = finished
    again = tiny_config(tmp_path, shapes)
    assert again.run_name == config.run_name
    torch.manual_seed(12345)  # what happened before in this process does not count
    second = run(again)
    assert_same(weights(again), weights(config))
    assert second["metrics"] == pytest.approx(first["metrics"], abs=0, nan_ok=True)
    other = tiny_config(tmp_path, shapes, "seed=1")
    assert not torch.equal(initial_weight(other), initial_weight(again))


def initial_weight(config: Config) -> torch.Tensor:
    L.seed_everything(config.seed, verbose=False)
    return detector_from_config(config.model, 4, 64, 64).head.state_dict()["cls_logits.weight"]


class Killed(Exception):
    """Stands for whatever ends a process."""


def killed_run(config: Config, monkeypatch: pytest.MonkeyPatch, epoch: int, images: int) -> None:
    """Runs until `images` images of `epoch` (from 0) were read."""
    real, seen = AugmentedImages.__getitem__, []

    def reads(self: AugmentedImages, key: tuple[int, int]) -> Any:
        if key[0] == epoch:
            seen.append(key)
            if len(seen) > images:
                raise Killed
        return real(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(AugmentedImages, "__getitem__", reads)
        with pytest.raises(Killed):
            run(config)
    assert read_result(folder(config)) is None


def assert_like_uninterrupted(config: Config, result: dict[str, Any], uninterrupted: Finished) -> None:
    whole, whole_dir, whole_result = uninterrupted
    ours, theirs = (load(folder(c) / "checkpoints" / "last.ckpt") for c in (config, whole))
    assert_same(ours["state_dict"], theirs["state_dict"])
    assert_same(ours["optimizer_states"], theirs["optimizer_states"])
    assert_same(weights(config, "best"), weights(whole, "best"))
    assert result["metrics"] == pytest.approx(whole_result["metrics"], abs=0, nan_ok=True)
    for name in ("steps", "epochs", "parameters", "train_images"):
        assert result[name] == whole_result[name]
    # Every step once, with the same losses; only the speed differs.
    timing = {"images_per_second"}
    for row, expected in zip(rows(folder(config)), rows(whole_dir), strict=True):
        assert row.keys() == expected.keys()
        for name in row.keys() - timing:
            assert float(row[name]) == pytest.approx(float(expected[name]), abs=0, nan_ok=True), name


# Which epoch (from 0), and after how many of its 16 images.
@pytest.mark.parametrize(("epoch", "images"), [(1, 8), pytest.param(0, 8, marks=pytest.mark.slow)])
def test_a_killed_run_continues_bit_for_bit(
    finished: Finished, tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch, epoch: int, images: int
) -> None:
    config = tiny_config(tmp_path, shapes)
    killed_run(config, monkeypatch, epoch, images)
    assert (folder(config) / "checkpoints" / "last.ckpt").exists() == (epoch > 0)
    assert_like_uninterrupted(config, run(config), finished)


def test_a_run_killed_in_its_last_evaluation_is_only_evaluated(
    finished: Finished, tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, shapes)

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(L.Trainer, "validate", killed)
        with pytest.raises(Killed):
            run(config)
    assert read_result(folder(config)) is None
    steps = []
    real = Detector.loss
    monkeypatch.setattr(Detector, "loss", lambda self, *batch: steps.append(batch) or real(self, *batch))
    result = run(config)
    assert steps == []
    assert result["images_per_second"] > 0  # of the training that was
    assert_like_uninterrupted(config, result, finished)


def test_a_checkpoint_of_another_net_is_refused_in_words(finished: Finished, tmp_path: Path, shapes: Path) -> None:
    config = tiny_config(tmp_path, shapes, "model.channels=32")
    (folder(config) / "checkpoints").mkdir(parents=True)
    source = finished[1] / "checkpoints" / "last.ckpt"
    (folder(config) / "checkpoints" / "last.ckpt").write_bytes(source.read_bytes())
    with pytest.raises(ConfigError, match=r"last\.ckpt does not fit this net; delete .* to start again"):
        run(config)


def test_a_broken_checkpoint_is_refused_in_words(tmp_path: Path, shapes: Path) -> None:
    config = tiny_config(tmp_path, shapes)
    (folder(config) / "checkpoints").mkdir(parents=True)
    (folder(config) / "checkpoints" / "last.ckpt").write_bytes(b"no checkpoint at all")
    with pytest.raises(ConfigError, match=r"last\.ckpt"):
        run(config)


def test_a_diverged_run_leaves_no_result(tmp_path: Path, shapes: Path) -> None:
    wild = ("schedule.optimizer=sgd", "schedule.lr=1e9", "schedule.grad_clip=null", "schedule.epochs=5")
    config = tiny_config(tmp_path, shapes, *wild)
    with pytest.raises(TrainingDiverged, match=r"at step \d+ loss_cls is (nan|inf), .*Lower schedule\.lr"):
        run(config)
    assert read_result(folder(config)) is None


# Other ways to run


def test_a_run_that_ends_between_two_evaluations_is_still_evaluated(tmp_path: Path, shapes: Path) -> None:
    overrides = ("schedule.max_steps=3", "schedule.eval_every=2", "schedule.eval_images=3")
    config = tiny_config(tmp_path, shapes, *overrides)
    result = run(config)
    assert (result["steps"], result["val_images"]) == (3, 3)
    found = rows(folder(config))
    assert [int(row["step"]) for row in found if "loss" in row] == [0, 1, 2]
    (evaluated,) = [row for row in found if "AP" in row]
    assert int(evaluated["step"]) == 2  # of the step after which it was made, as any other evaluation's
    assert float(evaluated["AP"]) == pytest.approx(result["metrics"]["AP"], abs=1e-6)
    assert (folder(config) / "checkpoints" / "last.ckpt").exists()


@pytest.mark.slow
def test_worker_processes_change_nothing(finished: Finished, tmp_path: Path, shapes: Path) -> None:
    config = tiny_config(tmp_path, shapes, "data.workers=1")
    result = run(config)
    assert_like_uninterrupted(config, result, finished)


def test_apply_none_is_the_plain_detector() -> None:
    config = tiny_config("runs", "data", "model.msil.apply=none")
    torch.manual_seed(0)
    ours = detector_from_config(config.model, 4, 64, 64)
    torch.manual_seed(0)
    theirs = build_detector(FCOSHead.Options(num_convs=1, norm_groups=4), "resnet10", 4, msil=None, channels=16)
    assert_same(dict(ours.state_dict()), dict(theirs.state_dict()))
    assert ours.head.msil is None


def test_every_model_setting_reaches_the_detector() -> None:
    overrides = {
        "model.score_thresh": 0.11, "model.nms_thresh": 0.22, "model.topk_candidates": 33,
        "model.detections_per_img": 44, "model.head.num_convs": 3, "model.head.norm_groups": 8,
        "model.head.conv_bias": "false", "model.head.center_sampling": "false",
        "model.head.center_sample_radius": 1.25, "model.head.centerness_on_reg": "false",
        "model.head.norm_on_bbox": "false", "model.head.loss_bbox": "iou", "model.head.point_offset": 0.25,
        "model.channels": 32, "model.image_mean": "[1,2,3]", "model.image_std": "[4,5,6]", "model.channel_order": "bgr",
        "model.backbone.norm": "bn", "model.msil.kernel_size": 1, "model.msil.align": "false",
        "model.msil.separate": "false", "model.msil.apply": "cls", "model.msil.reduction": 2,
        "model.test_scales": "[48,64]", "model.test_flip": "true",
    }  # fmt: skip
    config = tiny_config("runs", "data", *(f"{key}={value}" for key, value in overrides.items()))
    detector = detector_from_config(config.model, 7, 123, 456)
    assert isinstance(detector, Detector)
    head = detector.head
    found = {name: getattr(detector, name) for name in (
        "min_size", "max_size", "score_thresh", "nms_thresh", "topk_candidates", "detections_per_img", "channel_order",
        "test_scales", "test_flip",
    )}  # fmt: skip
    assert found == {
        "min_size": 123, "max_size": 456, "score_thresh": 0.11, "nms_thresh": 0.22, "topk_candidates": 33,
        "detections_per_img": 44, "channel_order": "bgr", "test_scales": (48, 64), "test_flip": True,
    }  # fmt: skip
    assert (detector.image_mean.tolist(), detector.image_std.tolist()) == ([1, 2, 3], [4, 5, 6])
    assert (head.num_classes, head.channels) == (7, 32)
    assert head.options == FCOSHead.Options(
        num_convs=3, norm_groups=8, conv_bias=False, center_sampling=False, center_sample_radius=1.25,
        centerness_on_reg=False, norm_on_bbox=False, loss_bbox="iou", point_offset=0.25,
    )  # fmt: skip
    assert {type(m) for m in detector.backbone.modules()} & {nn.BatchNorm2d, nn.GroupNorm} == {nn.BatchNorm2d}
    block = MSIL(32, align=False, separate=False, apply="cls", kernel_size=1, reduction=2)
    assert isinstance(head.msil, MSIL) and (head.msil.to_cls, head.msil.to_reg) == (True, False)
    shapes = {name: value.shape for name, value in block.state_dict().items()}
    assert {name: value.shape for name, value in head.msil.state_dict().items()} == shapes
