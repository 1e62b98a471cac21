"""Reading weight files and renaming MMDetection's keys."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from msil.detection.weights import from_mmdet, load_state_dict_file
from msil.errors import WeightsError

HEAD = {
    "cls_convs.0.conv.weight": "cls_tower.0.conv.weight",
    "cls_convs.0.conv.bias": "cls_tower.0.conv.bias",
    "cls_convs.3.gn.weight": "cls_tower.3.norm.weight",
    "cls_convs.3.gn.bias": "cls_tower.3.norm.bias",
    "reg_convs.1.conv.weight": "reg_tower.1.conv.weight",
    "reg_convs.10.gn.bias": "reg_tower.10.norm.bias",
    "conv_cls.weight": "cls_logits.weight",
    "conv_cls.bias": "cls_logits.bias",
    "conv_reg.weight": "bbox_reg.weight",
    "conv_reg.bias": "bbox_reg.bias",
    "conv_centerness.weight": "bbox_ctrness.weight",
    "conv_centerness.bias": "bbox_ctrness.bias",
}
NECK = {
    "lateral_convs.0.conv.weight": "lateral_convs.0.weight",
    "lateral_convs.2.conv.bias": "lateral_convs.2.bias",
    "fpn_convs.4.conv.weight": "fpn_convs.4.weight",
}
BACKBONE = {
    key: key
    for key in (
        "conv1.weight",
        "bn1.weight",
        "bn1.running_mean",
        "layer1.0.conv3.weight",
        "layer3.22.bn2.running_var",
        "layer4.0.downsample.0.weight",
        "layer4.0.downsample.1.bias",
    )
}
PARTS = {"backbone.": ("backbone.", BACKBONE), "neck.": ("fpn.", NECK), "bbox_head.": ("head.", HEAD)}


def numbered(keys: list[str], start: int = 0) -> dict[str, Tensor]:
    return {key: torch.tensor([float(start + i)]) for i, key in enumerate(keys)}


@pytest.mark.parametrize("names", [HEAD, NECK, BACKBONE], ids=["head", "neck", "backbone"])
def test_keys_of_one_part(names: dict[str, str]) -> None:
    theirs = numbered(list(names))
    ours = from_mmdet(theirs)
    assert list(ours) == list(names.values())
    assert all(ours[names[key]] is value for key, value in theirs.items())


def test_keys_of_a_detector() -> None:
    names = {theirs + key: ours + name for theirs, (ours, part) in PARTS.items() for key, name in part.items()}
    state = numbered(list(names))
    assert from_mmdet(state) == {names[key]: value for key, value in state.items()}


def test_prefixes_of_one_part_stay() -> None:
    assert list(from_mmdet({"neck.fpn_convs.0.conv.bias": torch.zeros(1)})) == ["fpn.fpn_convs.0.bias"]


@pytest.mark.parametrize(("theirs", "ours"), [("", ""), ("bbox_head.", "head.")])
def test_scales_are_stacked_in_level_order(theirs: str, ours: str) -> None:
    state = {f"{theirs}scales.{level}.scale": torch.tensor(level / 4) for level in (4, 0, 2, 1, 3)}
    renamed = from_mmdet(state)
    assert list(renamed) == [f"{ours}scales"]
    assert renamed[f"{ours}scales"].tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_what_does_not_matter_is_dropped() -> None:
    assert from_mmdet(numbered(["bn1.num_batches_tracked", "layer2.1.bn3.num_batches_tracked", "fc.weight"])) == {}
    assert from_mmdet(numbered(["backbone.fc.bias", "bbox_head.integral.project"])) == {}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["conv_cls.weight", "conv_iou.weight"], "the key conv_iou.weight is none of"),
        (["bbox_head.cls_convs.0.bn.weight"], "the key bbox_head.cls_convs.0.bn.weight is none of"),
        (["cls_convs.3.conv.conv_offset.weight"], "the key cls_convs.3.conv.conv_offset.weight is none of"),
        (["xneck.fpn_convs.0.conv.bias"], "the key xneck.fpn_convs.0.conv.bias is none of"),
        (["neck.fpn_convs.0.conv.bias", "conv_cls.bias"], "conv_cls.bias has no part's prefix while neck.fpn_convs"),
        (["conv1.weight", "fpn_convs.0.conv.bias"], "conv1.weight and fpn_convs.0.conv.bias are of different parts"),
        (["scales.0.scale", "scales.3.scale"], "scales lacks the levels 1, 2"),
    ],
)
def test_what_cannot_be_converted_is_named(keys: list[str], message: str) -> None:
    with pytest.raises(WeightsError, match=message.replace(".", r"\.")):
        from_mmdet(numbered(keys))


@pytest.mark.parametrize("form", ["head_fcos", "head_fcos_tricks"])
def test_reference_heads_are_converted_whole(form: str, golden) -> None:
    theirs = golden(form, "state/")
    ours = from_mmdet(theirs)
    assert len(ours) == len(theirs) - 4  # five scales become one tensor
    assert torch.equal(ours["scales"], torch.stack([theirs[f"scales.{level}.scale"] for level in range(5)]))


def test_vfnets_head_is_refused_by_name(golden) -> None:
    with pytest.raises(WeightsError, match=r"the key (vfnet|scales_refine)"):
        from_mmdet(golden("head_vfnet_s3", "state/"))


STATE = {"a.weight": torch.arange(3.0), "b": torch.ones(2, dtype=torch.int64)}


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {key: torch.nn.Parameter(value) if value.is_floating_point() else value for key, value in STATE.items()},
        {"state_dict": STATE, "meta": {"epoch": 12}},
        {"state_dict": {f"detector.{key}": value for key, value in STATE.items()}, "epoch": 3},
    ],
    ids=["plain", "parameters", "mmdet", "run"],
)
def test_files_that_load(content: dict, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    for given in (path, str(path)):
        loaded = load_state_dict_file(given)
        assert list(loaded) == list(STATE)
        assert all(torch.equal(loaded[key], value) and not loaded[key].requires_grad for key, value in STATE.items())


class Evil:
    def __reduce__(self) -> tuple:
        return (Path("pwned").touch, ())


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_file_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Evil()}, "evil.pth")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pth", "evil.pkl"):
        with pytest.raises(WeightsError, match="objects other than tensors"):
            load_state_dict_file(name)
    assert not Path("pwned").exists()
    torch.load("evil.pth", weights_only=False)  # the trap does work
    assert Path("pwned").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut off", b"\x80\x02"])
def test_damaged_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"weights\.pth is not a weights file"):
        load_state_dict_file(path)


@pytest.mark.parametrize("content", [{}, [torch.zeros(1)], {"lr": 0.1}, {0: torch.zeros(1)}, {"state_dict": {}}])
def test_files_without_a_state_dict_are_refused(content: object, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    with pytest.raises(WeightsError, match="holds no state dict"):
        load_state_dict_file(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(WeightsError, match=f"no weights file {path}"):
            load_state_dict_file(path)
