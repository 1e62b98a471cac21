"""Reading weight files and renaming MMDetection's and torchvision's keys."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from msil.detection.weights import from_mmdet, from_torchvision, load_state_dict_file
from msil.errors import WeightsError

DETECTOR = {
    "backbone.layer3.22.bn2.running_var": "backbone.layer3.22.bn2.running_var",
    "neck.lateral_convs.2.conv.bias": "fpn.lateral_convs.2.bias",
    "bbox_head.reg_convs.10.gn.bias": "head.reg_tower.10.norm.bias",
    "bbox_head.vfnet_reg_refine_dconv.weight": "head.reg_star.weight",
}
# FCOSHead's predictors in MMDetection 1.x, which the oldest published checkpoints have.
EARLY = {
    "cls_convs.0.gn.bias": "cls_tower.0.norm.bias",
    "fcos_cls.weight": "cls_logits.weight",
    "fcos_reg.bias": "bbox_reg.bias",
    "fcos_centerness.weight": "bbox_ctrness.weight",
}


def numbered(keys: list[str]) -> dict[str, Tensor]:
    return {key: torch.tensor([float(i)]) for i, key in enumerate(keys)}


@pytest.mark.parametrize("names", [DETECTOR, EARLY], ids=["detector", "early"])
def test_keys_of_mmdetection(names: dict[str, str]) -> None:
    """All keys of a published head, FPN and ResNet: test_golden_heads, test_fpn and test_backbone."""
    state = numbered(list(names))
    assert from_mmdet(state) == {names[key]: value for key, value in state.items()}


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
        (["neck.fpn_convs.0.conv.bias", "conv_cls.bias"], "the key conv_cls.bias is none of"),
        (["conv1.weight", "fpn_convs.0.conv.bias"], "the key fpn_convs.0.conv.bias is none of"),
        (["conv_cls.bias", "vfnet_cls.bias"], "conv_cls.bias and vfnet_cls.bias are two names of one tensor"),
    ],
)
def test_what_cannot_be_converted_is_named(keys: list[str], message: str) -> None:
    with pytest.raises(WeightsError, match=message.replace(".", r"\.")):
        from_mmdet(numbered(keys))


@pytest.mark.parametrize("key", ["head.classification_head.conv.5.weight", "backbone.conv1.weight", "rpn.head.bias"])
def test_what_is_not_torchvisions_is_named(key: str) -> None:
    """What is: checkpoints/test_parity."""
    with pytest.raises(WeightsError, match=f"the key {key} is none of torchvision's"):
        from_torchvision(numbered([key]))


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
    absent = tmp_path / "absent.pth"
    for path, words in (
        (absent, f"no weights file {absent}"),
        (tmp_path, rf"{tmp_path} is a folder without checkpoints/"),
    ):
        with pytest.raises(WeightsError, match=words):
            load_state_dict_file(path)
