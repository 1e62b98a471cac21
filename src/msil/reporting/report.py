"""`msil report`: finished runs become the paper's tables as files, and one page with all that they show."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msil
from msil.reporting import page
from msil.reporting.comparisons import detectors
from msil.reporting.evidence import Evidence, differences
from msil.reporting.paper import TABLES, TEXT_NOTES
from msil.reporting.paper_tables import Regenerated
from msil.reporting.regenerated import fill, setting_name, setting_title, settings
from msil.reporting.report_charts import detector_section, difference_picture
from msil.reporting.report_pictures import gallery_section, heatmap_section
from msil.reporting.report_tables import page_table, runs_table
from msil.reporting.tables import to_csv, to_latex, to_markdown
from msil.runs import read_results, write_bytes

Result = Mapping[str, Any]

PAGE_FILE = "report.html"
LEAD = (
    "The evaluation of Multi-Semantic Interactive Learning (arXiv 2303.10411), regenerated: the numbers that the paper "
    "prints, and those of the runs in this folder. They stand side by side; whether they may be compared is said under "
    "each table."
)


@dataclass(frozen=True)
class SettingTables:
    """The tables of one setting: runs that may stand in one table. title, name: the setting in few words, in many."""

    title: str
    name: str
    runs: tuple[Result, ...]
    tables: tuple[Regenerated, ...]


def write_report(runs_dir: str | Path, out_dir: str | Path, *, say: Callable[[str], None] = print) -> list[Path]:
    """Write report.html and table1 to table5 as .md, .csv and .tex into out_dir; returns their paths.

    runs_dir: holds one folder a run with result.json; evaluation.npz, metrics.csv and checkpoints/last.ckpt beside it
    add intervals, curves, and heat maps. The data sets' images, where they are still at their place, add the gallery.

    Raises ConfigError where runs_dir holds no finished run, DataError for a damaged file of a run.
    """
    results = read_results(runs_dir)
    evidence = Evidence()
    say(f"{len(results)} finished run{'' if len(results) == 1 else 's'} in {runs_dir}")
    found = setting_tables(results, evidence)
    written = write_tables(out_dir, found)
    say(f"tables: {', '.join(path.name for path in written if path.suffix == '.md')} (and .csv, .tex) in {out_dir}")
    sections = [_setting_section(i, setting, evidence, say) for i, setting in enumerate(found, start=1)]
    runs = page.Section("runs", "All runs", tables=(runs_table("all-runs", results),))
    text = page.render(
        page.Report(
            "MSIL: the paper's tables and figures, regenerated",
            (LEAD,),
            (*sections, runs, _paper_section()),
            footer=f"Made by msil {msil.__version__} (msil report) from {len(results)} runs.",
        )
    )
    target = Path(out_dir) / PAGE_FILE
    write_bytes(target, text.encode())
    return [target, *written]


def setting_tables(results: Sequence[Result], evidence: Evidence) -> list[SettingTables]:
    """Each setting with the tables that it has a row of; a table that no run is of stands in the first, empty."""
    groups = settings(results) or [[]]
    filled = [[fill(table, group) for table in TABLES.values()] for group in groups]
    homeless = {table.number for table in TABLES.values()} - {one.paper.number for g in filled for one in g if one.runs}
    made = []
    for i, group in enumerate(groups):
        kept = [one for one in filled[i] if one.runs or (i == 0 and one.paper.number in homeless)]
        tables = tuple(Regenerated(one, differences(one, evidence)) for one in kept)
        made.append(SettingTables(setting_title(group), setting_name(group), tuple(group), tables))
    return made


def write_tables(out_dir: str | Path, found: Sequence[SettingTables]) -> list[Path]:
    """tableN.md, .csv and .tex, each with the table of every setting, one after the other."""
    written = []
    for number in (table.number for table in TABLES.values()):
        tables = [one.table for setting in found for one in setting.tables if one.number == number]
        texts = {
            "md": "\n".join(to_markdown(table) for table in tables),
            "csv": _one_header([to_csv(table) for table in tables]),
            "tex": "\n".join(to_latex(table) for table in tables),
        }
        for ending, text in texts.items():
            written.append(Path(out_dir) / f"table{number}.{ending}")
            write_bytes(written[-1], text.encode())
    return written


def _one_header(texts: Sequence[str]) -> str:
    """Several csv texts as one, under all their columns in order of appearance."""
    rows = [row for text in texts for row in csv.DictReader(io.StringIO(text))]
    names = list(dict.fromkeys(name for row in rows for name in row))
    joined = io.StringIO()
    writer = csv.DictWriter(joined, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return joined.getvalue()


def _setting_section(number: int, setting: SettingTables, evidence: Evidence, say: Callable[[str], None]
) -> page.Section:  # fmt: skip
    prefix = f"s{number}"
    # What is the same for all tables with intervals stands once, above them.
    readings = [one.reading for one in setting.tables if one.differences] or [one.reading for one in setting.tables]
    reading = [note for note in (readings or [()])[0] if all(note in other for other in readings)]
    tables = tuple(page_table(f"{prefix}-table{one.number}", one, reading) for one in setting.tables)
    pictures = difference_picture(setting.tables)
    parts = []
    for i, lines in enumerate(detectors(setting.runs), start=1):
        say(f"{lines.name}: {', '.join(line.label for line in lines.lines)}")
        part = detector_section(f"{prefix}-d{i}", lines, evidence)
        pair = lines.pair()
        if pair is not None:
            say(f"  gallery and heat maps of {pair[0].label} against {pair[1].label}")
            more = (
                gallery_section(f"{part.id}-images", *pair, evidence),
                heatmap_section(f"{part.id}-maps", *pair, evidence),
            )
            part = replace(part, subsections=more)
        parts.append(part)
    return page.Section(
        prefix,
        setting.title,
        (f"{setting.name}.", *reading) if setting.runs else (),
        tables=tables,
        pictures=() if pictures is None else (pictures,),
        subsections=tuple(parts),
    )


def _paper_section() -> page.Section:
    return page.Section(
        "paper",
        "Where the paper's text contradicts itself",
        ("Contradictions of a table stand under that table. Those of the text:", *TEXT_NOTES),
    )
