"""Which runs stand in one table, and names that tell runs apart, on made-up results."""

from __future__ import annotations

from typing import Any

from msil.reporting.groups import block_label, detector_name, detectors, settings
from msil.reporting.ranking import ranked

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
    assert [len(runs) for runs in found[0].lines.values()] == [1, 1]


def test_a_pair_is_the_plain_detector_and_the_whole_block() -> None:
    (found,) = detectors([run(1), run(0), run(apply="cls"), run(apply="none"), run(align=False)])
    assert list(found.lines)[:2] == ["plain", "MSIL"] and found.pair() == tuple(found.lines.values())[:2]
    assert [one["seed"] for one in found.lines["MSIL"]] == [0, 1]
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


def test_only_seeds_of_the_same_settings_are_one_line() -> None:
    """Also beside a run of another schedule, whose own warm-up goes without saying."""
    fast, slow, other = {"name": "quick", "lr": 0.004}, {"name": "quick", "lr": 0.002}, {"name": "smoke", "lr": 0.002}
    runs = []
    for seed, ap, schedule in ((0, 0.3, slow), (1, 0.4, slow), (1, 0.9, fast), (0, 0.5, other)):
        one = run(seed, ap=ap)
        one["config"]["schedule"] |= schedule | {"warmup_steps": 50 if schedule["name"] == "quick" else 5}
        runs.append(one)
    name = "VFNet ResNet-10 MSIL, schedule"
    assert seeds_of(runs) == {
        f"{name}=quick, lr=0.004": [1], f"{name}=smoke, lr=0.002": [0], f"{name}=quick, lr=0.002": [0, 1],
    }  # fmt: skip
    assert list(seeds_of(runs[:2] + runs[3:])) == [f"{name}=smoke", f"{name}=quick"]


def test_settings_of_the_block_part_lines_where_there_is_a_block() -> None:
    blocks = [run(0), run(0)]
    for one, package in zip(blocks, "ab", strict=True):
        one["config"]["model"]["msil"]["block"] = f"{package}.MyBlock"
    plain = [run(seed, apply="none", align=bool(seed)) for seed in (0, 1)]
    name = "VFNet ResNet-10"
    assert seeds_of([*plain, *blocks]) == {
        f"{name} plain": [0, 1], f"{name} MyBlock, block=a.MyBlock": [0], f"{name} MyBlock, block=b.MyBlock": [0],
    }  # fmt: skip


def test_runs_from_other_weights_are_other_lines() -> None:
    """By their content: one file may have two names, and two files one."""
    files = ((None, None), ("a/coco.pth", "1"), ("b/coco.pth", "2"), ("voc.pth", "3"), ("c.pth", "3"))
    runs = [run(seed) for seed in range(len(files))]
    for one, (path, digit) in zip(runs, files, strict=True):
        one["config"]["model"] |= {"weights": path, "weights_sha256": digit and 64 * digit}
    name = "VFNet ResNet-10 MSIL, weights"
    assert seeds_of(runs) == {
        f"{name}=null": [0], f"{name}=coco 11111111": [1], f"{name}=coco 22222222": [2], f"{name}=voc": [3, 4],
    }  # fmt: skip


def seeds_of(runs: list[dict[str, Any]]) -> dict[str, list[int]]:
    return {name: [one["seed"] for one in own] for name, own in ranked(runs)[0].items()}
