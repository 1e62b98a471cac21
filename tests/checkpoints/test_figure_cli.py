"""`msil figure`, as typed: what it writes, what data it takes, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from msil.checkpoints.description import run_settings
from msil.cli import main
from msil.errors import WeightsError
from msil.inference.heatmaps import short_names

from .cases import CLASSES, composed, described_file


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six images in COCO's layout, the first of them without boxes."""
    root = tmp_path / "data"
    (root / "annotations").mkdir(parents=True)
    (root / "val").mkdir()
    for i in range(6):
        Image.new("RGB", (60, 40), (30 * i, 90, 120)).save(root / "val" / f"{i}.png")
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 60, "height": 40} for i in range(6)],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [4, 4, 20, 20], "area": 400, "iscrowd": 0}
            for i in range(1, 6)
        ],
    }
    (root / "annotations" / "instances_val.json").write_text(json.dumps(content))
    return root


def checkpoint(path: Path, root: Path, name: str, *overrides: str) -> Path:
    """As a run writes it, of data in COCO's layout at `root`."""
    detector, description = described_file(path.with_suffix(".safetensors"), *overrides)
    config = composed("data=coco", f"data.root={root}", *overrides)
    values = {
        **dataclasses.asdict(config),
        "model": OmegaConf.to_container(OmegaConf.structured(description.model), enum_to_str=True),
        "run_name": name,
    }
    plain = json.loads(json.dumps(values, default=str))
    plain["data"] |= {"min_size": 64, "max_size": 96, "name": "coco"}
    own = {"config": plain, "classes": list(CLASSES), "category_ids": [1, 2, 3]}
    torch.save({"state_dict": detector.state_dict(), "msil": own}, path)
    return path


def test_heatmap_of_two_runs_on_the_split_of_their_data(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = checkpoint(tmp_path / "a.ckpt", root, "coco_fcos_plain_s0_0123abcd", "model.msil.apply=none")
    both = checkpoint(tmp_path / "b.ckpt", root, "coco_fcos_msil-both_s0_4567cdef")
    out = tmp_path / "figures" / "heatmap.png"
    command = ["figure", "heatmap", "--checkpoint", str(plain), "--checkpoint", str(both), "--out", str(out)]
    assert main([*command, "--split", "val", "--level", "P4"]) == 0
    printed = capsys.readouterr().out
    assert "5 images" in printed and "msil-both - plain [95 %]" in printed and f"{out}: 4 images, P4" in printed
    assert Image.open(out).format == "PNG"
    content = json.loads(out.with_suffix(".json").read_text())
    assert content["checkpoints"] == {"plain": str(plain), "msil-both": str(both)}
    assert (content["split"], content["images"], content["images_without_boxes"]) == ("val", 5, 1)
    assert len(content["rows"]) == 2 * 2 * 6
    uniform = next(row for row in content["rows"] if row["region"] == "inside")["uniform"]
    assert uniform == pytest.approx(20 * 20 / (60 * 40))
    assert sorted(path.name for path in out.parent.iterdir()) == ["heatmap.json", "heatmap.png"]


def test_heatmap_of_one_imported_file_on_images(tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    described_file(tmp_path / "net.safetensors", "model/head=vfnet")
    out = tmp_path / "maps.png"
    command = ["figure", "heatmap", "--checkpoint", str(tmp_path / "net.safetensors"), "--out", str(out)]
    images = ["--image", str(root / "val" / "0.png"), "--image", str(root / "val" / "1.png")]
    assert main([*command, *images]) == 0
    assert capsys.readouterr().out == f"{out}: 2 images, merged\n"
    assert out.is_file() and not out.with_suffix(".json").exists()
    # With data, its ground truth stands beside the images that it holds, and the energy is measured.
    assert main([*command, *images, "--data", "coco", "--root", str(root), "--split", "val"]) == 0
    assert json.loads(out.with_suffix(".json").read_text())["images"] == 5


def test_heatmap_refuses_in_one_sentence(tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    described_file(tmp_path / "net.safetensors")
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "photo.png").write_bytes(b"a photo")
    (tmp_path / "mine.json").write_text("[]")
    coco = ["--data", "coco", "--root", str(root), "--split", "val"]
    base = ["figure", "heatmap", "--checkpoint", str(tmp_path / "net.safetensors"), "--out", str(tmp_path / "a.png")]
    image = ["--image", str(root / "val" / "0.png")]
    for arguments, words in (
        ([], "there is nothing to draw"),
        (["--split", "val"], "holds no data settings: give --data and --root"),
        (["--image", str(tmp_path / "no.jpg")], "there is no image"),
        ([*image, "--out", "a.jpg"], "does not end in .png"),
        ([*image, "--out", str(tmp_path / "text.jpg" / "a.png")], "cannot be written"),
        ([*image, "--out", str(tmp_path / "photo.png")], "photo.png is already there, and not by this command"),
        ([*coco, "--out", str(tmp_path / "mine.png")], "mine.json is already there, and not by this command"),
        ([*image, "--checkpoint", str(tmp_path / "no.ckpt")], "there is no weights file"),
    ):
        assert main([*base, *arguments]) == 2, arguments
        message = capsys.readouterr().err
        assert message.startswith("error: ") and words in message and message.count("\n") == 1, message
    assert not (tmp_path / "a.png").exists()


def test_settings_of_a_run(tmp_path: Path, root: Path) -> None:
    settings = run_settings(checkpoint(tmp_path / "a.ckpt", root, "mine"))
    assert settings is not None and settings["data"]["root"] == str(root) and settings["run_name"] == "mine"
    assert run_settings(tmp_path / "a.safetensors") is None
    torch.save({"a": torch.zeros(1)}, tmp_path / "bare.pt")
    assert run_settings(tmp_path / "bare.pt") is None
    with pytest.raises(WeightsError, match="there is no weights file"):
        run_settings(tmp_path / "no.ckpt")


def test_names_that_tell_runs_apart() -> None:
    plain, both = "shapes_vfnet_plain_quick_s0_0123abcd", "shapes_vfnet_msil-both_quick_s0_4567cdef"
    assert short_names([plain, both]) == ["plain", "msil-both"]
    assert short_names([plain, plain]) == [f"{plain} (1)", f"{plain} (2)"]
    assert short_names(["a_b", "a"]) == ["b", "a"]
