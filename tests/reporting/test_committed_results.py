"""The tables under results/ are those of the runs beside them: made again, they are the same."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from statistics import mean, stdev

import pytest

from msil.reporting.evidence import Evidence
from msil.reporting.report import setting_tables, write_tables
from msil.reporting.sweep_table import result_line
from msil.reporting.tables import interval
from msil.runs import read_results

RESULTS = Path(__file__).resolve().parents[2] / "results"
PAGE, README = RESULTS.parent / "docs" / "results.md", RESULTS.parent / "README.md"


@pytest.mark.parametrize(
    ("name", "tables"), [("shapes", "*"), ("bccd", "*"), pytest.param("hosts", "hosts", marks=pytest.mark.slow)]
)
def test_the_tables_come_from_the_runs(name: str, tables: str, tmp_path: Path) -> None:
    write_tables(tmp_path, setting_tables(read_results(RESULTS / name / "runs"), Evidence()))
    made = sorted(tmp_path.glob(f"{tables}.*"))
    assert len(made) == (6 * 3 if tables == "*" else 3)
    for path in made:
        committed = RESULTS / name / path.name
        if path.suffix == ".csv":  # in full precision, of which another processor may give other last digits
            assert [[numbers(cell) for cell in row] for row in rows(path)] == [
                [pytest.approx(numbers(cell), abs=1e-9) for cell in row] for row in rows(committed)
            ], path.name
        else:
            assert path.read_bytes() == committed.read_bytes(), path.name


# Without their detections, which are too large to be committed: all but the intervals.
@pytest.mark.parametrize(
    "table", ["voc2007/table5", "voc2007-256/hosts", "voc2007-256/table5", "voc2007-256/slow-start/table5"]
)
def test_the_tables_of_voc_2007_come_from_the_runs(table: str, tmp_path: Path) -> None:
    path = RESULTS / f"{table}.csv"
    write_tables(tmp_path, setting_tables(read_results(path.parent / "runs"), Evidence()))
    made, committed = (rows(one) for one in (tmp_path / path.name, path))
    kept = [i for i, title in enumerate(committed[0]) if not title.startswith("difference")]
    assert len(made) == len(committed) and made[0] == committed[0]
    for row, other in zip(made, committed, strict=True):
        assert [numbers(row[i]) for i in kept] == [pytest.approx(numbers(other[i]), abs=1e-9) for i in kept]


def rows(path: Path) -> list[list[str]]:
    return list(csv.reader(path.open(encoding="utf-8", newline="")))


def numbers(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell


# The page's tables are columns of committed ones, cell for cell under their titles.
def test_the_page_of_results_shows_the_committed_tables() -> None:
    committed = [one for path in sorted(RESULTS.glob("**/*.md")) for one in tables(path)]
    shown = [one for one in tables(PAGE) if {"row", "seeds"} <= set(one[0])]
    assert [len(one) for one in shown] == [3, 3, 4, 2, 2, 4, 5, 6, 4]  # hosts, Tables 1, 2, 4, hosts, Table 5 of four
    for one in shown:
        titles = list(one[0])
        assert any([{title: row.get(title) for title in titles} for row in other] == one for other in committed), one


def test_the_readme_shows_rows_of_the_committed_tables() -> None:
    folders = {"shapes": "hosts", "VOC 2007": "voc2007-256"}
    (shown,) = (one for one in tables(README) if "set" in one[0])
    for row in shown:
        (committed,) = tables(RESULTS / folders[row.pop("set")] / "hosts.md")
        assert any(row.items() <= other.items() for other in committed), row


def test_the_default_run_over_seeds_and_as_the_readme_prints_it() -> None:
    (shown,) = read_results(RESULTS / "quickstart" / "runs")
    assert result_line(shown) in README.read_text(encoding="utf-8")
    runs = [run for run in read_results(RESULTS / "hosts" / "runs") if run["run_name"].startswith("def_")]
    scores = [100 * run["metrics"]["AP"] for run in sorted(runs, key=lambda run: run["seed"])]
    each = ", ".join(f"{score:.1f}" for score in scores)
    over = f"AP {mean(scores):.1f} ± {stdev(scores):.1f} over seeds 0 to {len(scores) - 1} ({each})"
    assert over in " ".join(PAGE.read_text(encoding="utf-8").split())


@pytest.mark.parametrize("name", ["shapes", "voc2007"])
def test_the_page_of_results_shows_the_trials(name: str) -> None:
    trials = list(csv.DictReader((RESULTS / "trials" / f"{name}.csv").open(encoding="utf-8")))
    shown = [one for one in tables(PAGE) if "change" in one[0] and len(one) == len(trials)]
    assert len(shown) == 1
    for row, trial in zip(shown[0], trials, strict=True):
        for title, cell in row.items():
            value = trial[title.replace(" ", "_")]
            if title.removeprefix("VOC ") in ("AP", "AP50", "AP75"):
                value = f"{100 * float(value):.1f}"
            assert cell.replace(",", "") == (value.replace(",", "") or "-"), (row, title)


def test_the_page_of_results_shows_the_energy_on_voc_2007() -> None:
    content = json.loads((RESULTS / "voc2007-256" / "energy.json").read_text(encoding="utf-8"))
    inside = {(row["tower"], row["level"]): row for row in content["rows"] if row["region"] == "inside"}
    (shown,) = (one for one in tables(PAGE) if "uniform" in one[0])
    assert len(shown) == 8
    for row in shown:
        tower, level = row["tower, level"].split(", ")
        energy = inside[tower[:3] if tower == "regression" else "cls", level]
        shares = [energy["uniform"], energy["plain"][0], energy["msil-both"][0]]
        assert [row["uniform"], row["plain"], row["MSIL"]] == [f"{100 * share:.1f}" for share in shares]
        assert row["MSIL - plain [95 %]"] == interval(energy["msil-both - plain"])


def test_the_page_of_results_shows_autotimm() -> None:
    lines = (RESULTS / "autotimm" / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    (shown,) = (one for one in tables(PAGE) if "detector" in one[0])
    for row, found in zip(shown, map(json.loads, lines), strict=True):
        assert row.pop("detector") == found["detector"]
        speed, memory = found["images a CPU second"], found["peak memory in GB"]
        shares = [f"{100 * found[name]:.1f}" for name in ("AP", "AP50")]
        assert list(row.values()) == [*shares, f"{speed:.1f}", f"{memory:.1f} GB"]


def tables(path: Path) -> list[list[dict[str, str]]]:
    """The Markdown tables of a file, each as its rows by column title."""
    found: list[list[list[str]]] = [[]]
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [[dict(zip(one[0], row, strict=True)) for row in one[2:]] for one in found if one]
