"""From settings to a detector: heads, backbones, blocks and torchvision's detectors, and what cannot be built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msil.checkpoints.assemble import check_model, detector_from_config, head_options
from msil.checkpoints.description import explicit
from msil.config import plain
from msil.detection import Detector
from msil.detection.heads import HEADS
from msil.detection.heads.fcos import FCOSHead
from msil.detection.torchvision_detector import TorchvisionDetector
from msil.errors import ConfigError
from msil.reporting.groups import net_name
from msil.runs import block_name, default_run_name, detector_names

from .cases import SMALL, composed

TINY = SMALL[:-1]  # without a switch of MSIL
HERE = __name__  # how a user's own module is named in the settings


class Block(nn.Module):
    def __init__(self, channels: int, scale: float = 0.5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)
        self.scale = scale

    def forward(self, cls_feat: Tensor, reg_feat: Tensor) -> tuple[Tensor, Tensor]:
        return cls_feat + self.scale * self.conv(reg_feat), reg_feat


class Narrow(Block):
    def forward(self, cls_feat: Tensor, reg_feat: Tensor) -> tuple[Tensor, Tensor]:
        return cls_feat[:, :1], reg_feat


class Pooling(Block):
    def forward(self, cls_feat: Tensor, reg_feat: Tensor) -> Any:
        return F.interpolate(F.avg_pool2d(cls_feat, 2), size=cls_feat.shape[-2:]), reg_feat


class InPlace(Block):
    def forward(self, cls_feat: Tensor, reg_feat: Tensor) -> Any:
        return cls_feat.add_(self.conv(reg_feat)), reg_feat


class Idle(Block):
    def forward(self, cls_feat: Tensor, reg_feat: Tensor) -> Any:
        return cls_feat * self.scale, reg_feat


class Own(FCOSHead):
    pass


def built(*overrides: str) -> Any:
    torch.manual_seed(0)
    return detector_from_config(composed(*TINY, *overrides).model, 3, 64, 96)


def test_a_block_of_ones_own_takes_the_place_of_msil() -> None:
    typed = (f"model.msil.block={HERE}.Block", "model.msil.options={scale: 0.25}")
    detector = built(*typed)
    block = detector.head.msil
    assert isinstance(block, Block) and block.scale == 0.25
    # everything else starts as in the plain detector of that seed
    plain_net = built("model.msil.apply=none").state_dict()
    state = detector.state_dict()
    assert {key for key in state if key not in plain_net} == {f"head.msil.conv.{name}" for name in ("weight", "bias")}
    assert all(torch.equal(state[key], value) for key, value in plain_net.items())
    values = plain(composed(*TINY, *typed))
    assert block_name(values["model"]["msil"]) == "Block" and "_Block_" in default_run_name(values)
    # the plain detector stays plain
    assert built(*typed, "model.msil.apply=none").head.msil is None


# He's std is sqrt(2 / fan in); of 16 * 16 * 9 draws the standard error is 1.5 %.
@pytest.mark.parametrize("fast", [True, False])
def test_the_block_of_a_run_starts_as_fast_as_its_head(fast: bool) -> None:
    std = (2 / (16 * 9)) ** 0.5 if fast else 0.01
    switch = f"model.head.fast_start={str(fast).lower()}"
    state = built(switch).state_dict()
    deeper = built(switch, "model/msil=deeper").state_dict()
    for weight in (state["head.msil.enc.0.weight"], deeper["head.msil.cls.0.0.weight"]):
        assert weight.std().item() == pytest.approx(std, rel=0.1)
    gate = state["head.msil.separate_cls.dec.bias"].sigmoid()
    torch.testing.assert_close(gate, torch.full_like(gate, 0.99 if fast else 0.5))


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ((f"model.msil.block={HERE}.Missing",), r"block=\S+Missing cannot be imported \(module .* no attribute"),
        (("model.msil.block=nowhere.Block",), r"block=nowhere.Block cannot be imported \(No module named 'nowhere'\)"),
        ((f"model.msil.block={HERE}.built",), r"block=\S+built must be a subclass of Module"),
        ((f"model.msil.block={HERE}.Narrow",), r"must return two features .*, not \[\(2, 1, 4, 6\)"),
        ((f"model.msil.block={HERE}.Pooling",), r"block=\S+Pooling .* it fails on two features \(2, 16, 1, 1\)"),
        ((f"model.msil.block={HERE}.InPlace",), r"block=\S+InPlace .* in their backward pass: .* inplace operation"),
        ((f"model.msil.block={HERE}.Idle",), r"block=\S+Idle: its parameter conv.weight gets no gradient"),
        ((f"model.msil.block={HERE}.Block", "model.msil.options={depth: 2}"), r"Block with 16 channels: .*depth"),
        ((f"model.msil.block={HERE}.Block", "model.msil.apply=cls"), r"model.msil.apply=cls is a switch of MSIL"),
        (("model.msil.options={scale: 1}",), r"model.msil.options are the arguments of model.msil.block"),
    ],
)
def test_a_block_that_cannot_be_used_is_one_sentence(typed: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_model(composed(*TINY, *typed).model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("head", "values", "message"),
    [
        ("fcos", {"num_convs": "two"}, r"model.head.num_convs=two must be a whole number\."),
        ("fcos", {"num_convs": 0}, r"model.head.num_convs=0 must be at least 1\."),
        ("fcos", {"strides": [8, "x"]}, r"model.head.strides=x must be a whole number\."),
        ("gfl", {"loss_bbox": "giou"}, r"model.head.loss_bbox=giou has no meaning for model.head.name=gfl\."),
        ("yolo", {}, r"model.head.name: unknown head 'yolo'; known: "),
    ],
)
def test_a_heads_setting_is_checked_by_its_options(head: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        head_options({"name": head, **values})


def test_settings_of_earlier_files_are_understood() -> None:
    """They had null for every setting of another head."""
    options = head_options({"name": "vfnet", "num_convs": 3, "norm_groups": 32, "init": "authors", "loss_bbox": None})
    assert options == HEADS["vfnet"].Options()


def test_a_head_of_ones_own_by_its_class() -> None:
    model = composed(*TINY).model
    model.head["name"] = f"{HERE}.Own"
    detector = detector_from_config(model, 3, 64, 96)
    assert isinstance(detector, Detector) and type(detector.head) is Own
    model.head["name"] = f"{HERE}.Block"
    with pytest.raises(ConfigError, match=r"model.head.name=\S+Block must be a subclass of DenseHead"):
        check_model(model)


class Net(nn.Module):
    out_channels = (8, 8, 8)
    image_mean = (1.0, 2.0, 3.0)

    def __init__(self, side: int = 3, norm: str = "bn", weights: str | None = "DEFAULT") -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, side, padding=side // 2)
        self.given = (side, norm, weights)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.conv(images)[..., ::stride, ::stride] for stride in (8, 16, 32)]


def test_a_backbone_of_ones_own_by_its_class() -> None:
    model = composed(*TINY, f"model.backbone.name={HERE}.Net").model  # beside it stand resnet10's settings
    net: Any = detector_from_config(model, 3, 64, 96).backbone
    assert net.given == (3, "bn", None)  # null is the class's own, but of weights, where it is none
    model.backbone |= {"side": 5, "weights": "IMAGENET"}
    model.image_mean = None
    detector: Any = detector_from_config(model, 3, 64, 96)
    assert detector.backbone.given == (5, "bn", "IMAGENET") and detector.image_mean.tolist() == [1, 2, 3]
    assert explicit(model.backbone)["weights"] is None
    values = plain(model)
    assert detector_names(values) == ["fcos", "Net"] and net_name(f"{HERE}.Net") == "Net"
    assert detector_names(values | {"backbone": {"name": "a_net.in1k"}}) == ["fcos", "a_net.in1k"]  # timm's tag


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        (
            "resnet11",
            {},
            r"name=resnet11 must be one of resnet10, .*, or package\.module\.Class .*backbone=timm",
        ),
        ("nowhere.Net", {}, r"model\.backbone\.name=nowhere\.Net cannot be imported"),
        (f"{HERE}.built", {}, r"built must be a subclass of Module"),
        (f"{HERE}.Net", {"width": 2}, r"Net: got an unexpected keyword argument 'width'"),
    ],
)
def test_a_backbone_that_cannot_be_used_is_one_sentence(name: str, more: dict[str, Any], message: str) -> None:
    model = composed(*TINY).model
    model.backbone |= {"name": name, **more}
    with pytest.raises(ConfigError, match=message):
        check_model(model)


def test_a_module_that_is_no_backbone_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"name=\S+Block: missing a required argument: 'channels'"):
        built(f"model.backbone.name={HERE}.Block")
    with pytest.raises(ConfigError, match=r"model\.backbone\.name=torch\.nn\.Identity: Identity is no backbone"):
        built("model.backbone.name=torch.nn.Identity")


def test_torchvisions_detectors_by_name() -> None:
    config = composed("model=torchvision", "model.detector=ssdlite320_mobilenet_v3_large", "model.score_thresh=0.3")
    detector = detector_from_config(config.model, 3, 64, 96)
    assert isinstance(detector, TorchvisionDetector) and detector.score_thresh == 0.3
    for typed, message in (
        ("model.detector=yolo", "model.detector=yolo is not a box detector of torchvision"),
        ("model.detector=ssd300_vgg16", "has no two towers: set model.msil.apply=none"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_model(composed("model=torchvision", typed, "model.msil.apply=both").model)


def test_a_net_of_timm_brings_its_mean() -> None:
    pytest.importorskip("timm", reason='needs pip install -e ".[timm]"')
    detector = built("model/backbone=timm", "model.backbone.name=tf_efficientnet_lite0")
    assert detector.image_mean.tolist() == detector.image_std.tolist() == [127.5] * 3  # of its published config
