"""Parameters and FLOPs, counted here by hand (2 FLOPs a multiply-add)."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from msil import build_detector
from msil.detection import Detector, FCOSHead, ResNetOptions
from msil.launch.processes import program
from msil.training.result import command, count_flops, count_parameters

PLAIN: dict[str, Any] = {
    "conv_bias": False, "center_sampling": False, "centerness_on_reg": False, "norm_on_bbox": False, "loss_bbox": "iou"
}  # fmt: skip
# 800 x 1344: 100*168 + 50*84 + 25*42 + 13*21 + 7*11 points of P3..P7.
POINTS = 16800 + 4200 + 1050 + 273 + 77


def r50(msil: dict[str, Any] | None) -> Detector:
    with torch.device("meta"):
        return build_detector(FCOSHead.Options(**PLAIN), ResNetOptions("resnet50", norm="frozen_bn"), 80, msil=msil)


@pytest.fixture(scope="module")
def plain() -> Detector:
    return r50(None)


@pytest.fixture(scope="module")
def plain_flops(plain: Detector) -> int:
    return count_flops(plain, (800, 1344))


def test_fcos_and_vfnet_r50_cost_what_is_published(plain: Detector, plain_flops: int) -> None:
    with torch.device("meta"):
        vfnet = build_detector("vfnet", ResNetOptions("resnet50", norm="frozen_bn"), 80, msil=None)
    assert [count_parameters(net) for net in (plain, vfnet)] == pytest.approx([32.2e6, 32.8e6], rel=0.01)
    assert [plain_flops, count_flops(vfnet, (800, 1344))] == pytest.approx([429.5e9, 456e9], rel=0.01)


# One 1x1 conv 256 -> 256 at every point is u = 2 * 256^2 * 22400 FLOPs. Eq. 3 works on both branches: f_enc k^2 u,
# f_enc2 k^2 u and f_conv u, twice each. Eq. 4: 512 -> 256, 2 k^2 u. Eq. 5: f_dec k^2 u, for two branches. k = 3 makes
# 2 (9 + 9 + 1) + 18 + 18 = 74 u = 217.3 G (with f_conv 3x3 too it would be 90 u, the +264 G of other readings); k = 1
# makes 2 * 3 + 2 + 2 = 10 u = 29.4 G. Eq. 6: an MLP 256 -> 16 -> 256 on two pooled vectors, 2 branches, 5 levels.
@pytest.mark.parametrize(("kernel_size", "units"), [(3, 74), (1, 10)])
def test_what_msil_adds(plain: Detector, plain_flops: int, kernel_size: int, units: int) -> None:
    msil = r50({"align": True, "separate": True, "apply": "both", "kernel_size": kernel_size})
    attention = 2 * (256 * 16 + 16 * 256) * 2 * 2 * 5
    assert count_flops(msil, (800, 1344)) - plain_flops == units * 2 * 256**2 * POINTS + attention
    # The same convs once: f_enc, f_enc2 and f_fusion have a norm (weight and bias), f_conv and both f_dec a bias.
    k2 = kernel_size**2
    convs = (k2 + k2 + 1 + 2 * k2 + 2 * k2) * 256**2
    expected = convs + 3 * 2 * 256 + 3 * 256 + 2 * (256 * 16 + 16 * 256)
    assert count_parameters(msil) - count_parameters(plain) == expected


def test_the_command_is_what_a_user_would_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/x/bin/msil", "data.classes=[a,b c]", "hydra.mode=RUN"])
    assert command() == "msil train 'data.classes=[a,b c]'"
    assert program() == [sys.executable, "/x/bin/msil", "train"]
    monkeypatch.setattr("sys.argv", ["/x/msil/cli.py", "seed=1"])  # python -m msil.cli train seed=1
    assert command() == "msil train seed=1"
    assert program() == [sys.executable, "-m", "msil.cli", "train"]
    monkeypatch.setattr("sys.argv", ["/x/run.py", "seed=1"])
    assert command() == "python run.py seed=1"
    assert program() == [sys.executable, "/x/run.py"]
