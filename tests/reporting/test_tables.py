"""Tables in all their forms, and the table of a sweep, against what was written here by hand."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from msil.reporting.sweep_table import result_line, sweep_table
from msil.reporting.tables import Column, Table, to_csv, to_latex, to_markdown, to_text

from .cases import METRICS, failed, result

APPLY, ALIGN = "model.msil.apply", "model.msil.align"


def table() -> Table:
    rows = [
        result("a", model={"apply": "cls"}),
        result("b", model={"apply": "both", "align": False}, skipped=True, metrics={**METRICS, "AP": float("nan")}),
        failed("c", 1, apply="reg"),
        failed("d", -9, apply="none"),
        failed("e", 75, apply="none", align=False),
        failed("f", None, "waiting", apply="none", align=False),
    ]
    return sweep_table(rows, [ALIGN, APPLY])


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
    first = rows[0]
    assert float(first["AP"]) == 0.4205  # a fraction in full, not the rounded percent
    assert (first["APs"], rows[1]["AP"]) == ("", "")  # null and NaN
    assert (first["parameters"], first["trainable_parameters"], first["flops"]) == ("4150000", "4100000", "2345678901")
    assert (first["flops_image_size_height"], first["flops_image_size_width"]) == ("128", "128")
    assert [row["exit_code"] for row in rows] == ["", "", "1", "-9", "75", ""]
    assert rows[2]["state"] == "failed (exit 1)" and rows[2]["AP"] == rows[2]["parameters"] == ""


def test_no_rows() -> None:
    empty = sweep_table([], [])
    assert len(body(to_text(empty))) == 1 and parsed(empty) == []
    assert empty.notes[0] == "No runs."


def test_the_caption_says_on_what_and_names_the_data_by_its_folder_alone() -> None:
    caption = sweep_table([result(data={"name": "coco", "root": "/home/me/secret/coco128"})], []).caption
    for part in (
        "coco (coco128)", "400 training and 100 validation images", "FCOS ResNet-10", "schedule quick (12 epochs)",
        "seed 0", "AP in percent",
    ):  # fmt: skip
        assert part in caption
    assert "secret" not in caption and "/home" not in caption
    tested = sweep_table([{**result(), "epochs": 0, "train_images": None}], []).caption  # of mode=test
    assert "no training" in tested and "schedule" not in tested


def leading(rows: list[dict[str, Any]], *varied: str, columns: int = 2) -> list[list[str]]:
    return [line[:columns] for line in body(to_text(sweep_table(rows, varied)))]


def test_a_varied_group_shows_what_differs_in_it() -> None:
    rows = [result("a", model={"align": False}), result("b", model={"separate": False}), result("c")]
    assert leading(rows, "model/msil") == [
        ["align", "separate"],
        ["false", "true"],
        ["true", "false"],
        ["true", "true"],
    ]
    rows = [result(model={"backbone": "resnet10"}), failed("c", 1, backbone="resnet50")]
    assert leading(rows, "model/backbone", columns=1) == [["backbone"], ["resnet10"], ["resnet50"]]
    # fcos and fcos_plain of conf/model/head have one name: the option that differs tells them apart.
    rows = [result(model={"head": name}) for name in ("fcos", "fcos", "package.heads.Mine")]
    for row, convs in zip(rows, (4, 2, 3), strict=True):
        row["config"]["model"]["head"]["num_convs"] = convs
    assert leading(rows, "model/head") == [["head", "num_convs"], ["fcos", "4"], ["fcos", "2"], ["Mine", "3"]]


# msil report's table of all runs.
def test_runs_by_name_with_what_differs_between_them() -> None:
    torchvisions = result("b")
    torchvisions["config"]["model"] |= {"head": {}, "backbone": {}, "detector": "ssd300_vgg16"}
    one = sweep_table([result("a"), torchvisions], ["model/head", "model.detector", "seed"], caption="All")
    assert [line[:4] for line in body(to_text(one))] == [
        ["run", "AP", "head", "detector"], ["a", "42.0", "fcos", "-"], ["b", "42.0", "-", "ssd300_vgg16"],
    ]  # fmt: skip


def test_a_varied_seed_and_null() -> None:
    rows = [result("a"), result("b")]
    rows[1]["config"]["seed"] = rows[1]["seed"] = 1
    rows[1]["config"]["data"]["multiscale"] = [480, 960]
    rows[0]["config"]["data"]["multiscale"] = None
    varied = ["seed", "data.multiscale"]
    assert leading(rows, *varied) == [["seed", "multiscale"], ["0", "null"], ["1", "[480,960]"]]
    header = to_csv(sweep_table(rows, varied)).split("\n")[0].split(",")
    assert len(header) == len(set(header))  # seed is not there twice


def test_the_line_of_a_single_run() -> None:
    scores, where, price, took, files = result_line(result()).split("\n")
    assert scores == "AP 42.0  AP50 60.0  AP75 40.0  APs -  APm 30.0  APl 50.0"
    assert where == "percent, on 100 validation images of shapes"
    assert price == "4.15 M parameters, 2.35 G FLOPs for one 128x128 image"
    assert took == "600 training steps in 3m 20s (3m 35s with evaluation)"
    assert files == f"files in {Path('runs') / 'one'}"
    by_class = {f"c{i}": i / 100 for i in range(20)}
    voc = result(metrics={"AP": 0.4, "VOC_AP": 0.5}, per_class=by_class | {"c1": None})
    assert result_line(voc).split("\n")[2].startswith("VOC AP by class: c0 0.0, c1 -, c2 2.0, ")
    assert max(map(len, result_line(voc).split("\n"))) <= 80
    assert "by class" not in result_line(result(per_class=by_class | {"c20": 0.2}))


# As schedule=smoke: seconds, and no object large enough for an APl (or, here, small enough for an APs).
def test_six_heads_with_and_without_msil_fit_a_terminal() -> None:
    heads = ("fcos", "vfnet", "retinanet", "atss", "gfl", "tood")
    pairs = [(head, apply) for head in heads for apply in ("none", "both")]
    found = [result(model={"head": head, "apply": apply}, total_seconds=45.0) for head, apply in pairs]
    text = to_text(sweep_table(found, ["model/head", APPLY]))
    assert [tuple(line[:2]) for line in body(text)[1:]] == pairs
    assert max(map(len, text.splitlines())) <= 80
