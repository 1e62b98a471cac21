"""Which runs stand in one table, and names that tell runs apart, on made-up results."""

from __future__ import annotations

from msil.reporting.groups import block_label, detector_name, detectors, settings

from .cases import run


def test_a_line_is_called_by_its_block() -> None:
    assert block_label(run(apply="none", align=False)) == "plain"
    assert block_label(run()) == "MSIL"
    odd = run(apply="reg", align=False, separate=False, kernel_size=1)
    assert block_label(odd) == "MSIL reg without alignment without separation kernel_size=1"
    own = run()
    own["config"]["model"]["msil"] |= {"block": "package.module.MyBlock", "options": {"depth": 2}}
    assert block_label(own) == "MyBlock depth=2"


# The original FCOS predicts distances in pixels (norm_on_bbox false); the improved one divides by the stride.
def test_names_of_detectors() -> None:
    assert detector_name(run(head="retinanet", backbone="resnet101")) == "RetinaNet ResNet-101"
    assert detector_name(run(head="fcos", options={"norm_on_bbox": True})) == "FCOS ResNet-10"
    assert detector_name(run(head="fcos", options={"norm_on_bbox": False})) == "FCOS (original form) ResNet-10"
    own = run(head="package.heads.QFLHead", backbone="convnext_tiny")
    assert detector_name(own) == "QFLHead convnext_tiny"
    assert detector_name({**own, "head_title": "QFL"}) == "QFL convnext_tiny"
    torchvisions = run()
    torchvisions["config"]["model"] |= {"head": {}, "backbone": {}, "detector": "ssd300_vgg16"}
    assert detector_name(torchvisions) == "torchvision ssd300_vgg16"


def test_heads_that_differ_in_an_option_are_told_apart_by_it() -> None:
    runs = [run(apply=apply, options={"num_convs": n}) for n in (3, 2) for apply in ("none", "both")]
    found = detectors([*runs, run(head="fcos", options={"num_convs": 4})])
    assert [one.name for one in found] == [
        "VFNet ResNet-10, num_convs=2", "VFNet ResNet-10, num_convs=3", "FCOS ResNet-10"
    ]  # fmt: skip
    assert [len(line.runs) for line in found[0].lines] == [1, 1]


def test_a_pair_is_the_plain_detector_and_the_whole_block() -> None:
    (found,) = detectors([run(1), run(0), run(apply="cls"), run(apply="none"), run(align=False)])
    pair = found.pair()
    assert pair is not None and [line.label for line in pair] == ["plain", "MSIL"]
    assert [one["seed"] for one in pair[1].runs] == [0, 1]
    (lonely,) = detectors([run(apply="cls"), run(apply="none")])
    assert lonely.pair() is None


def test_settings_part_what_must_not_stand_in_one_table() -> None:
    longer, elsewhere, tested, half = run(), run(apply="none"), run(apply="cls"), run(2)
    parted = run(3)
    longer["config"]["schedule"]["epochs"] = 24
    elsewhere["config"] |= {"runs_dir": "other", "trainer": {"devices": 8}}
    tested["config"]["mode"] = "test"
    half["config"]["trainer"] = {"precision": "bf16-mixed"}
    parted["config"]["trainer"] = {"accumulate": 2}
    warm = run(head="fcos")  # its head's own warm-up
    warm["config"]["schedule"]["warmup_factor"] = 1 / 3
    groups = settings([longer, run(), elsewhere, run(1), warm, tested, half, parted])
    assert [len(group) for group in groups] == [4, 1, 1, 1]
    assert groups[1:] == [[longer], [half], [parted]]


def test_runs_of_before_a_setting_existed_stand_beside_those_where_it_is_null() -> None:
    older, newer, other = run(0), run(1), run(2)
    newer["config"]["schedule"]["ema"] = None
    other["config"]["schedule"]["ema"] = 0.99
    assert [len(group) for group in settings([older, newer, other])] == [2, 1]
