"""Tables as the report's page takes them: the regenerated ones, and the list of all runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from msil.reporting import captions, formats
from msil.reporting.comparisons import line_label
from msil.reporting.page import Cell, ReportColumn, ReportRow, ReportTable, RowKind
from msil.reporting.paper_tables import Regenerated, title_of
from msil.reporting.regenerated import FilledRow
from msil.reporting.tables import AP_NAMES, Column, cell

TOOLTIPS = {
    "our net": "the backbone that ran; a smaller one may stand in for the paper's",
    "seeds": "finished runs of this row, one a seed",
    "against": "the row that the differences are measured against",
    "FLOPs": "forward pass of one image, 2 per multiply-add",
    "images/s": "in training",
}


def page_table(id: str, one: Regenerated, elsewhere: Collection[str] = ()) -> ReportTable:
    """elsewhere: notes of the table that stand in another place of the page."""
    filled, table = one.filled, one.table
    others = filled.paper.metrics[1:]
    # The first metric in full; of the others the paper's number stands under ours, or the table would be too wide.
    merged = {f"{name}_text": name for name in others}
    columns = [c for c in table.columns if c.shown and c.key not in [f"paper_{name}" for name in others]]
    rows = []
    for line, row in zip(table.rows, filled.rows, strict=True):
        cells = [
            _merged(line, row, merged[c.key], filled.metric[merged[c.key]]) if c.key in merged else _cell(line, c)
            for c in columns
        ]
        rows.append(ReportRow(tuple(cells), _kind(row)))
    return ReportTable(
        id,
        title_of(filled),
        tuple(
            ReportColumn(filled.metric[merged[c.key]], True, "ours; the paper's below it")
            if c.key in merged
            else ReportColumn(c.title, c.right, TOOLTIPS.get(c.title, ""))
            for c in columns
        ),
        tuple(rows),
        tuple(note for note in table.notes if note not in elsewhere and not note.startswith("Missing rows")),
        () if filled.command is None else (filled.command,),
    )


def runs_table(id: str, results: Sequence[Mapping[str, Any]]) -> ReportTable:
    """One line a run, whatever it was for."""
    names = [name for name in (*AP_NAMES, "VOC_AP") if any(name in run["metrics"] for run in results)]
    columns = (
        ReportColumn("run"),
        ReportColumn("detector"),
        ReportColumn("switches"),
        ReportColumn("seed", numeric=True),
        *(ReportColumn(name.replace("_", " "), numeric=True) for name in names),
        ReportColumn("parameters", numeric=True),
        ReportColumn("FLOPs", numeric=True, tooltip=TOOLTIPS["FLOPs"]),
        ReportColumn("images/s", numeric=True, tooltip=TOOLTIPS["images/s"]),
        ReportColumn("time", numeric=True, tooltip="wall clock of the whole run"),
        ReportColumn("data"),
        ReportColumn("command"),
    )
    rows = []
    for run in results:
        cells = [
            Cell(str(run["run_name"])),
            Cell(captions.detector_name(run)),
            Cell(line_label(run)),
            Cell(str(run["seed"]), run["seed"]),
            *(Cell(formats.percent(run["metrics"].get(name)), run["metrics"].get(name)) for name in names),
            Cell(formats.amount(run["parameters"]), run["parameters"]),
            Cell(formats.amount(run["flops"]), run["flops"]),
            Cell(formats.rate(run["images_per_second"]), run["images_per_second"]),
            Cell(formats.duration(run["total_seconds"]), run["total_seconds"]),
            Cell(captions.setting_name([run])),
            Cell(str(run["command"])),
        ]
        rows.append(ReportRow(tuple(cells)))
    return ReportTable(id, f"All finished runs: {len(rows)}.", columns, tuple(rows))


def _kind(row: FilledRow) -> RowKind:
    if row.quoted:
        return "quoted"
    return "ours" if row.runs else "missing"


def _cell(line: Mapping[str, Any], column: Column) -> Cell:
    """A line's cell; what is written in parts (59.2 ± 0.4) sorts by the first."""
    text = cell(line, column)
    if column.key == "seeds" and not text[:1].isdigit():
        return Cell("")  # the row's tag says why
    missing = text in ("", formats.MISSING)
    if column.key == "difference_text" and not missing:
        estimate, _, interval = text.partition(" ")
        return Cell(estimate, line["difference"], detail=interval)
    if not column.right:
        return Cell(text, note=missing)
    value = line.get(column.key)
    if isinstance(value, str):
        value = _leading_number(value)
    return Cell(text, value, note=missing or not isinstance(value, int | float))


def _merged(line: Mapping[str, Any], row: FilledRow, name: str, ours: str) -> Cell:
    """Our number, the paper's below it; in a quoted row the paper's alone."""
    paper, value = line.get(f"paper_{name}"), line.get(f"ours_{ours}")
    printed = formats.percent(paper)
    if row.quoted:
        return Cell(printed, paper)
    detail = "" if paper is None else f"paper {printed}"
    return Cell(line[f"{name}_text"], value, note=value is None, detail=detail)


def _leading_number(text: str) -> float | None:
    try:
        return float(text.split(" ")[0])
    except ValueError:
        return None
