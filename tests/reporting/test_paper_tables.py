"""The regenerated tables as text, Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io

from msil.reporting.paper import TABLES
from msil.reporting.paper_tables import Difference, Regenerated, difference_text, paper_table
from msil.reporting.regenerated import fill
from msil.reporting.report_tables import page_table
from msil.reporting.tables import Table, to_csv, to_latex, to_markdown, to_text

from .test_regenerated import run


def table2(seeds: int = 3) -> Table:
    plain = [run(seed, apply="none", ap=0.40 + seed / 100) for seed in range(seeds)]
    both = [run(seed, apply="both", ap=0.42) for seed in range(seeds)]
    return paper_table(fill(TABLES["table2"], [*plain, *both]), {3: Difference(0.01, -0.004, 0.0204, 1000)})


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


def test_one_seed_has_no_deviation_and_says_what_its_interval_lacks() -> None:
    assert cells(table2(seeds=1), 0)["AP ours"] == "40.0"
    assert any("With one seed" in note for note in table2(seeds=1).notes)
    assert not any("With one seed" in note for note in table2().notes)
    assert any("3 seeds are few" in note for note in table2().notes)


def test_a_missing_row_says_so_and_what_fills_it() -> None:
    missing = cells(table2(), 1)
    assert missing["seeds"] == "missing" and missing["AP ours"] == "-" and missing["AP paper"] == "41.9"
    assert any(note.startswith("Missing rows: python run.py experiment=table2 data=shapes") for note in table2().notes)


def test_quoted_rows_are_marked() -> None:
    table = paper_table(fill(TABLES["table3"], [run(head="fcos", backbone="resnet18")]), {})
    first, ours = cells(table, 0), cells(table, 21)
    assert first["row"].startswith("Faster R-CNN w/ FPN") and first["seeds"] == "quoted" and first["AP ours"] == ""
    assert ours["row"] == "FCOS+MSIL, ResNet-101" and ours["against"] == "FCOS, ResNet-101" and ours["seeds"] == "1"
    assert any("ResNet-18 stands in for ResNet-101" in note for note in table.notes)


# Neither our rows nor torchvision's have a number of the paper, in any form of the table.
def test_rows_of_ours_have_no_printed_number() -> None:
    runs = [run(head="gfl", backbone="resnet18", apply=apply) for apply in ("none", "both")]
    one = Regenerated(fill(TABLES["table3"], runs), {})
    place = next(i for i, row in enumerate(one.filled.rows) if row.paper.ours)
    ours = cells(one.table, place)
    assert ours["row"] == "GFL+MSIL (ours, not in the paper), ResNet-101" and ours["against"] == "GFL [26], ResNet-101"
    assert {ours[f"{name} paper"] for name in (*one.filled.paper.metrics, "ΔAP")} == {"-"}
    assert ours["AP ours"] == cells(one.table, place - 1)["AP ours"] == "40.0"
    line = list(csv.DictReader(io.StringIO(to_csv(one.table))))[place]
    assert line["paper_AP"] == line["paper_difference"] == "" and float(line["ours_AP"]) == 0.4
    assert "GFL+MSIL (ours, not in the paper), ResNet-101 & 1 & - & 40.0 & - &" in to_latex(one.table)
    assert not any(cell.detail for cell in page_table("id", one).rows[place].cells)  # "paper 42.1" elsewhere


def test_the_csv_has_every_number_in_full() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(table2()))))
    both = rows[3]
    assert float(both["paper_AP"]) == 0.421 and float(both["ours_AP"]) == 0.42 and float(both["ours_AP_std"]) == 0
    assert (float(both["difference"]), float(both["difference_low"]), float(both["difference_high"])) == (
        0.01, -0.004, 0.0204,
    )  # fmt: skip
    assert both["runs"].split() == [f"vfnet_resnet10_both_True_True_3_s{seed}" for seed in range(3)]
    assert rows[1]["ours_AP"] == "" and rows[1]["seeds"] == "missing"
    assert "difference_text" not in both


def test_signs_of_differences() -> None:
    assert difference_text(Difference(-0.0004, -0.011, 0.01, 100)) == "0.0 [-1.1, +1.0]"


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


def test_the_text_for_a_terminal_holds_the_same() -> None:
    text = to_text(table2())
    assert "41.0 ± 1.0" in text and "+1.0 [-0.4, +2.0]" in text and text.startswith("Table 2. Feature enhancement")
