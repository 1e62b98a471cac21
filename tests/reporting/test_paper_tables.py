"""The regenerated tables: which runs fill which row, and all forms of a table, on made-up results."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import pytest

from msil.reporting.groups import settings
from msil.reporting.paper import TABLES
from msil.reporting.paper_tables import Difference, Filled, fill, fill_command, paper_table
from msil.reporting.tables import Table, to_csv, to_latex, to_markdown

from .cases import run


def table2(seeds: int = 3) -> Table:
    plain = [run(seed, apply="none", ap=0.40 + seed / 100) for seed in range(seeds)]
    both = [run(seed, apply="both", ap=0.42) for seed in range(seeds)]
    filled = fill(TABLES["table2"], [*plain, *both])
    return paper_table(replace(filled, differences={3: Difference(0.01, -0.004, 0.0204, 1000)}))


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
    assert any("against the row 'cls ✗, reg ✗'" in note for note in table2().notes)
    assert (both["parameters"], both["FLOPs"], both["images/s"]) == ("4.15 M", "2.35 G", "40.0")


def test_a_missing_row_says_so_and_what_fills_it() -> None:
    missing = cells(table2(), 1)
    assert missing["seeds"] == "missing" and missing["AP ours"] == "-" and missing["AP paper"] == "41.9"
    assert any(note.startswith("Missing rows: python run.py experiment=table2 data=shapes") for note in table2().notes)


# Neither our rows nor torchvision's have a number of the paper, in any form of the table.
def test_rows_of_ours_have_no_printed_number() -> None:
    runs = [run(head="gfl", backbone="resnet18", apply=apply) for apply in ("none", "both")]
    filled = fill(TABLES["table3"], runs)
    one = paper_table(filled)
    place = next(i for i, row in enumerate(filled.rows) if row.paper.ours)
    ours = cells(one, place)
    assert ours["row"] == "GFL+MSIL (ours, not in the paper), ResNet-101" and ours["against"] == "GFL [26], ResNet-101"
    assert {ours[f"{name} paper"] for name in (*filled.paper.metrics, "ΔAP")} == {"-"}
    assert ours["AP ours"] == cells(one, place - 1)["AP ours"] == "40.0"
    line = list(csv.DictReader(io.StringIO(to_csv(one))))[place]
    assert line["paper_AP"] == line["paper_difference"] == "" and float(line["ours_AP"]) == 0.4
    assert "GFL+MSIL (ours, not in the paper), ResNet-101 & 1 & - & 40.0 & - &" in to_latex(one)


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
    assert value == (pytest.approx(0.44), pytest.approx(0.0021**0.5))
    single = fill(TABLES["table1"], [run()]).rows[2].value("AP")
    assert single is not None and single.std is None
    assert rows[0].value("AP") is None and rows[2].value("parameters").mean == 4_150_000  # type: ignore[union-attr]


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


def test_smaller_nets_stand_in_only_where_the_papers_are_missing() -> None:
    small = [run(backbone="resnet10"), run(backbone="resnet18")]
    assert [row.net for row in fill(TABLES["table4"], small).rows] == ["resnet10", "resnet18"]
    assert any("ResNet-10 stands in for ResNet-50" in note for note in paper_table(fill(TABLES["table4"], small)).notes)
    both = [*small, run(backbone="resnet50"), run(backbone="resnet101")]
    assert [row.net for row in fill(TABLES["table4"], both).rows] == ["resnet50", "resnet101"]
    assert not any("stands in" in note for note in paper_table(fill(TABLES["table4"], both)).notes)


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


def test_voc_ap_where_it_was_measured() -> None:
    voc = run(apply="none")
    assert fill(TABLES["table5"], [voc]).metric == {"VOC_AP": "AP50"}
    voc["metrics"]["VOC_AP"] = 0.6
    filled = fill(TABLES["table5"], [voc])
    assert filled.metric == {"VOC_AP": "VOC_AP"} and filled.rows[0].value("VOC_AP").mean == 0.6  # type: ignore[union-attr]


def test_notes_stand_under_the_table_that_they_touch() -> None:
    notes = {name: " ".join(paper_table(fill(table, [run()])).notes) for name, table in TABLES.items()}
    assert "WITHOUT MSIL" in notes["table4"] and "FGPL" in notes["table5"]
    assert "detections_test-dev2017_RUN_results.zip" in notes["table3"] and "quoted" in notes["table3"]
    assert all("NOT comparable" in note for name, note in notes.items() if name != "table3")  # no R101, nor R18


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
