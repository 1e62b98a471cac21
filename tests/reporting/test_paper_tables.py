"""The paper's tables against numbers typed here from its text; which runs fill which row, and all forms of a table, on
made-up results."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import pytest

from msil.reporting.filling import Filled, fill, fill_command
from msil.reporting.groups import departures, line_names, settings
from msil.reporting.paper import HOSTS, TABLES
from msil.reporting.paper_tables import paper_table
from msil.reporting.tables import Table, to_csv, to_latex, to_markdown

from .cases import as_in_the_paper, result, run

# (table, head, backbone, align, separate, apply) -> the printed numbers, typed from the paper.
PRINTED = {
    ("table1", "vfnet", "resnet50", False, True, "both"): "41.7 59.6 45.2",
    ("table1", "vfnet", "resnet50", True, False, "both"): "41.9 59.8 45.3",
    ("table1", "vfnet", "resnet50", True, True, "both"): "42.1 59.9 46.0",
    ("table2", "vfnet", "resnet50", True, True, "none"): "41.2 59.1 44.8",
    ("table2", "vfnet", "resnet50", True, True, "cls"): "41.9 59.9 45.6",
    ("table2", "vfnet", "resnet50", True, True, "reg"): "40.9 58.9 44.1",
    ("table2", "vfnet", "resnet50", True, True, "both"): "42.1 59.9 46.0",
    ("table3", "retinanet", "resnet101", True, True, "none"): "39.1 59.1 42.3 21.8 42.7 50.2",
    ("table3", "atss", "resnet101", True, True, "none"): "43.6 62.1 47.4 26.1 47.0 53.6",
    ("table3", "gfl", "resnet101", True, True, "none"): "45.0 63.7 48.9 27.2 48.8 54.5",
    ("table3", "tood", "resnet101", True, True, "none"): "46.7 64.6 50.7 28.9 49.6 57.0",
    ("table3", "fcos", "resnet101", True, True, "none"): "41.5 60.7 45.0 24.4 44.8 51.6",
    ("table3", "fcos", "resnet101", True, True, "both"): "42.5 61.7 46.1 25.7 45.8 53.5",
    ("table3", "vfnet", "resnet101", True, True, "none"): "46.5 64.8 50.5 27.8 50.1 56.9",
    ("table3", "vfnet", "resnet101", True, True, "both"): "47.1 65.4 51.2 28.6 50.7 58.4",
    ("table4", "vfnet", "resnet50", True, True, "both"): "41.2 59.1 44.8",
    ("table4", "vfnet", "resnet101", True, True, "both"): "43.6 61.5 47.5",
    ("table5", "vfnet", "resnet50", True, True, "none"): "65.3",
    ("table5", "vfnet", "resnet50", True, True, "both"): "66.4",
    ("table5", "fcos", "resnet50", True, True, "none"): "71.0",
    ("table5", "fcos", "resnet50", True, True, "both"): "71.8",
}


def test_printed_numbers() -> None:
    for (table, *chosen), numbers in PRINTED.items():
        rows = [row for row in TABLES[table].rows if not row.ours]
        (row,) = [row for row in rows if [row.head, row.backbone, row.align, row.separate, row.apply] == chosen]
        assert row.values == tuple(map(float, numbers.split()))
    rows = [row for table in TABLES.values() for row in table.rows if not row.ours]
    assert len([row for row in rows if row.head is not None]) == len(PRINTED) == 21
    assert len(rows) - 17 == 20  # of Table 3, "20 more rows quoted from other papers", four of them trained here too


def test_all_numbers_are_plausible() -> None:
    """AP50 is the largest of the three and AP lies between; the area ranges rise: a typing slip breaks one of them."""
    for table in TABLES.values():
        for row in table.rows:
            if len(row.values) >= 3:
                ap, ap50, ap75 = row.values[:3]
                assert ap < ap75 < ap50, row
            if len(row.values) == 6:
                small, medium, large = row.values[3:]
                assert small < row.values[0] < large and small < medium < large, row


def test_a_run_by_the_recipe_departs_in_nothing() -> None:
    for table in ("table1", "table2", "table4"):
        assert departures(as_in_the_paper(), TABLES[table].recipe) == []
    (note,) = [note for note in paper_table(fill(TABLES["table2"], [as_in_the_paper()])).notes if "numbers: " in note]
    assert "do not differ" in note and "NOT" not in note
    voc = result(
        model={"backbone": "resnet50", "weights": "/w/resnet50.pth"},
        data={"name": "voc", "root": "d", "min_size": 600, "max_size": 1000}, schedule={"name": "2x", "epochs": 24},
        train_images=5_717, val_images=5_823,
    )  # fmt: skip
    voc["config"]["model"]["channels"] = 256
    assert departures(voc, TABLES["table5"].recipe) == []
    assert departures({**voc, "train_images": 5_000}, TABLES["table5"].recipe) == ["5000 training images"]


# The paper's 12 epochs, which the first run has, are no difference; the second run's 3 are.
def test_every_departure_is_named() -> None:
    notes = paper_table(fill(TABLES["table2"], [run(), run(1, epochs=3)])).notes
    (note,) = [note for note in notes if "NOT comparable" in note]
    named = set(note.partition("NOT comparable with ours: ")[2].rstrip(".").split(", "))
    assert named == {
        "shapes data", "400 training images", "100 validation images", "64 channels", "128-pixel images",
        "no ImageNet weights", "3 epochs",
    }  # fmt: skip


def table2(seeds: int = 3) -> Table:
    plain = [run(seed, apply="none", ap=0.40 + seed / 100) for seed in range(seeds)]
    both = [run(seed, apply="both", ap=0.42) for seed in range(seeds)]
    filled = fill(TABLES["table2"], [*plain, *both])
    return paper_table(replace(filled, differences={3: (0.01, -0.004, 0.0204)}))


def cells(table: Table, row: int) -> dict[str, str]:
    lines = [line for line in to_markdown(table).splitlines() if line.startswith("|")]
    names, chosen = ([cell.strip() for cell in lines[i].strip("|").split("|")] for i in (0, row + 2))
    return dict(zip(names, chosen, strict=True))


# Plain: 0.40, 0.41, 0.42: mean 0.41, deviations -0.01, 0, 0.01: std sqrt(0.0002 / 2) = 0.01.
def test_the_papers_number_ours_and_the_difference_stand_side_by_side() -> None:
    plain, both = cells(table2(), 0), cells(table2(), 3)
    assert plain["AP paper"] == "41.2" and plain["AP ours"] == "41.0 ± 1.0" and plain["seeds"] == "3"
    assert plain["ΔAP ours [95 %]"] == "-"
    assert both["AP ours"] == "42.0 ± 0.0" and both["AP paper"] == "42.1"
    assert both["ΔAP ours [95 %]"] == "+1.0 [-0.4, +2.0]"
    assert both["ΔAP paper"] == "+0.9"  # 42.1 - 41.2
    assert both["against"] == "cls ✗, reg ✗" and plain["against"] == "-"
    assert (both["parameters"], both["FLOPs"], both["images/s"]) == ("4.15 M", "2.35 G", "40.0")


def test_a_missing_row_says_so_and_what_fills_it() -> None:
    missing = cells(table2(), 1)
    assert missing["seeds"] == "missing" and missing["AP ours"] == "-" and missing["AP paper"] == "41.9"
    assert any(note.startswith("Missing rows: python run.py experiment=table2 data=shapes") for note in table2().notes)


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


def test_the_csv_has_every_number_in_full() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(table2()))))
    both = rows[3]
    assert float(both["paper_AP"]) == 0.421 and float(both["ours_AP"]) == 0.42 and float(both["ours_AP_std"]) == 0
    assert (float(both["difference"]), float(both["difference_low"]), float(both["difference_high"])) == (
        0.01, -0.004, 0.0204,
    )  # fmt: skip
    assert both["runs"].split() == [f"vfnet_resnet10_both_True_True_3_s{seed}" for seed in range(3)]
    assert rows[1]["ours_AP"] == "" and rows[1]["seeds"] == "missing"


# Column count: & separates, so a row of n columns has n - 1 that are not escaped.
def test_latex_is_whole_and_escaped() -> None:
    table = table2()
    text = to_latex(table)
    columns = sum(column.shown for column in table.columns)
    body = text.partition("\\midrule\n")[2].partition("\\bottomrule")[0].splitlines()
    assert len(body) == 4
    assert all(line.replace("\\&", "").count("&") == columns - 1 and line.endswith(r" \\") for line in body)
    assert text.count("\\begin") == text.count("\\end") == 2
    assert "\\caption{The paper's Table 2. Feature" in text  # LaTeX puts its own number before it
    assert "95 \\%" in text and "$\\checkmark$" in text and "$\\pm$" in text and "✓" not in text


def by_label(filled: Filled) -> dict[str, list[str]]:
    return {filled.label(row): [str(one["run_name"]) for one in row.runs] for row in filled.rows if not row.quoted}


def test_each_run_stands_in_the_row_of_its_switches() -> None:
    rows = [run(apply="none"), run(apply="cls"), run(), run(align=False)]
    assert by_label(fill(TABLES["table1"], rows)) == {
        "w/o semantic alignment": ["vfnet_resnet10_both_False_True_3_s0"],
        "w/o semantic separation": [],
        "baseline": ["vfnet_resnet10_both_True_True_3_s0"],
    }
    assert by_label(fill(TABLES["table2"], rows)) == {
        "cls ✗, reg ✗": ["vfnet_resnet10_none_True_True_3_s0"],
        "cls ✓, reg ✗": ["vfnet_resnet10_cls_True_True_3_s0"],
        "cls ✗, reg ✓": [],
        "cls ✓, reg ✓": ["vfnet_resnet10_both_True_True_3_s0"],
    }


# 0.40, 0.43, 0.49: mean 1.32 / 3 = 0.44; deviations -0.04, -0.01, 0.05: squares 0.0016 + 0.0001 + 0.0025 = 0.0042,
# over n - 1 = 2 is 0.0021, root 0.045826.
def test_mean_and_sample_deviation_over_seeds() -> None:
    rows = fill(TABLES["table1"], [run(2, ap=0.49), run(0, ap=0.40), run(1, ap=0.43)]).rows
    assert rows[2].seeds == (0, 1, 2) and rows[0].value("AP") is None
    assert rows[2].value("AP") == (pytest.approx(0.44), pytest.approx(0.0021**0.5))
    assert fill(TABLES["table1"], [run()]).rows[2].value("AP") == (0.4, None)


# Without the block its other switches describe nothing.
def test_other_kernels_make_a_row_of_their_own_where_there_is_a_block() -> None:
    row = fill(TABLES["table2"], [run(0, apply="none", align=False), run(1, apply="none", kernel_size=1)]).rows[0]
    assert row.seeds == (0, 1) and row.extra == ""
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


# Table 3 prints FCOS and VFNet, plain and with MSIL, and of the other heads the plain ones alone.
def test_rows_that_the_paper_lacks_stand_where_a_run_fills_them() -> None:
    usual = [run(head=head, backbone="resnet18", apply="none") for head in ("retinanet", "atss", "gfl", "tood")]
    usual += [
        run(head=head, backbone="resnet18", apply=apply) for head in ("fcos", "vfnet") for apply in ("none", "both")
    ]
    complete = fill(TABLES["table3"], usual)
    assert complete.command is None and not any(row.paper.ours for row in complete.rows)
    ssd = run(1, apply="none")
    ssd["config"]["model"] |= {"head": {}, "backbone": {}, "detector": "ssd300_vgg16", "detector_weights": "imagenet"}
    (group,) = settings([*usual, ssd, run(head="tood", backbone="resnet18")])
    filled = fill(TABLES["table3"], group)
    ours = {filled.label(row): row for row in filled.rows if row.paper.ours}
    tood = "TOOD+MSIL (ours, not in the paper), ResNet-101"
    assert list(ours) == ["SSD300 (torchvision's stand-in), VGG-16", tood]
    against = filled.compared(ours[tood])
    assert against is not None and filled.label(against) == "TOOD [6], ResNet-101" and against.runs == (usual[3],)
    place = filled.rows.index(ours[tood])
    assert {cells(paper_table(filled), place)[f"{name} paper"] for name in (*filled.paper.metrics, "ΔAP")} == {"-"}


def test_smaller_nets_stand_in_only_where_the_papers_are_missing() -> None:
    small = [run(backbone="resnet10"), run(backbone="resnet18")]
    assert [row.net for row in fill(TABLES["table4"], small).rows] == ["resnet10", "resnet18"]
    assert any("ResNet-10 for ResNet-50" in note for note in paper_table(fill(TABLES["table4"], small)).notes)
    both = [*small, run(backbone="resnet50"), run(backbone="resnet101")]
    assert [row.net for row in fill(TABLES["table4"], both).rows] == ["resnet50", "resnet101"]
    assert not any("Stand-ins" in note for note in paper_table(fill(TABLES["table4"], both)).notes)


def test_rows_are_compared_as_the_paper_does() -> None:
    everything = [run(head=head, apply=apply) for head in ("fcos", "vfnet") for apply in ("none", "cls", "reg", "both")]
    everything += [run(align=False), run(separate=False)]
    pairs = {}
    for name in ("table1", "table3"):
        filled = fill(TABLES[name], everything)
        pairs[name] = {filled.label(row): filled.label(other) for row in filled.rows if (other := filled.compared(row))}
    assert pairs["table1"] == dict.fromkeys(["w/o semantic alignment", "w/o semantic separation"], "baseline")
    assert pairs["table3"] == {f"{head}+MSIL, ResNet-101": f"{head}, ResNet-101" for head in ("FCOS", "VFNet")}


def test_voc_ap_where_it_was_measured() -> None:
    voc = run(apply="none")
    assert fill(TABLES["table5"], [voc]).metric == {"VOC_AP": "AP50"}
    voc["metrics"]["VOC_AP"] = 0.6
    assert fill(TABLES["table5"], [voc]).metric == {"VOC_AP": "VOC_AP"}


def test_rows_that_differ_in_an_option_of_the_head_are_not_averaged_over() -> None:
    runs = [
        run(seed, options={"num_convs": n}, apply=apply) for seed, n in enumerate((3, 2)) for apply in ("none", "both")
    ]
    filled = fill(TABLES["table2"], runs)
    plain, both = "cls ✗, reg ✗, num_convs=", "cls ✓, reg ✓, num_convs="
    labels = [filled.label(row) for row in filled.rows if row.runs]
    assert labels == [f"{plain}2", f"{plain}3", f"{both}2", f"{both}3"]
    against = {filled.label(row): filled.label(other) for row in filled.rows if (other := filled.compared(row))}
    assert (against[f"{both}2"], against[f"{both}3"]) == (f"{plain}2", f"{plain}3")


def test_what_the_price_of_msil_buys_elsewhere_stands_beside_its_gain() -> None:
    wide, deep = run(apply="none"), run(apply="none", options={"num_convs": 4})
    wide["config"]["model"]["channels"] = 96
    group = [run(apply="none"), run(), deep, wide, run(kernel_size=1)]
    assert settings(group) == [group]
    filled = fill(TABLES["table2"], group)
    labels = [filled.label(row) for row in filled.rows if row.runs]
    plain, both = "cls ✗, reg ✗", "cls ✓, reg ✓"
    assert labels[0] == plain and labels[3:] == [both, f"{both}, kernel_size=1"]
    assert {label.partition("reg ✗, ")[2] for label in labels[1:3]} == {"num_convs=4", "channels=96"}
    rows = [row for row in filled.rows if row.runs]
    assert all(filled.compared(row) is rows[0] for row in rows[1:])
    assert [row.paper.value(0) for row in rows[:3]] == [41.2, None, None]
    assert cells(paper_table(filled), 1)["against"] == plain
    assert "64 channels" in filled.setting and "96" not in filled.setting


# Of plain VFNet only the wider one ran: it is not the row that MSIL is compared with.
def test_a_wider_detector_alone_does_not_take_the_place_of_the_plain_one() -> None:
    wide = run(apply="none")
    wide["config"]["model"]["channels"] = 96
    filled = fill(TABLES["table2"], [wide, run(apply="both"), run(1, apply="both")])
    plain, wider = filled.rows[:2]
    assert not plain.runs and filled.label(wider).endswith("channels=96") and wider.runs == (wide,)
    both = next(row for row in filled.rows if row.paper.apply == "both")
    assert filled.compared(both) is plain and filled.compared(wider) is plain
    assert line_names([wide, run(apply="both"), run(1, apply="both")])[0] == "VFNet ResNet-10 96 channels plain"


def test_one_net_of_another_kind_takes_the_place_of_a_tables_one_net() -> None:
    group = [run(backbone="convnext_tiny", apply=apply) for apply in ("none", "both")]
    filled = fill(TABLES["table2"], group)
    assert [row.net for row in filled.rows if row.runs] == ["convnext_tiny"] * 2
    for one, words in zip(group, ("model.msil.apply=none seed=0", "seed=0"), strict=True):
        net = "model/backbone=timm model.backbone.name=convnext_tiny model.head.num_convs=2"
        one["command"] = f"python run.py model/head=vfnet {net} {words}"
    command = fill(TABLES["table2"], group).command
    assert command == f"python run.py experiment=table2 data=shapes schedule=quick {net}"
    assert not [row for row in fill(TABLES["table4"], group).rows if row.runs]  # which of its two nets would it be?


# The paper has no such table, so nothing of it is shown; what a block costs stands beside it in the same head.
def test_each_head_is_compared_with_itself_in_the_table_of_hosts() -> None:
    group = [run(head=head, apply=apply) for head in ("vfnet", "tood", "gfl") for apply in ("none", "both")]
    deep, wide = run(head="gfl"), run(head="gfl", apply="none")
    deep["config"]["model"]["msil"] |= {"block": "msil.interaction.Deeper", "options": {"convs": 4}}
    wide["config"]["model"]["channels"] = 96
    filled = fill(HOSTS, [*group, deep, wide, run(head="gfl", kernel_size=1)])
    assert compared(filled) == {
        "GFL": "", "GFL, channels=96": "GFL", "GFL+MSIL": "GFL", "GFL+MSIL, kernel_size=1": "GFL",
        "GFL+Deeper convs=4": "GFL", "TOOD": "", "TOOD+MSIL": "TOOD", "VFNet": "", "VFNet+MSIL": "VFNet",
    }  # fmt: skip
    table = paper_table(filled)
    titles = [column.title for column in table.shown]
    assert titles == ["row", "net", "seeds", "AP", "AP50", "ΔAP [95 %]", "against", "parameters", "FLOPs", "images/s"]
    assert not any(word in note for note in table.notes for word in ("paper's numbers", "Missing", "Stand-ins"))


def compared(filled: Filled) -> dict[str, str]:
    """The rows with runs and, where there is one, the row that each is compared with."""
    rows = [row for row in filled.rows if row.runs]
    return {filled.label(row): filled.label(other) if (other := filled.compared(row)) else "" for row in rows}


# Depth, width or other weights are no gain of MSIL's: such rows say what they differ in, and have no difference.
def test_rows_that_differ_in_more_than_the_block_are_not_compared() -> None:
    plain, both = "cls ✗, reg ✗", "cls ✓, reg ✓"
    deep = [run(apply="none", options={"num_convs": 2}), run(options={"num_convs": 4})]
    assert compared(fill(TABLES["table2"], deep)) == {plain: "", f"{both}, num_convs=4": ""}
    scratch = [run(apply="none"), run()]
    scratch[0]["config"]["model"]["backbone"]["weights"] = "imagenet"
    assert compared(fill(TABLES["table2"], scratch)) == {plain: "", f"{both}, weights=null": ""}
    own = run()
    own["config"]["model"]["msil"] |= {"block": "msil.interaction.Deeper", "options": {"convs": 4}}
    own["config"]["model"]["channels"] = 96
    found = compared(fill(TABLES["table2"], [run(apply="none"), run(1, apply="none"), own]))
    assert found == {plain: "", f"{both}, Deeper convs=4, channels=96": ""}


def test_msil_of_another_width_is_compared_with_the_plain_detector_of_that_width() -> None:
    group = [run(seed, apply=apply) for seed in (0, 1) for apply in ("none", "both")]
    wide = [run(2, apply=apply) for apply in ("none", "both")]
    for one in wide:
        one["config"]["model"]["channels"] = 96
    filled, plain, both = fill(TABLES["table2"], [*wide, *group]), "cls ✗, reg ✗", "cls ✓, reg ✓"
    assert compared(filled) == {
        plain: "", f"{plain}, channels=96": plain, both: plain, f"{both}, channels=96": f"{plain}, channels=96",
    }  # fmt: skip
    assert [row.paper.ours for row in filled.rows if row.runs] == [False, True, False, True]


# Of TOOD and GFL none has the usual width: neither is a variant of itself.
def test_a_head_of_another_width_alone_has_nothing_to_be_compared_with() -> None:
    group = [run(head=head, apply=apply) for head in ("fcos", "vfnet") for apply in ("none", "both")]
    wide = [run(head="tood", apply="none"), run(head="gfl")]
    for one in wide:
        one["config"]["model"]["channels"] = 96
    found = compared(fill(HOSTS, [*group, *wide]))
    assert found.items() >= {"TOOD, channels=96": "", "GFL+MSIL, channels=96": "", "FCOS+MSIL": "FCOS"}.items()


# By schedule=transfer the net is ResNet-18, the stand-in of a net that this table does not have.
def test_each_head_stands_in_the_table_of_hosts_with_the_net_it_ran_on() -> None:
    heads = ("fcos", "vfnet", "gfl")
    group = [run(head=head, backbone="resnet18", apply=apply) for head in heads for apply in ("none", "both")]
    assert {row.net for row in fill(HOSTS, group).rows if row.runs} == {"resnet18"}
    rows = fill(HOSTS, [*group, run(head="tood", backbone="resnet50")]).rows
    assert len([row for row in rows if row.runs]) == 7
