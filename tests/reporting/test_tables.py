"""The table of a sweep in its three forms, line by line against what was written here by hand."""

from __future__ import annotations

import copy
import csv
import io
from pathlib import Path
from typing import Any

from msil.reporting.tables import Column, Table, result_line, sweep_table, to_csv, to_latex, to_markdown, to_text

from .cases import METRICS, as_in_the_paper, failed, result

APPLY, ALIGN = "model.msil.apply", "model.msil.align"


def sweep() -> list[dict[str, Any]]:
    return [
        result("a", model={"apply": "cls"}),
        result("b", model={"apply": "both", "align": False}, skipped=True, metrics={**METRICS, "AP": float("nan")}),
        failed("c", 1, [f"{APPLY}=reg", f"{ALIGN}=true"]),
        failed("d", -9, [f"{APPLY}=none", f"{ALIGN}=true"]),
        failed("e", 75, [f"{APPLY}=none", f"{ALIGN}=false"]),
        failed("f", None, [f"{APPLY}=none", f"{ALIGN}=false"], "waiting"),
    ]


def table(rows: list[dict[str, Any]] | None = None, *, name: str | None = None, varied: Any = (ALIGN, APPLY)) -> Table:
    return sweep_table(sweep() if rows is None else rows, varied=varied, table=name)


def body(text: str) -> list[list[str]]:
    """Cells of the text table's lines between the rules; two spaces part the columns."""
    lines = text.split("\n")
    rules = [i for i, line in enumerate(lines) if line.startswith("──")]
    assert len(rules) == 3
    picked = [lines[rules[0] + 1], *lines[rules[1] + 1 : rules[2]]]
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in picked]


def parsed(one: Table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(to_csv(one))))


# No run has an APs, so it has no column.
def test_text_by_hand() -> None:
    assert body(to_text(table())) == [
        ["align", "apply", "AP", "AP50", "AP75", "APm", "APl", "parameters", "FLOPs", "time", "state"],
        ["true", "cls", "42.0", "60.0", "40.0", "30.0", "50.0", "4.15 M", "2.35 G", "3m 35s", "ok"],
        ["false", "both", "-", "60.0", "40.0", "30.0", "50.0", "4.15 M", "2.35 G", "3m 35s", "skipped"],
        ["true", "reg", *8 * ["-"], "failed (exit 1)"],
        ["true", "none", *8 * ["-"], "failed (signal 9)"],
        ["false", "none", *8 * ["-"], "preempted (exit 75)"],
        ["false", "none", *8 * ["-"], "waiting"],
    ]


def test_markdown_shape() -> None:
    lines = to_markdown(table()).split("\n")
    bars = [line for line in lines if line.startswith("|")]
    assert len(bars) == 2 + 6
    assert {line.count("|") for line in bars} == {12}  # 11 columns
    assert bars[1] == "| :--- | :--- |" + 8 * " ---: |" + " :--- |"
    assert bars[2] == "| true | cls | 42.0 | 60.0 | 40.0 | 30.0 | 50.0 | 4.15 M | 2.35 G | 3m 35s | ok |"
    first = lines.index(bars[0])
    assert lines[first - 1] == "" and lines[first - 2] == lines[0] == table().caption  # else it is no table
    assert lines[first + 8] == "" and lines[first + 9].startswith("- ")


def test_hostile_texts_stay_texts_in_every_form() -> None:
    """A spreadsheet reads = + - @ as formulas (OWASP, CSV injection); LaTeX reads its own commands; a bar or a new line
    ends a Markdown cell."""
    names = ["=1+1", "@x", r"\input{a}$_^", "50 % & # ~ {}", "a|b\nc", 'd,"e"']
    columns = (Column("name", "name", str), Column("range", "range", str, parts=("", "_low")))
    one = Table("x", columns, tuple({"name": name, "range": (-0.1, None)} for name in names))
    assert [row["name"] for row in parsed(one)] == ["'=1+1", "'@x", *names[2:]]
    assert {(row["range"], row["range_low"]) for row in parsed(one)} == {("-0.1", "")}  # a number stays one
    assert [line for line in to_markdown(one).split("\n") if "a\\|b c" in line]
    text = to_latex(one)
    assert r"\textbackslash{}input\{a\}\$\_\textasciicircum{} &" in text
    assert r"50 \% \& \# \textasciitilde{} \{\} &" in text


def test_csv_parsed_back() -> None:
    rows = parsed(table())
    assert [row["run_name"] for row in rows] == ["a", "b", "c", "d", "e", "f"]
    assert [row[APPLY] for row in rows] == ["cls", "both", "reg", "none", "none", "none"]
    assert [row[ALIGN] for row in rows] == ["true", "false", "true", "true", "false", "false"]
    first = rows[0]
    assert float(first["AP"]) == 0.4205  # a fraction in full, not the rounded percent
    assert (first["APs"], rows[1]["AP"]) == ("", "")  # null and NaN
    assert (first["parameters"], first["trainable_parameters"], first["flops"]) == ("4150000", "4100000", "2345678901")
    assert (first["flops_image_size_height"], first["flops_image_size_width"]) == ("128", "128")
    assert (float(first["total_seconds"]), float(first["train_seconds"])) == (215.4, 200.0)
    assert (first["seed"], first["config_hash"], first["epochs"]) == ("0", "1a2b3c4d", "12")
    assert (first["train_images"], first["val_images"], float(first["images_per_second"])) == ("400", "100", 40.0)
    assert [row["exit_code"] for row in rows] == ["", "", "1", "-9", "75", ""]
    assert rows[2]["state"] == "failed (exit 1)" and rows[2]["AP"] == rows[2]["parameters"] == ""


def test_no_rows() -> None:
    empty = table([], varied=[])
    assert len(body(to_text(empty))) == 1
    assert parsed(empty) == []
    assert empty.notes[0] == "No runs."


def test_the_caption_says_on_what() -> None:
    caption = table().caption
    for part in (
        "shapes", "400 training and 100 validation images", "FCOS ResNet-10", "schedule quick (12 epochs)", "seed 0",
        "AP in percent",
    ):  # fmt: skip
        assert part in caption
    assert table(name="table2").caption.startswith("Our runs of the paper's Table 2")
    one = table([result(schedule={"epochs": 1})]).caption
    assert "(1 epoch)" in one
    tested = table([{**result(), "epochs": 0, "train_images": None}]).caption  # of mode=test
    assert "no training" in tested and "schedule" not in tested


def test_the_caption_names_the_data_by_its_folder_alone() -> None:
    caption = table([result(data={"name": "coco", "root": "/home/me/secret/coco128"})]).caption
    assert "coco (coco128)" in caption
    assert "secret" not in caption and "/home" not in caption
    rows = table([result(data={"name": "coco", "root": "/home/me/secret/coco128"})])
    assert "secret" not in to_markdown(rows) + to_csv(rows)


def test_the_papers_numbers_stand_beside_ours() -> None:
    rows = [as_in_the_paper(apply="cls"), as_in_the_paper(apply="none"), as_in_the_paper(apply="cls", head="fcos")]
    one = table(rows, name="table2", varied=[APPLY])
    # Table 2: cls 41.9 59.9 45.6, none 41.2 59.1 44.8; FCOS is not in it.
    assert [line[:7] for line in body(to_text(one))] == [
        ["apply", "AP", "paper AP", "AP50", "paper AP50", "AP75", "paper AP75"],
        ["cls", "42.0", "41.9", "60.0", "59.9", "40.0", "45.6"],
        ["none", "42.0", "41.2", "60.0", "59.1", "40.0", "44.8"],
        ["cls", "42.0", "-", "60.0", "-", "40.0", "-"],
    ]
    assert [(row["paper_AP"], row["paper_AP75"]) for row in parsed(one)] == [
        ("0.419", "0.456"), ("0.412", "0.448"), ("", ""),
    ]  # fmt: skip


def test_a_varied_group_shows_what_differs_in_it() -> None:
    rows = [result("a", model={"align": False}), result("b", model={"separate": False}), result("c")]
    lines = body(to_text(table(rows, varied=["model/msil"])))
    assert [line[:2] for line in lines] == [
        ["align", "separate"],
        ["false", "true"],
        ["true", "false"],
        ["true", "true"],
    ]
    rows = [result("a", model={"backbone": "resnet10"}), result("b", model={"backbone": "resnet18"})]
    rows.append(failed("c", 1, ["model/backbone=resnet50"]))
    assert [line[0] for line in body(to_text(table(rows, varied=["model/backbone"])))] == [
        "backbone", "resnet10", "resnet18", "resnet50",
    ]  # fmt: skip


def test_a_varied_seed_and_null() -> None:
    rows = [result("a"), result("b")]
    rows[1]["config"]["seed"] = rows[1]["seed"] = 1
    rows[1]["config"]["data"]["multiscale"] = [480, 960]
    rows[0]["config"]["data"]["multiscale"] = None
    one = table(rows, varied=["seed", "data.multiscale"])
    assert [line[:2] for line in body(to_text(one))] == [["seed", "multiscale"], ["0", "null"], ["1", "[480,960]"]]
    header = to_csv(one).split("\n")[0].split(",")
    assert len(header) == len(set(header))  # seed is not there twice
    assert [row["seed"] for row in parsed(one)] == ["0", "1"]


def test_the_line_of_a_single_run() -> None:
    scores, price, files = result_line(result()).split("\n")
    assert scores.split("   ")[0] == "AP 42.0  AP50 60.0  AP75 40.0  APs -  APm 30.0  APl 50.0"
    assert "percent" in scores and "100 validation images of shapes" in scores
    assert price == (
        "4.15 M parameters, 2.35 G FLOPs for one 128x128 image, 600 training steps in 3m 20s (3m 35s with evaluation)"
    )
    assert files == f"files in {Path('runs') / 'one'}"
    assert result_line(result(metrics={"AP": 0.5, "VOC_AP": 0.7})).startswith("AP 50.0  VOC AP 70.0 ")


def test_classes_of_the_users_own_are_shown_by_their_names() -> None:
    usual = {"block": None, "options": None}
    own = {"block": "package.module.MyBlock", "options": {"depth": 2}}
    found = [changed(result(), "msil", usual), changed(result(), "msil", own)]
    found.append(changed(changed(result(), "msil", usual), "head", {"name": "package.heads.Mine"}))
    found.append(failed("lost", 1, ["model.msil.block=package.module.MyBlock", "model/head=gfl"]))
    one = table(found, varied=["model.head.name", "model.msil.block"])
    assert [line[:2] for line in body(to_text(one))[1:]] == [
        ["fcos", "MSIL"], ["fcos", "MyBlock"], ["Mine", "MSIL"], ["gfl", "MyBlock"]
    ]  # fmt: skip
    assert parsed(one)[1]["model.msil.block"] == "package.module.MyBlock"  # as a command takes it


# As schedule=smoke: seconds, and no object large enough for an APl (or, here, small enough for an APs).
def test_six_heads_with_and_without_msil_fit_a_terminal() -> None:
    heads = ("fcos", "vfnet", "retinanet", "atss", "gfl", "tood")
    pairs = [(head, apply) for head in heads for apply in ("none", "both")]
    found = [result(model={"head": head, "apply": apply}, total_seconds=45.0) for head, apply in pairs]
    text = to_text(table(found, varied=["model/head", APPLY]))
    assert [tuple(line[:2]) for line in body(text)[1:]] == pairs
    assert max(map(len, text.splitlines())) <= 80
    assert "FCOS ResNet-10, VFNet ResNet-10, RetinaNet ResNet-10, ATSS" in table(found).caption


def changed(run: dict[str, Any], part: str, values: dict[str, Any]) -> dict[str, Any]:
    copied = copy.deepcopy(run)
    copied["config"]["model"][part] |= values
    return copied


# fcos and fcos_plain of conf/model/head have one name.
def test_heads_of_one_name_show_the_option_that_differs() -> None:
    heads = [{"name": "fcos", "num_convs": 4}, {"name": "fcos", "num_convs": 2}, {"name": "vfnet", "num_convs": 3}]
    lines = body(to_text(table([changed(result(), "head", head) for head in heads], varied=["model/head"])))
    assert [line[:2] for line in lines] == [["head", "num_convs"], ["fcos", "4"], ["fcos", "2"], ["vfnet", "3"]]
