"""Reading weight files and renaming MMDetection's and torchvision's keys."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models.detection import fcos_resnet50_fpn

from msil.detection.weights import from_mmdet, from_torchvision, load_state_dict_file
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
VFNET = {
    "reg_convs.2.conv.weight": "reg_tower.2.conv.weight",
    "vfnet_reg_conv.conv.weight": "reg_conv.conv.weight",
    "vfnet_reg_conv.gn.weight": "reg_conv.norm.weight",
    "vfnet_reg_conv.gn.bias": "reg_conv.norm.bias",
    "vfnet_reg.weight": "bbox_reg.weight",
    "vfnet_reg.bias": "bbox_reg.bias",
    "vfnet_reg_refine_dconv.weight": "reg_star.weight",
    "vfnet_reg_refine.weight": "bbox_refine.weight",
    "vfnet_reg_refine.bias": "bbox_refine.bias",
    "vfnet_cls_dconv.weight": "cls_star.weight",
    "vfnet_cls.weight": "cls_logits.weight",
    "vfnet_cls.bias": "cls_logits.bias",
}
# FCOSHead's predictors in MMDetection 1.x, which the oldest published checkpoints have.
EARLY = {
    "cls_convs.0.gn.bias": "cls_tower.0.norm.bias",
    "fcos_cls.weight": "cls_logits.weight",
    "fcos_reg.bias": "bbox_reg.bias",
    "fcos_centerness.weight": "bbox_ctrness.weight",
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


@pytest.mark.parametrize(
    "names", [HEAD, VFNET, EARLY, NECK, BACKBONE], ids=["fcos", "vfnet", "early", "neck", "backbone"]
)
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


@pytest.mark.parametrize("name", ["scales", "scales_refine"])
@pytest.mark.parametrize(("theirs", "ours"), [("", ""), ("bbox_head.", "head.")])
def test_scales_are_stacked_in_level_order(theirs: str, ours: str, name: str) -> None:
    state = {f"{theirs}{name}.{level}.scale": torch.tensor(level / 4) for level in (4, 0, 2, 1, 3)}
    renamed = from_mmdet(state)
    assert list(renamed) == [f"{ours}{name}"]
    assert renamed[f"{ours}{name}"].tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]


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
        (["neck.fpn_convs.0.conv.bias", "conv_cls.bias"], "the key conv_cls.bias is none of"),
        (["conv1.weight", "fpn_convs.0.conv.bias"], "the key fpn_convs.0.conv.bias is none of"),
        (["conv_cls.bias", "vfnet_cls.bias"], "conv_cls.bias and vfnet_cls.bias are two names of one tensor"),
        (["conv_cls.bias", "fcos_cls.bias"], "conv_cls.bias and fcos_cls.bias are two names of one tensor"),
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


def test_the_reference_vfnet_head_is_converted_whole(golden) -> None:
    theirs = golden("head_vfnet_s3", "state/")
    ours = from_mmdet(theirs)
    assert len(ours) == len(theirs) - 8  # two times five scales become one tensor each
    for name in ("scales", "scales_refine"):
        assert torch.equal(ours[name], torch.stack([theirs[f"{name}.{level}.scale"] for level in range(5)]))


# A name of each kind; torchvision counts a tower's ReLUs, so that convolution i is 3 i and its norm 3 i + 1.
TORCHVISION = {
    "backbone.body.conv1.weight": "backbone.conv1.weight",
    "backbone.body.layer4.2.bn3.running_var": "backbone.layer4.2.bn3.running_var",
    "backbone.body.layer2.0.downsample.0.weight": "backbone.layer2.0.downsample.0.weight",
    "backbone.fpn.inner_blocks.1.0.weight": "fpn.lateral_convs.1.weight",
    "backbone.fpn.inner_blocks.2.bias": "fpn.lateral_convs.2.bias",  # up to 0.12
    "backbone.fpn.layer_blocks.0.0.bias": "fpn.fpn_convs.0.bias",
    "backbone.fpn.extra_blocks.p6.weight": "fpn.fpn_convs.3.weight",
    "backbone.fpn.extra_blocks.p7.bias": "fpn.fpn_convs.4.bias",
    "head.classification_head.conv.0.weight": "head.cls_tower.0.conv.weight",
    "head.classification_head.conv.10.bias": "head.cls_tower.3.norm.bias",
    "head.regression_head.conv.3.bias": "head.reg_tower.1.conv.bias",
    "head.regression_head.conv.7.weight": "head.reg_tower.2.norm.weight",
    "head.classification_head.cls_logits.weight": "head.cls_logits.weight",
    "head.regression_head.bbox_reg.bias": "head.bbox_reg.bias",
    "head.regression_head.bbox_ctrness.weight": "head.bbox_ctrness.weight",
}


# RetinaNet's layers are a Sequential each, in v2 with a norm; up to 0.12 they lay side by side, with the ReLUs between.
RETINANET = {
    "head.classification_head.conv.2.0.weight": "head.cls_tower.2.conv.weight",
    "head.regression_head.conv.3.1.bias": "head.reg_tower.3.norm.bias",
    "head.regression_head.bbox_reg.bias": "head.bbox_reg.bias",
}
EARLY_RETINANET = {
    "backbone.fpn.layer_blocks.1.weight": "fpn.fpn_convs.1.weight",
    "head.classification_head.conv.2.weight": "head.cls_tower.1.conv.weight",
    "head.regression_head.conv.4.bias": "head.reg_tower.2.conv.bias",
    "head.regression_head.conv.6.weight": "head.reg_tower.3.conv.weight",
}


def test_torchvisions_keys() -> None:
    state = numbered(list(TORCHVISION))
    renamed = from_torchvision(state)
    assert renamed.pop("head.scales").tolist() == [1.0] * 5
    assert renamed == {TORCHVISION[key]: value for key, value in state.items()}


@pytest.mark.parametrize("names", [RETINANET, EARLY_RETINANET], ids=["retinanet", "early retinanet"])
def test_torchvisions_keys_of_retinanet(names: dict[str, str]) -> None:
    state = numbered(list(names))
    assert from_torchvision(state) == {names[key]: value for key, value in state.items()}


def test_torchvisions_detector_is_converted_whole() -> None:
    with torch.device("meta"):
        state = fcos_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    counters = [key for key in state if key.endswith("num_batches_tracked")]
    renamed = from_torchvision(state)
    assert len(renamed) == len(state) - len(counters) + 1
    assert renamed["head.cls_logits.bias"].shape == (91,)


@pytest.mark.parametrize("key", ["head.classification_head.conv.5.weight", "backbone.conv1.weight", "rpn.head.bias"])
def test_what_is_not_torchvisions_is_named(key: str) -> None:
    for others in ([], list(TORCHVISION), list(RETINANET)):
        with pytest.raises(WeightsError, match=f"the key {key} is none of torchvision's"):
            from_torchvision(numbered([*others, key]))


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


@pytest.mark.parametrize("prefix", ["", "detector."])
def test_safetensors_files_load(prefix: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({prefix + key: value for key, value in STATE.items()}, path, metadata={"made by": "a test"})
    loaded = load_state_dict_file(path)
    assert loaded.keys() == STATE.keys()
    assert all(torch.equal(loaded[key], value) for key, value in STATE.items())


@pytest.mark.parametrize("content", [b"", b"hello, this is no header", b"\x08\0\0\0\0\0\0\0{}      "])
def test_damaged_safetensors_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"weights\.safetensors (is not a weights file|holds no state dict)"):
        load_state_dict_file(path)


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
