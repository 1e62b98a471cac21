"""The tables under results/ are those of the runs beside them, and those in the README and the docs are theirs."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from statistics import mean, stdev

import pytest
from benchmarks.__main__ import DOCUMENT, write_table
from benchmarks.__main__ import RESULTS as MEASUREMENTS

from msil.reporting.evidence import Evidence
from msil.reporting.report import setting_tables, write_tables
from msil.reporting.sweep_table import result_line
from msil.reporting.tables import interval, signed, spread
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


@pytest.mark.parametrize("path", [p for p in sorted(RESULTS.glob("**/*.csv")) if p.with_suffix(".md").exists()],
                         ids=lambda path: path.relative_to(RESULTS).with_suffix("").as_posix())  # fmt: skip
def test_the_tables_as_text_have_the_numbers_of_those_in_full_precision(path: Path) -> None:
    (shown,) = tables(path.with_suffix(".md"))
    for row, line in zip(csv.DictReader(path.open(encoding="utf-8")), shown, strict=True):
        for title, cell in line.items():
            name = f"ours_{title.removesuffix(' ours').replace(' ', '_')}"
            if title.endswith("[95 %]"):
                ends = [row[f"difference{end}"] for end in ("", "_low", "_high")]
                assert cell == ("-" if "" in ends else interval([float(end) for end in ends])), row["row"]
            elif row.get(name):
                deviation = row[f"{name}_std"]
                assert cell == spread((float(row[name]), float(deviation) if deviation else None)), row["row"]


def test_the_page_of_results_shows_the_committed_tables() -> None:
    """Each table of rows has columns of one in the folder that the text before it names last, cell for cell."""
    shown = 0
    for folder, lines in page_tables(PAGE):
        if {"row", "seeds"} <= set(lines[0]):
            committed = [one for path in sorted((RESULTS / folder).glob("*.md")) for one in tables(path)]
            titles = list(lines[0])
            assert any([{title: row.get(title) for title in titles} for row in one] == lines for one in committed), (
                lines
            )
            shown += 1
    assert shown == 9  # of hosts and Table 5 three each, Tables 1, 2 and 4


def test_the_readme_shows_fcos_on_shapes_and_all_rows_of_voc_2007() -> None:
    folders = {"shapes": "hosts", "VOC 2007": "voc2007-256"}
    committed = [{"set": name, **row} for name, folder in folders.items()
                 for row in tables(RESULTS / folder / "hosts.md")[0]
                 if name != "shapes" or row["row"] in ("FCOS", "FCOS+MSIL")]  # fmt: skip
    (shown,) = (one for one in tables(README) if "set" in one[0])
    assert shown == [{title: row[title] for title in shown[0]} for row in committed]
    assert len(shown) <= 8
    prices = []
    for folder in folders.values():
        with (RESULTS / folder / "hosts.csv").open(encoding="utf-8") as file:
            flops = {row["row"]: float(row["flops"]) for row in csv.DictReader(file)}
        prices.append(f"{100 * (flops['FCOS+MSIL'] / flops['FCOS'] - 1):.0f} %")
    assert f"for {' and '.join(prices)} more FLOPs" in words(README)


def test_numbers_in_the_text_stand_in_a_table_beside_it() -> None:
    for path, others in ((PAGE, ()), (README, (RESULTS.parent / "docs" / "performance.md",))):
        cells = " ".join(str(row) for one in (path, *others) for table in tables(one) for row in table)
        text = re.sub(r"```.*?```|^\|.*?$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        # Versions; and the line over seeds, which has a test of its own.
        text = re.sub(r"`[^`]*`|\]\([^)]*\)|MMDetection \d\.\d|Apache-2\.0|over seeds 0 to 4 \([^)]*\)", "", text)
        numbers = set(re.findall(r"(?<![\d.])\d+\.\d(?![\d.])", text))
        assert numbers <= set(re.findall(r"\d+\.\d+", cells)), path.name


def test_the_page_of_results_has_the_times() -> None:
    found = re.findall(r"(\d+) to (\d+) minutes of training a run \(`results/([\w/-]+)`\)", words(PAGE))
    assert len(found) == 3
    for least, most, folder in found:
        minutes = [run["train_seconds"] / 60 for run in read_results(RESULTS / folder / "runs")]
        assert (int(least), int(most)) == (round(min(minutes)), round(max(minutes))), folder


def test_the_default_run_over_seeds_and_as_the_readme_prints_it() -> None:
    (shown,) = read_results(RESULTS / "quickstart" / "runs")
    assert result_line(shown) in README.read_text(encoding="utf-8")
    runs = [run for run in read_results(RESULTS / "hosts" / "runs") if run["run_name"].startswith("def_")]
    scores = [100 * run["metrics"]["AP"] for run in sorted(runs, key=lambda run: run["seed"])]
    each = ", ".join(f"{score:.1f}" for score in scores)
    over = f"AP {mean(scores):.1f} ± {stdev(scores):.1f} over seeds 0 to {len(scores) - 1} ({each})"
    assert over in words(PAGE)


def test_the_page_for_users_of_mmdetection_shows_the_open_gates() -> None:
    lines = (RESULTS / "open_gates.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.removesuffix(" %").split()[1:] for line in lines if line.startswith("True")]
    (shown,) = (one for one in tables(PAGE.with_name("coming-from-mmdetection-or-torchvision.md")) if "AP" in one[0])
    assert lines[0].endswith(f"AP {shown[0]['AP']}")
    assert [[value.split(" ")[0] for value in row.values()] for row in shown[1:]] == rows


def test_the_page_of_sweeps_shows_the_committed_table() -> None:
    (committed,) = tables(RESULTS / "shapes-switches" / "table.md")
    for row in committed:
        assert " ".join(row.values()) in words(RESULTS.parent / "docs" / "sweeps.md")


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


@pytest.mark.parametrize("name", ["hosts", "voc2007-256"])
def test_the_page_of_results_shows_the_energy(name: str) -> None:
    """MSIL minus plain: each seed's, and their mean and deviation."""
    files = sorted((RESULTS / name / "energy").glob("s*.json"))
    seeds = [json.loads(file.read_text(encoding="utf-8"))["rows"] for file in files]
    expected = []
    for rows in zip(*seeds, strict=True):
        if rows[0]["region"] != "inside" or rows[0]["level"] in ("P6", "P7"):
            continue
        plain, msil, differences = [], [], []
        for row in rows:
            (key,) = (key for key in row if " - " in key)
            for part, found in zip((*reversed(key.split(" - ")), key), (plain, msil, differences), strict=True):
                found.append(row[part][0])
        tower = {"cls": "classification", "reg": "regression"}[rows[0]["tower"]]
        each = ", ".join(map(signed, differences))
        deviation = f" ± {100 * stdev(differences):.1f}" if len(differences) > 1 else ""
        over = f"{signed(mean(differences))}{deviation} ({each})"
        shares = [f"{100 * share:.1f}" for share in (rows[0]["uniform"], mean(plain), mean(msil))]
        titles = ("tower, level", "uniform", "plain", "MSIL", "MSIL - plain (each seed)")
        expected.append(dict(zip(titles, (f"{tower}, {rows[0]['level']}", *shares, over), strict=True)))
    assert (name, expected) in [(folder, one) for folder, one in page_tables(PAGE) if "uniform" in one[0]]


def test_the_page_of_results_shows_autotimm() -> None:
    lines = (RESULTS / "autotimm" / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    (shown,) = (one for one in tables(PAGE) if "detector" in one[0])
    for row, found in zip(shown, map(json.loads, lines), strict=True):
        assert row.pop("detector") == found["detector"]
        speed, memory = found["images a CPU second"], found["peak memory in GB"]
        shares = [f"{100 * found[name]:.1f}" for name in ("AP", "AP50")]
        assert list(row.values()) == [*shares, f"{speed:.1f}", f"{memory:.1f} GB"]


def test_the_page_of_performance_shows_the_committed_measurements(tmp_path: Path) -> None:
    copy = tmp_path / DOCUMENT.name
    copy.write_text(DOCUMENT.read_text(encoding="utf-8"), encoding="utf-8")
    write_table(copy, json.loads(MEASUREMENTS.read_text(encoding="utf-8")))
    assert copy.read_text(encoding="utf-8") == DOCUMENT.read_text(encoding="utf-8")


def words(path: Path) -> str:
    return " ".join(path.read_text(encoding="utf-8").split())


def tables(path: Path) -> list[list[dict[str, str]]]:
    """The Markdown tables of a file, each as its rows by column title."""
    return [rows for _, rows in page_tables(path)]


def page_tables(path: Path) -> list[tuple[str, list[dict[str, str]]]]:
    """With the folder below results/ that the text before each table names last."""
    found: list[tuple[str, list[list[str]]]] = [("", [])]
    folder = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            found[-1][1].append([cell.strip() for cell in line.strip("|").split("|")])
            continue
        folder = ([folder, *re.findall(r"`results/([\w/-]+)`", line)])[-1]
        found.append((folder, []))
    return [(folder, [dict(zip(one[0], row, strict=True)) for row in one[2:]]) for folder, one in found if one]
