"""Detectors out of files: whole, with other classes, with MSIL added."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from msil.checkpoints.assemble import detector_from_config
from msil.checkpoints.load import load_detector, load_weights
from msil.detection import Detector
from msil.errors import WeightsError

from .cases import CLASSES, SMALL, composed, described_file, image

PLAIN = "model.msil.apply=none"


def fresh(*overrides: str, classes: int = 3, seed: int = 9) -> Detector:
    torch.manual_seed(seed)
    return detector_from_config(composed(*SMALL, *overrides).model, classes, 64, 96).eval()


@pytest.mark.parametrize("head", ["fcos", "fcos_plain", "vfnet", "retinanet", "atss", "gfl", "tood"])
def test_a_file_is_enough_to_build_its_detector(tmp_path: Path, head: str) -> None:
    file = tmp_path / "net.safetensors"
    detector, description = described_file(file, f"model/head={head}", "model.channel_order=bgr")
    loaded, found = load_detector(file)
    assert found == description
    assert not loaded.training
    assert (loaded.min_size, loaded.max_size, loaded.channel_order) == (64, 96, "bgr")
    assert loaded.nms_thresh == (0.5 if head in ("fcos_plain", "retinanet") else 0.6)
    ours, theirs = loaded([image()]), detector([image()])
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.box, theirs.box)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("net.safetensors", b"\x08\0\0\0\0\0\0\0{}", "cannot be read"),
        ("net.safetensors", {}, "does not say of what net"),
        ("net.safetensors", {"msil": '{"model": {"colour": "red"}}'}, "was written by another version"),
        ("net.safetensors", {"msil": "{not json"}, "was written by another version"),
        ("net.ckpt", b"not a zip", "is not a weights file"),
        ("net.ckpt", {"msil": {"x": 1}}, "was written by another version"),
    ],
)
def test_a_file_that_describes_no_net_is_named(tmp_path: Path, name: str, content: Any, message: str) -> None:
    file = tmp_path / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif file.suffix == ".ckpt":
        torch.save({"state_dict": {}, **content}, file)
    else:
        save_file({"a": torch.zeros(1)}, file, content)
    with pytest.raises(WeightsError, match=f"{name} .*{message}"):
        load_detector(file)


@pytest.mark.parametrize("head", ["fcos", "retinanet"])  # the latter has a row for each class of nine anchors
def test_classes_are_found_by_name(tmp_path: Path, head: str) -> None:
    file, choice = tmp_path / "net.safetensors", f"model/head={head}"
    detector, _ = described_file(file, PLAIN, choice)
    some = fresh(PLAIN, choice, classes=2)
    assert load_weights(some, file, ("emu", "cat"), to_train=False) == ["2 classes found by name"]
    assert torch.equal(some([image()]).logits, detector([image()]).logits[..., [2, 0]])
    same = fresh(PLAIN, choice)
    assert load_weights(same, file, CLASSES, to_train=False) == []


def test_new_classes_start_anew_in_training_and_are_refused_in_a_test(tmp_path: Path) -> None:
    file = tmp_path / "net.safetensors"
    detector, _ = described_file(file, PLAIN)
    mine = fresh(PLAIN, classes=2)
    own_row = mine.head.cls_logits.weight[1].clone()
    with pytest.raises(WeightsError, match=r"has no class 'yak'; it knows cat, dog, emu: .*=.NAME: cat"):
        load_weights(mine, file, ("dog", "yak"), to_train=False)
    assert load_weights(mine, file, ("dog", "yak"), to_train=True) == ["of 2 classes 1 start anew: yak"]
    assert torch.equal(mine.head.cls_logits.weight[0], detector.head.cls_logits.weight[1])
    assert torch.equal(mine.head.cls_logits.weight[1], own_row)


@pytest.mark.parametrize(
    ("head", "separate", "apply"),
    [("fcos", "true", "both"), ("fcos", "false", "cls"), ("vfnet", "true", "reg"), ("vfnet", "false", "both")],
)
def test_msil_added_to_a_baseline_starts_close_to_it(tmp_path: Path, head: str, separate: str, apply: str) -> None:
    file = tmp_path / "net.safetensors"
    baseline, _ = described_file(file, PLAIN, f"model/head={head}")
    mine = fresh(f"model/head={head}", f"model.msil.separate={separate}", f"model.msil.apply={apply}")
    assert load_weights(mine, file, CLASSES, to_train=True) == ["MSIL is new and starts with open gates"]
    before, after = (detector.head.towers(detector.pyramid([image()])) for detector in (baseline, mine))
    for branch, old, new in zip(("cls", "reg"), before, after, strict=True):
        for theirs, ours in zip(old, new, strict=True):
            if apply in (branch, "both"):
                positive = theirs > 0
                gate = ours[positive] / theirs[positive]
                # sigmoid(log 99) = 0.99; f_dec's own weights move it a little
                torch.testing.assert_close(gate, torch.full_like(gate, 0.99), rtol=0, atol=5e-3)
            else:
                assert torch.equal(ours, theirs)


def test_msil_is_never_missing_silently(tmp_path: Path) -> None:
    file = tmp_path / "net.safetensors"
    described_file(file, PLAIN)
    with pytest.raises(WeightsError, match=r"it lacks head\.msil\."):
        load_weights(fresh(), file, CLASSES, to_train=False)
    described_file(file, "model.msil.apply=cls")
    for to_train in (True, False):
        with pytest.raises(WeightsError, match=r"it lacks head\.msil\.separate_reg"):
            load_weights(fresh(), file, CLASSES, to_train=to_train)
        with pytest.raises(WeightsError, match=r"has the unknown head\.msil\."):
            load_weights(fresh(PLAIN), file, CLASSES, to_train=to_train)


class Block(nn.Conv2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 1)

    def forward(self, cls_feat: Tensor, reg_feat: Tensor) -> Any:
        return super().forward(cls_feat), reg_feat


def test_the_block_of_a_file_is_named_where_another_was_built(tmp_path: Path) -> None:
    file = tmp_path / "net.safetensors"
    block = f"model.msil.block={__name__}.Block"
    described_file(file, "model.msil.reduction=16", block)
    with pytest.raises(WeightsError, match=rf"The file was trained with {block}\."):
        load_weights(fresh(), file, CLASSES, to_train=True)
    assert load_weights(fresh("model.msil.reduction=16", block), file, CLASSES, to_train=True) == []


def test_another_net_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "net.safetensors"
    described_file(file, PLAIN, "model/head=vfnet")
    with pytest.raises(WeightsError, match=r"has the unknown head\.bbox_refine.*model\.head, model\.backbone"):
        load_weights(fresh(PLAIN), file, CLASSES, to_train=True)
