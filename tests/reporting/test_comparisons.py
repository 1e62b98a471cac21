"""Runs sorted by detector and switches."""

from __future__ import annotations

import pytest

from msil.reporting.captions import detector_name
from msil.reporting.comparisons import detectors, line_label

from .test_regenerated import run


@pytest.mark.parametrize(
    ("switches", "label"),
    [
        ({"apply": "none", "align": False}, "plain"),
        ({}, "MSIL"),
        ({"apply": "cls"}, "MSIL cls"),
        ({"align": False}, "MSIL without alignment"),
        ({"apply": "reg", "separate": False, "kernel_size": 1}, "MSIL reg without separation kernel_size=1"),
    ],
)
def test_a_line_is_called_by_its_switches(switches: dict[str, object], label: str) -> None:
    assert line_label(run(**switches)) == label  # type: ignore[arg-type]


def test_heads_and_backbones_are_detectors_of_their_own() -> None:
    runs = [run(head=head, backbone=net) for head in ("fcos", "vfnet") for net in ("resnet10", "resnet18")]
    found = detectors([*runs, run(head="vfnet", apply="none")])
    assert [one.name for one in found] == ["VFNet ResNet-10", "FCOS ResNet-10", "FCOS ResNet-18", "VFNet ResNet-18"]
    assert [[line.label for line in one.lines] for one in found] == [["plain", "MSIL"], ["MSIL"], ["MSIL"], ["MSIL"]]


def test_a_pair_is_the_plain_detector_and_the_whole_block() -> None:
    (found,) = detectors([run(1), run(0), run(apply="cls"), run(apply="none"), run(align=False)])
    pair = found.pair()
    assert pair is not None and [line.label for line in pair] == ["plain", "MSIL"]
    assert [one["seed"] for one in pair[1].runs] == [0, 1]
    (lonely,) = detectors([run(apply="cls"), run(apply="none")])
    assert lonely.pair() is None


def test_a_head_is_called_by_the_title_that_its_run_has() -> None:
    own = run(head="package.heads.QFLHead", backbone="convnext_tiny")
    assert detector_name(own) == "QFLHead convnext_tiny"
    assert detector_name({**own, "head_title": "QFL"}) == "QFL convnext_tiny"
    assert detector_name(run(head="retinanet", backbone="resnet101")) == "RetinaNet ResNet-101"


# The original FCOS predicts distances in pixels (norm_on_bbox false); the improved one divides by the stride.
def test_both_forms_of_fcos_have_names_of_their_own() -> None:
    improved, original = run(head="fcos"), run(head="fcos")
    improved["config"]["model"]["head"]["norm_on_bbox"] = True
    original["config"]["model"]["head"]["norm_on_bbox"] = False
    assert detector_name(improved) == "FCOS ResNet-10"
    assert detector_name(original) == "FCOS (original form) ResNet-10"
