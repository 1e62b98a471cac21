"""`msil VERB`, as typed: what it prints, writes and refuses, and that what one verb writes the others read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from msil.cli import main
from msil.inference import export

from .cases import CLASSES, described_file
from .theirs import mmdet_state


def test_import_asks_for_what_keys_do_not_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, ours = tmp_path / "theirs.pth", tmp_path / "ours.safetensors"
    torch.save(mmdet_state("fcos", "resnet50"), theirs)
    command = ["weights", "import", str(theirs), "--from", "mmdet", "-o", str(ours)]
    assert main(command) == 2 and not ours.exists()
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "--style" in message and "--head" in message
    assert message.count("\n") == 1
    assert main([*command, "--style", "caffe", "--head", "fcos"]) == 0 and ours.is_file()
    assert "style caffe" in capsys.readouterr().out


def test_predict_draws_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    described_file(tmp_path / "net.safetensors", "model/head=vfnet", "model.score_thresh=0.001")
    folder = tmp_path / "images"
    folder.mkdir()
    for name, size in (("a.jpg", (80, 64)), ("b.png", (50, 70))):
        Image.new("RGB", size, (90, 120, 30)).save(folder / name)
    out = tmp_path / "out"
    command = ["predict", str(folder), "--checkpoint", str(tmp_path / "net.safetensors"), "--out", str(out)]
    assert main([*command, "--threshold", "0.005", "--format", "coco"]) == 0
    content = json.loads((out / "detections.json").read_text())
    assert [image["file"] for image in content["images"]] == ["a.jpg", "b.png"]
    found = [detection for image in content["images"] for detection in image["detections"]]
    assert found and {detection["label"] for detection in found} <= set(CLASSES)
    printed = capsys.readouterr().out
    assert f"{len(found)} detections on 2 images in {out}, detections.json, coco_results.json" in printed
    assert "hint" not in printed and len(json.loads((out / "coco_results.json").read_text())) == len(found)
    # Exit 1, with the others done, if one of them cannot be read.
    (folder / "c.jpg").write_bytes(b"no image")
    assert main([*command, "--threshold", "0.99"]) == 1
    printed = capsys.readouterr()
    assert "c.jpg" in printed.err
    # Of that hint, the advice finds something.
    highest, advice = re.search(
        r"no score reaches 0.99; the highest found is (\S+): try --threshold (\S+)\.", printed.out
    ).groups()  # pyright: ignore
    assert float(highest) == pytest.approx(max(one["score"] for one in found), rel=0.05)
    main([*command, "--threshold", advice])
    assert "hint" not in capsys.readouterr().out
    assert main([*command, "--threshold", "1", "--batch-size", "0"]) == 2


def test_a_file_that_does_not_describe_its_net_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "bare.pt")
    for command in (["predict", "x.jpg", "--checkpoint"], ["export", "--onnx", "x.onnx"]):
        assert main([*command, str(tmp_path / "bare.pt")]) == 2
        assert "does not say of what net" in capsys.readouterr().err


def test_export_is_asked_for_the_net_s_own_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    described_file(tmp_path / "net.safetensors")  # resizes to 64, at most 96
    calls = []

    def exported(detector, path, *, classes, image_size, dynamic, batch, progress) -> list[str]:
        calls.append((classes, tuple(image_size), dynamic, batch))
        progress("half")
        return ["done"]

    monkeypatch.setattr(export, "export_onnx", exported)
    command = ["export", str(tmp_path / "net.safetensors"), "--onnx", "net.onnx"]
    assert main(command) == 0
    assert main([*command, "--static", "--size", "48", "64", "--batch", "2"]) == 0
    assert calls == [(CLASSES, (64, 85), True, None), (CLASSES, (48, 64), False, 2)]
    assert capsys.readouterr().out.splitlines() == [f"loading {command[1]}", "half", "done"] * 2


@pytest.mark.parametrize("arguments", [[], ["weights"], ["weights", "import"], ["predict"], ["export"], ["nonsense"]])
def test_usage_is_shown_for_what_is_incomplete(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("usage: msil")
