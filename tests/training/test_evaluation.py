"""mode=test: a file of weights scored on a split, or run on images that have no annotations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

import msil.main
from msil import cli
from msil.check import check
from msil.checkpoints import description
from msil.checkpoints.load import load_detector
from msil.command_line import inherited
from msil.config import Config
from msil.data.module import build_split
from msil.detection.folding import FoldedConv2d
from msil.explain import parse
from msil.inference import predict
from msil.interruption import Interruption
from msil.metrics.detections import DetectionMetric
from msil.reporting.sweep_table import result_line
from msil.runs import read_result
from msil.training.build import build
from msil.training.experiment import run
from msil.training.faults import FiniteSteps

from .cases import Finished, tiny_config


def evaluated(config: Config) -> tuple[Path, dict[str, Any]]:
    check(config)
    result = run(config)
    return Path(config.runs_dir) / config.run_name, result


def checkpoint(finished: Finished) -> str:
    return f"model.weights={finished[1] / 'checkpoints' / 'last.ckpt'}"


def test_a_run_s_checkpoint_gives_the_run_s_numbers(finished: Finished, tmp_path: Path, shapes: Path) -> None:
    folder, result = evaluated(tiny_config(tmp_path, shapes, "mode=test", checkpoint(finished)))
    assert result["metrics"] == pytest.approx(finished[2]["metrics"], nan_ok=True, abs=1e-9)
    assert (result["split"], result["val_images"], result["epochs"], result["steps"]) == ("val", 8, 0, 0)
    assert result["seen"] is False
    assert read_result(folder) is not None
    assert result["config"]["model"]["weights"].endswith("last.ckpt")

    # What was written is what the file's detector finds, image by image.
    detector, _ = load_detector(finished[1] / "checkpoints" / "last.ckpt")
    data = build_split({"name": "coco", "root": shapes}, "val")
    entries = json.loads((folder / f"detections_val_{finished[0].run_name}_results.json").read_text())
    for index in range(len(data)):
        expected = detector.predict([data[index][0]])[0]
        ours = [entry for entry in entries if entry["image_id"] == data.image_id(index)]
        assert len(ours) == len(expected.labels) > 0
        assert [entry["category_id"] for entry in ours] == [data.category_ids[k] for k in expected.labels]
        assert [entry["score"] for entry in ours] == pytest.approx(expected.scores.tolist(), abs=1e-6)

    name = f"detections_val_{finished[0].run_name}_results.json"
    assert result["detections"] == [name, name.replace(".json", ".zip")]
    assert "\npercent, on 8 images of shapes, split val\n" in result_line(result)


def test_final_weights_are_folded_once_and_lie_channels_last(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the file, in mode=test and in msil predict."""
    norm, short = "model.backbone.norm=frozen_bn", ("schedule.max_steps=1", "schedule.eval_images=1")
    run(tiny_config(tmp_path, shapes, norm, *short, "run_name=mine"))
    config = tiny_config(tmp_path, shapes, norm, "mode=test", f"model.weights={tmp_path}/mine")
    used = [build(config, tmp_path / "test", Interruption(), FiniteSteps()).module.detector]
    found = {"failed": [], "images": []}
    monkeypatch.setattr(predict, "predict_files", lambda detector, *_, **__: used.append(detector) or found)
    assert cli.main(["predict", str(shapes), "--checkpoint", f"{tmp_path}/mine"]) == 0
    assert len(used) == 2
    for detector in used:
        convs = [module for module in detector.modules() if isinstance(module, FoldedConv2d)]
        assert len(convs) == 12  # of ResNet-10: the stem, two in each of four stages, three for their shortcuts
        for conv in convs:
            assert conv.folded_weight is not None and torch.equal(conv.folded_weight, conv.folded()[0])
            assert conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_nothing_is_gathered_once_the_trainer_has_taken_it_to_the_cpu(
    finished: Finished, tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL refuses tensors of the CPU."""
    refused: list[bool] = []
    teardown, sync = SingleDeviceStrategy.teardown, DetectionMetric.sync

    def tearing_down(self: Any) -> None:
        teardown(self)
        refused.append(True)

    def gathering(self: Any, *arguments: Any, **options: Any) -> None:
        assert not refused, "No backend type associated with device type cpu"
        sync(self, *arguments, **options)

    monkeypatch.setattr(SingleDeviceStrategy, "teardown", tearing_down)
    monkeypatch.setattr(DetectionMetric, "sync", gathering)
    run(tiny_config(tmp_path, shapes, "mode=test", checkpoint(finished)))
    assert refused


def test_a_file_brings_the_size_of_images_its_classes_and_its_data(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Config] = []
    monkeypatch.setattr(msil.main, "run", found.append)
    trained = finished[0].data
    for mode in ("test", "train"):
        msil.main.command([f"mode={mode}", f"model.weights={finished[1]}", "model.channels=16"])  # a run's folder
        own = found.pop()
        assert own.model.weights == str(finished[1] / "checkpoints" / "last.ckpt")
        same = ("name", "root", "train_split", "val_split", "num_train", "image_size", "min_size", "max_size")
        assert [getattr(own.data, name) for name in same] == [getattr(trained, name) for name in same]
        inner = f"model.weights={finished[1]}/checkpoints"
        msil.main.command([f"mode={mode}", inner, "data=coco", "data.max_size=99"])
        other = found.pop().data
        assert (other.name, other.root, other.min_size, other.max_size) == ("coco", "data/coco", 64, 99)
        assert other.classes == (["circle", "square", "triangle", "cross"] if mode == "test" else None)


def test_a_fraction_and_a_title_are_of_the_run_s_own_images(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits of its pictures are of the detector."""
    own = {"name": "coco", "root": "own", "val_fraction": 0.2, "title": "mine", "bits": 12}
    monkeypatch.setattr(description, "run_settings", lambda _: {"data": own})
    for typed, kept in (((), True), (("data.root=other",), False), (("data.annotations=a.json",), False)):
        words = inherited([parse(word) for word in (f"model.weights={finished[1]}", *typed)])
        assert ("data.val_fraction=0.2" in words, "data.title=mine" in words) == (kept, kept)
        assert "data.bits=12" in words and "data=coco" in words
    words = inherited([parse(word) for word in (f"model.weights={finished[1]}", "data=voc")])
    assert sorted(words) == ["data.bits=12", "data.max_size=64", "data.min_size=64"]


def test_the_split_can_be_named_and_classes_left_out(finished: Finished, tmp_path: Path, shapes: Path) -> None:
    settings = ("mode=test", checkpoint(finished), "data.split=train", "data.classes=[cross,circle]")
    folder, result = evaluated(tiny_config(tmp_path, shapes, *settings))
    assert (result["split"], result["val_images"], result["classes"]) == ("train", 16, ["cross", "circle"])
    assert result["seen"] is True
    found = json.loads(next(folder.glob("detections_train_*.json")).read_text())
    listed = json.loads((shapes / "annotations" / "instances_train.json").read_text())["categories"]
    ids = {category["name"]: category["id"] for category in listed}
    assert {entry["category_id"] for entry in found} == {ids["cross"], ids["circle"]}


def test_images_that_the_run_held_out_were_not_trained_on(tmp_path: Path, shapes: Path) -> None:
    """Those of another fraction were, in part."""
    held = ("data.val_split=held", "data.val_fraction=0.25")
    run(tiny_config(tmp_path, shapes, *held, "schedule.max_steps=1", "schedule.eval_images=1", "run_name=mine"))
    for fraction, images, seen in ((0.25, 4, False), (0.5, 8, True)):
        words = ("mode=test", f"model.weights={tmp_path}/mine", *held[:1], f"data.val_fraction={fraction}")
        _, result = evaluated(tiny_config(tmp_path, shapes, *words))
        assert (result["val_images"], result["seen"]) == (images, seen)


@pytest.fixture
def test_dev(shapes: Path, tmp_path: Path) -> Path:
    """COCO's layout of its test set: images in test2017, listed without annotations by image_info_test-dev2017."""
    root = tmp_path / "coco"
    shutil.copytree(shapes / "val", root / "test2017")
    info = json.loads((shapes / "annotations" / "instances_val.json").read_text())
    del info["annotations"]
    (root / "annotations").mkdir()
    (root / "annotations" / "image_info_test-dev2017.json").write_text(json.dumps(info))
    return root


def test_images_without_annotations_end_in_an_upload_file(finished: Finished, tmp_path: Path, test_dev: Path) -> None:
    settings = ("data=coco", "data.min_size=64", "data.max_size=64", "data.workers=0", "data.num_train=null")
    settings += ("data.num_val=null", "data.image_size=null", "mode=test", "data.split=test-dev2017")
    folder, result = evaluated(tiny_config(tmp_path, test_dev, *settings, checkpoint(finished)))
    assert result["metrics"] == {}
    stem = f"detections_test-dev2017_{finished[0].run_name}_results"
    entries = json.loads((folder / f"{stem}.json").read_text())
    with ZipFile(folder / f"{stem}.zip") as file:
        assert file.namelist() == [f"{stem}.json"]
        assert json.loads(file.read(f"{stem}.json")) == entries
    listed = json.loads((test_dev / "annotations" / "image_info_test-dev2017.json").read_text())
    assert {entry["image_id"] for entry in entries} <= {image["id"] for image in listed["images"]}
    line = result_line(result)
    assert "8 images of coco, split test-dev2017: no annotations, so no scores" in line
    assert f"to upload: {stem}.zip" in line


def test_a_finished_baseline_goes_on_with_msil(
    finished: Finished, tmp_path: Path, shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = tiny_config(tmp_path, shapes, "model.msil.apply=none", "schedule.max_steps=1")
    run(plain)
    file = tmp_path / plain.run_name / "checkpoints" / "last.ckpt"
    capsys.readouterr()
    tuned = tiny_config(tmp_path, shapes, f"model.weights={file}", "model.msil.apply=cls", "schedule.max_steps=1")
    check(tuned)
    result = run(tuned)
    assert f"starting from {file}; MSIL is new and starts with open gates" in capsys.readouterr().out
    assert f"_msil-cls_from-{plain.run_name}_" in result["run_name"]
    # and what it leaves behind is a checkpoint like any other, tested without a word about MSIL
    again = tiny_config(
        tmp_path, shapes, "mode=test", f"model.weights={tmp_path / tuned.run_name}/checkpoints/last.ckpt"
    )
    assert run(again)["metrics"] == pytest.approx(result["metrics"], nan_ok=True, abs=1e-9)
