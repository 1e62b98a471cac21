"""The tables under results/ are those of the runs beside them: made again, they are the same."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from msil.reporting.evidence import Evidence
from msil.reporting.report import setting_tables, write_tables
from msil.reporting.results import read_results

RESULTS = Path(__file__).resolve().parents[2] / "results"
README = RESULTS.parent / "README.md"


@pytest.mark.parametrize("name", ["shapes", "bccd"])
def test_the_tables_come_from_the_runs(name: str, tmp_path: Path) -> None:
    made = write_tables(tmp_path, setting_tables(read_results(RESULTS / name / "runs"), Evidence()))
    assert len(made) == 5 * 3
    for path in made:
        committed = RESULTS / name / path.name
        if path.suffix == ".csv":  # in full precision, of which another processor may give other last digits
            assert [[numbers(cell) for cell in row] for row in rows(path)] == [
                [pytest.approx(numbers(cell), abs=1e-9) for cell in row] for row in rows(committed)
            ], path.name
        else:
            assert path.read_bytes() == committed.read_bytes(), path.name


def rows(path: Path) -> list[list[str]]:
    return list(csv.reader(path.open(encoding="utf-8", newline="")))


def numbers(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell


# A row of the README's tables is a row of a committed table, cell for cell.
def test_the_readme_shows_the_committed_tables() -> None:
    committed = "\n".join(path.read_text(encoding="utf-8") for path in RESULTS.glob("*/table*.md"))
    rows = {tuple(cell.strip() for cell in line.strip("|").split("|")) for line in committed.splitlines()}
    shown = [
        tuple(cell.strip() for cell in line.strip("|").split("|"))
        for line in README.read_text(encoding="utf-8").splitlines()
        if line.startswith(("| w/o", "| baseline", "| cls ", "| RestNet", "| VFNet", "| FCOS"))
    ]
    assert len(shown) == 3 + 4 + 2 + 4  # Tables 1, 2, 4 and 5
    assert all(any(set(line) <= set(row) for row in rows) for line in shown), shown
