"""Which runs fill which row of which table, on made-up results."""

from __future__ import annotations

from typing import Any

import pytest

from msil.reporting.paper import TABLES
from msil.reporting.regenerated import Filled, fill, fill_command, settings

from .cases import result


def run(
    seed: int = 0, *, head: str = "vfnet", backbone: str = "resnet10", apply: str = "both", align: bool = True,
    separate: bool = True, ap: float = 0.4, kernel_size: int = 3, **changes: Any,
) -> dict[str, Any]:  # fmt: skip
    block = {"apply": apply, "align": align, "separate": separate, "kernel_size": kernel_size}
    name = f"{head}_{backbone}_{apply}_{align}_{separate}_{kernel_size}_s{seed}"
    found = result(name, model={"head": head, "backbone": backbone, **block}, metrics={"AP": ap, "AP50": 2 * ap})
    found["config"]["seed"] = found["seed"] = seed
    return {**found, **changes}


def by_label(filled: Filled) -> dict[str, list[str]]:
    return {filled.label(row): [str(one["run_name"]) for one in row.runs] for row in filled.rows if not row.quoted}


def test_each_run_stands_in_the_row_of_its_switches() -> None:
    rows = [run(apply="none"), run(apply="cls"), run(), run(align=False), run(separate=False)]
    assert by_label(fill(TABLES["table1"], rows)) == {
        "w/o semantic alignment": ["vfnet_resnet10_both_False_True_3_s0"],
        "w/o semantic separation": ["vfnet_resnet10_both_True_False_3_s0"],
        "baseline": ["vfnet_resnet10_both_True_True_3_s0"],
    }
    assert by_label(fill(TABLES["table2"], rows)) == {
        "cls ✗, reg ✗": ["vfnet_resnet10_none_True_True_3_s0"],
        "cls ✓, reg ✗": ["vfnet_resnet10_cls_True_True_3_s0"],
        "cls ✗, reg ✓": [],
        "cls ✓, reg ✓": ["vfnet_resnet10_both_True_True_3_s0"],
    }


# Without the block its other switches describe nothing.
def test_a_plain_run_is_plain_whatever_its_other_switches() -> None:
    row = fill(TABLES["table2"], [run(0, apply="none", align=False), run(1, apply="none", kernel_size=1)]).rows[0]
    assert row.seeds == (0, 1) and row.extra == ""


# 0.40, 0.43, 0.49: mean 1.32 / 3 = 0.44; deviations -0.04, -0.01, 0.05: squares 0.0016 + 0.0001 + 0.0025 = 0.0042,
# over n - 1 = 2 is 0.0021, root 0.045826.
def test_mean_and_sample_deviation_over_seeds() -> None:
    rows = fill(TABLES["table1"], [run(2, ap=0.49), run(0, ap=0.40), run(1, ap=0.43)]).rows
    value = rows[2].value("AP")
    assert value is not None and rows[2].seeds == (0, 1, 2)
    assert (value.mean, value.std, value.count) == (pytest.approx(0.44), pytest.approx(0.0021**0.5), 3)
    single = fill(TABLES["table1"], [run()]).rows[2].value("AP")
    assert single is not None and single.std is None
    assert rows[0].value("AP") is None and rows[2].value("parameters").mean == 4_150_000  # type: ignore[union-attr]


def test_the_same_seed_counts_once() -> None:
    twice = [run(0, run_name="b"), run(0, run_name="a")]
    (row,) = [row for row in fill(TABLES["table1"], twice).rows if row.runs]
    assert [one["run_name"] for one in row.runs] == ["a"]


def test_other_kernels_make_a_row_of_their_own() -> None:
    filled = fill(TABLES["table2"], [run(apply="none"), run(), run(kernel_size=1)])
    assert list(by_label(filled))[-2:] == ["cls ✓, reg ✓", "cls ✓, reg ✓, kernel_size=1"]
    assert all(filled.compared(row) is filled.rows[0] for row in filled.rows[1:])


# The paper has MSIL alone, so its numbers stand beside no other block.
def test_a_block_of_the_users_own_has_a_row_below_the_printed_one() -> None:
    own = run()
    own["config"]["model"]["msil"] |= {"block": "package.MyBlock", "options": {"depth": 2}}
    filled = fill(TABLES["table2"], [run(apply="none"), own])
    assert list(by_label(filled))[-2:] == ["cls ✓, reg ✓", "cls ✓, reg ✓, MyBlock depth=2"]
    printed, other = filled.rows[-2:]
    assert (printed.runs, printed.paper.value(0), other.paper.value(0)) == ((), 42.1, None)
    assert other.runs == (own,) and filled.compared(other) is filled.rows[0]
    assert list(by_label(fill(TABLES["table5"], [own])))[2] == "VFNet+MyBlock depth=2, RestNet-50"
    assert [row.runs for row in fill(TABLES["table1"], [own, run()]).rows][2:] == [(run(),), (own,)]


# Table 3 prints FCOS and VFNet, plain and with MSIL, and of the other heads the plain ones alone.
def test_rows_that_the_paper_lacks_stand_where_a_run_fills_them() -> None:
    usual = [run(head=head, backbone="resnet18", apply="none") for head in ("retinanet", "atss", "gfl", "tood")]
    usual += [
        run(head=head, backbone="resnet18", apply=apply) for head in ("fcos", "vfnet") for apply in ("none", "both")
    ]
    complete = fill(TABLES["table3"], usual)
    assert list(by_label(complete)) == [
        "RetinaNet [28], ResNet-101", "ATSS [48], ResNet-101", "GFL [26], ResNet-101", "TOOD [6], ResNet-101",
        "FCOS, ResNet-101", "FCOS+MSIL, ResNet-101", "VFNet, ResNet-101", "VFNet+MSIL, ResNet-101",
    ]  # fmt: skip
    assert complete.command is None
    ssd = run(1, apply="none")
    ssd["config"]["model"] |= {"head": {}, "backbone": {}, "detector": "ssd300_vgg16", "detector_weights": "imagenet"}
    (group,) = settings([*usual, ssd, run(head="tood", backbone="resnet18")])
    filled = fill(TABLES["table3"], group)
    ours = {filled.label(row): row for row in filled.rows if row.paper.ours}
    assert list(ours) == ["SSD300 (torchvision's stand-in), VGG-16", "TOOD+MSIL (ours, not in the paper), ResNet-101"]
    against = filled.compared(ours["TOOD+MSIL (ours, not in the paper), ResNet-101"])
    assert against is not None and filled.label(against) == "TOOD [6], ResNet-101" and against.runs == (usual[3],)


def test_an_unnamed_difference_is_not_averaged_over() -> None:
    odd = run(1, run_name="odd")
    odd["config"]["model"]["head"]["num_convs"] = 2
    filled = fill(TABLES["table1"], [run(0, run_name="even"), odd])
    assert by_label(filled)["baseline"] == ["even"] and by_label(filled)["baseline, as odd"] == ["odd"]


def test_smaller_nets_stand_in_only_where_the_papers_are_missing() -> None:
    small = [run(backbone="resnet10"), run(backbone="resnet18")]
    assert [row.net for row in fill(TABLES["table4"], small).rows] == ["resnet10", "resnet18"]
    assert any("ResNet-10 stands in for ResNet-50" in note for note in fill(TABLES["table4"], small).notes)
    both = [*small, run(backbone="resnet50"), run(backbone="resnet101")]
    assert [row.net for row in fill(TABLES["table4"], both).rows] == ["resnet50", "resnet101"]
    assert not any("stands in" in note for note in fill(TABLES["table4"], both).notes)


def test_rows_are_compared_as_the_paper_does() -> None:
    everything = [run(head=head, apply=apply) for head in ("fcos", "vfnet") for apply in ("none", "cls", "reg", "both")]
    everything += [run(align=False), run(separate=False)]
    pairs = {}
    for name in ("table1", "table2", "table3", "table5"):
        filled = fill(TABLES[name], everything)
        pairs[name] = {filled.label(row): filled.label(other) for row in filled.rows if (other := filled.compared(row))}
    assert pairs["table1"] == dict.fromkeys(["w/o semantic alignment", "w/o semantic separation"], "baseline")
    assert pairs["table2"] == dict.fromkeys(["cls ✓, reg ✗", "cls ✗, reg ✓", "cls ✓, reg ✓"], "cls ✗, reg ✗")
    assert pairs["table3"] == {f"{head}+MSIL, ResNet-101": f"{head}, ResNet-101" for head in ("FCOS", "VFNet")}
    assert pairs["table5"] == {f"{head}+MSIL, RestNet-50": f"{head}, RestNet-50" for head in ("FCOS", "VFNet")}


def test_settings_part_what_must_not_stand_in_one_table() -> None:
    longer = run()
    longer["config"]["schedule"]["epochs"] = 24
    elsewhere = run(apply="none")
    elsewhere["config"]["runs_dir"] = "other"
    elsewhere["config"]["trainer"] = {"devices": 8}
    tested = run(apply="cls")
    tested["config"]["mode"] = "test"
    groups = settings([longer, run(), elsewhere, run(1), run(head="fcos"), tested])
    assert [len(group) for group in groups] == [4, 1]
    assert groups[1] == [longer]


def test_another_precision_is_another_setting() -> None:
    single, half = run(0), run(1)
    single["config"]["trainer"], half["config"]["trainer"] = {"precision": "32-true"}, {"precision": "bf16-mixed"}
    assert len(settings([single, half])) == 2


def test_runs_of_before_a_setting_existed_stand_beside_those_where_it_is_null() -> None:
    older, newer, other = run(0), run(1), run(2)
    newer["config"]["resume"] = "auto"
    newer["config"]["schedule"]["ema"] = None
    other["config"]["schedule"]["ema"] = 0.99
    assert [len(group) for group in settings([older, newer, other])] == [2, 1]


# The head's own warm-up (vfnet 0.1, fcos 1/3 under 1x) must not part Table 3's rows.
def test_the_heads_own_warm_up_makes_no_other_setting() -> None:
    fcos, vfnet = run(head="fcos"), run()
    fcos["config"]["schedule"]["warmup_factor"], vfnet["config"]["schedule"]["warmup_factor"] = 1 / 3, 0.1
    assert len(settings([fcos, vfnet])) == 1


@pytest.mark.parametrize(
    ("command", "schedule", "seeds", "wanted"),
    [
        ("python run.py", "quick", [0], "experiment=table1 data=shapes schedule=quick"),
        (
            "python run.py model.msil.apply=cls experiment=table2 data=shapes seed=1 trainer=ddp data.flip=0",
            "quick",
            [0, 1],
            "experiment=table1 data=shapes schedule=quick data.flip=0 seed=0,1",
        ),
        ("python run.py model/head=vfnet 'data.root=/my data'", "1x", [0], "experiment=table1"),
    ],
)  # fmt: skip
def test_the_command_that_fills_what_is_missing(command: str, schedule: str, seeds: list[int], wanted: str) -> None:
    group = [run(seed, command=command) for seed in seeds]
    for one in group:
        one["config"]["schedule"]["name"] = schedule
    assert fill_command(TABLES["table1"], group) == f"python run.py {wanted}"
    assert fill_command(TABLES["table1"], []) == "python run.py experiment=table1"


def test_by_the_recipe_the_datas_place_is_kept() -> None:
    one = run(command="python run.py experiment=table2 'data.root=/my data'")
    one["config"]["data"]["name"], one["config"]["schedule"]["name"] = "coco", "1x"
    assert fill_command(TABLES["table1"], [one]) == "python run.py experiment=table1 'data.root=/my data'"
    assert fill_command(TABLES["table5"], [one]) == "python run.py experiment=table5"  # VOC lies elsewhere


def test_complete_tables_need_no_command() -> None:
    assert fill(TABLES["table4"], [run(backbone="resnet10"), run(backbone="resnet18")]).command is None
    assert fill(TABLES["table4"], [run()]).command is not None


def test_voc_ap_where_it_was_measured() -> None:
    voc = run(apply="none")
    assert fill(TABLES["table5"], [voc]).metric == {"VOC_AP": "AP50"}
    voc["metrics"]["VOC_AP"] = 0.6
    filled = fill(TABLES["table5"], [voc])
    assert filled.metric == {"VOC_AP": "VOC_AP"} and filled.rows[0].value("VOC_AP").mean == 0.6  # type: ignore[union-attr]


def test_notes_stand_under_the_table_that_they_touch() -> None:
    notes = {name: " ".join(fill(table, [run()]).notes) for name, table in TABLES.items()}
    assert "WITHOUT MSIL" in notes["table4"] and "FGPL" in notes["table5"]
    assert "detections_test-dev2017_RUN_results.zip" in notes["table3"] and "quoted" in notes["table3"]
    assert all("NOT comparable" in note for name, note in notes.items() if name != "table3")  # no R101, nor R18
