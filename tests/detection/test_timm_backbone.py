"""TimmBackbone against timm's own classifiers."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

timm = pytest.importorskip("timm", reason='needs timm: pip install -e ".[timm]" -c constraints.txt')

from msil.detection.folding import FoldedConv2d  # noqa: E402
from msil.detection.preprocess import IMAGENET_MEAN, IMAGENET_STD  # noqa: E402
from msil.detection.timm_backbone import TimmBackbone  # noqa: E402
from msil.errors import ConfigError, WeightsError  # noqa: E402


def intermediates(classifier: nn.Module, images: Tensor, indices: list[int]) -> list[Tensor]:
    """timm's own feature maps of a whole classifier, NCHW."""
    with torch.no_grad():
        return classifier.eval().forward_intermediates(  # pyright: ignore[reportCallIssue]
            images, indices=indices, output_fmt="NCHW", intermediates_only=True
        )


def with_statistics(net: nn.Module) -> nn.Module:
    """The net with norms whose statistics are neither 0 nor 1."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)  # pyright: ignore[reportOptionalMemberAccess]
            module.running_var.uniform_(0.5, 2)  # pyright: ignore[reportOptionalMemberAccess]
    return net


@pytest.mark.parametrize(
    ("name", "indices", "size"),
    [
        ("test_convnext", [1, 2, 3], (64, 96)),  # whose stages features_only renames, stages.0 to stages_0
        ("mobilenetv3_small_050", [2, 3, 4], (64, 96)),  # conv_head and classifier behind the last map
        ("test_mambaout", [1, 2, 3], (64, 96)),  # NHWC
    ],
)
def test_maps_of_a_classifiers_file_are_timms(
    name: str, indices: list[int], size: tuple[int, int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    classifier = with_statistics(timm.create_model(name))
    torch.save(classifier.state_dict(), tmp_path / "net.pth")
    net = TimmBackbone(name, weights=tmp_path / "net.pth").eval()
    (tmp_path / "net.pth").unlink()
    images = torch.randn(1, 3, *size)
    expected = intermediates(classifier, images, indices)
    assert net.out_channels == [level.shape[1] for level in expected]
    with torch.no_grad():
        for level, reference in zip(net(images), expected, strict=True):
            torch.testing.assert_close(level, reference, rtol=1e-5, atol=1e-5 * float(reference.abs().max()))


@pytest.mark.parametrize(
    ("name", "folded", "norms"),
    [
        ("tf_efficientnet_lite0", 48, 48),  # whose strided convolutions pad by the input's size
        ("mixnet_s", 14, 48),  # most norms take several convolutions' outputs, concatenated
        ("test_resnet", 15, 15),  # whose outputs two layers take, behind the norm
    ],
)
def test_folded_norms_change_neither_maps_nor_gradients(name: str, folded: int, norms: int) -> None:
    """Of the same net with its norms as timm computes them."""
    torch.manual_seed(0)
    theirs = with_statistics(TimmBackbone(name, norm="eval_bn")).double()
    ours = TimmBackbone(name, norm="frozen_bn").double()
    ours.load_state_dict(theirs.state_dict())
    found = [module for module in ours.modules() if isinstance(module, FoldedConv2d)]
    assert (len(found), sum(isinstance(m, nn.BatchNorm2d) for m in theirs.modules())) == (folded, norms)
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    trained = [key for key, parameter in ours.named_parameters() if parameter.requires_grad]
    results = []
    for net in (ours, theirs):
        maps = net(images)
        loss = torch.stack([level.square().mean() for level in maps]).sum()
        results.append([*maps, *torch.autograd.grad(loss, [net.get_parameter(key) for key in trained])])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11 * float(other.detach().abs().max()))


HALF = (127.5, 127.5, 127.5)  # 0..255 to -1..1


@pytest.mark.parametrize(
    ("name", "channels", "mean", "std"),
    [
        ("tf_efficientnet_lite0", [40, 112, 320], HALF, HALF),
        ("xception41", [728, 1024, 2048], HALF, HALF),  # by forward hooks
        ("swin_tiny_patch4_window7_224", [192, 384, 768], IMAGENET_MEAN, IMAGENET_STD),
    ],
)
def test_levels_have_strides_8_16_32_for_any_multiple_of_32(
    name: str, channels: list[int], mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    with torch.device("meta"):
        net = TimmBackbone(name)
        out = net(torch.zeros(2, 3, 160, 96))
    assert net.out_channels == channels
    assert [tuple(level.shape) for level in out] == [
        (2, c, 160 // s, 96 // s) for c, s in zip(channels, (8, 16, 32), strict=True)
    ]
    assert (net.image_mean, net.image_std) == (mean, std)


def test_a_training_step_reaches_every_trained_parameter() -> None:
    net = TimmBackbone("mobilenetv3_small_050", frozen_stages=1).train()
    torch.stack([level.square().mean() for level in net(torch.randn(2, 3, 64, 64))]).sum().backward()
    assert [key for key, p in net.named_parameters() if (p.grad is not None) != p.requires_grad] == []
    assert 0 < sum(not p.requires_grad for p in net.parameters()) < len(list(net.parameters())) / 2


def test_what_no_level_depends_on_is_not_trained() -> None:
    """HRNet has four branches: what its last stage adds to the first, of stride 4, is for the map of stride 4 alone."""
    with torch.device("meta"):
        net = TimmBackbone("hrnet_w18_small")
    fixed = {key for key, p in net.named_parameters() if not p.requires_grad}
    assert fixed
    assert fixed == {
        key for key, _ in net.named_parameters() if "incre_modules.0." in key or "stage4.0.fuse_layers.0." in key
    }


@pytest.mark.parametrize("stages", [0, 2, 4])
def test_frozen_stages_are_those_of_a_resnet(stages: int) -> None:
    with torch.device("meta"):
        net = TimmBackbone("resnet18d", frozen_stages=stages, norm="bn").eval().train()
    parts = [("conv1", "bn1", "layer1"), ("layer2",), ("layer3",), ("layer4",)]
    frozen = tuple(f"net.{name}." for part in parts[:stages] for name in part)
    assert {k for k, p in net.named_parameters() if not p.requires_grad} == {
        k for k, _ in net.named_parameters() if k.startswith(frozen)
    }
    norms = {key: m.training for key, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert len(norms) == 22
    assert all(training != f"{key}.".startswith(frozen) for key, training in norms.items())


def test_defaults_with_weights(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_efficientnet", num_classes=7).state_dict(), tmp_path / "net.pth")
    net = TimmBackbone("test_efficientnet", weights=tmp_path / "net.pth")
    assert not any(m.training for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    trained = {key for key, p in net.named_parameters() if p.requires_grad}
    early = ("net.conv_stem.", "net.blocks.0.", "net.blocks.1.")  # blocks 0 and 1 end at strides 2 and 4
    assert trained == {
        key for key, _ in net.named_parameters() if not key.startswith(early) and not re.search(r"bn\d\.", key)
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnext50_32x4"}, r"name=resnext50_32x4 is not a net of timm .*; the nearest: resnext50_32x4d, "),
        ({"name": "pit_b_224"}, r"has maps of stride 7, 14, 28, and a detector needs 8, 16 and 32"),
        ({"name": "coatnet_0_224"}, r"coatnet_0_224 gives no feature maps for images of any size \(.*\): choose"),
        ({"name": "inception_v3"}, r"\(288, 9, 17\).* for an image of 96 x 160 pixels"),
        (
            {"name": "convnext_atto", "norm": "frozen_bn"},
            r"norm=frozen_bn is for nets with BatchNorm, and convnext_atto",
        ),
    ],
)
def test_nets_that_cannot_be_backbones_are_refused(arguments: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=message) as caught:
        TimmBackbone(**arguments)
    assert "\n" not in str(caught.value)


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r'model/backbone=timm needs timm \(.*pip install -e "\.\[timm\]" -c'):
        TimmBackbone("convnext_atto")


def test_weights_of_another_net_are_named(tmp_path: Path) -> None:
    """The file of a deeper net has all that the net needs, and more."""
    state = timm.create_model("test_convnext").state_dict()
    torch.save({**state, "stages.0.blocks.9.gamma": torch.zeros(24)}, tmp_path / "more.pth")
    torch.save({key: value for key, value in state.items() if "blocks.0.gamma" not in key}, tmp_path / "less.pth")
    for name, message in (("more", r"has the unknown stages\.0\.blocks\.9"), ("less", r"lacks .*blocks\.0\.gamma")):
        with pytest.raises(WeightsError, match=f"does not fit timm's test_convnext: it {message}"):
            TimmBackbone("test_convnext", weights=tmp_path / f"{name}.pth")


def test_imagenet_without_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it tries again for most of a minute
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError) as caught:
        TimmBackbone("convnext_atto", weights="imagenet")
    message = str(caught.value)
    assert "weights=<path> to model.safetensors of https://huggingface.co/timm/convnext_atto.d2_in1k" in message
    assert "\n" not in message
