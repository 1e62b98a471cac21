"""`msil report`: finished runs become the paper's tables as files, and one page with all that they show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msil
from msil.reporting.evidence import Evidence
from msil.reporting.groups import Result, detectors, setting_name, settings
from msil.reporting.page import Section, render
from msil.reporting.paper import TABLES, TEXT_NOTES
from msil.reporting.paper_tables import Filled, fill, paper_table
from msil.reporting.sections import detector_section, gallery_section, heatmap_section
from msil.reporting.sweep_table import sweep_table
from msil.reporting.tables import to_csv, to_latex, to_markdown
from msil.runs import read_results, write_bytes

PAGE_FILE = "report.html"
PARTS = ("model/head", "model/backbone", "model.detector", "model/msil", "data.name", "schedule.name", "seed")
LEAD = (
    "The evaluation of Multi-Semantic Interactive Learning (arXiv 2303.10411), regenerated: the numbers that the paper "
    "prints, and those of the runs in this folder. They stand side by side; whether they may be compared is said under "
    "each table."
)


@dataclass(frozen=True)
class SettingTables:
    """The tables of one setting: runs that may stand in one table. name: the setting in words."""

    name: str
    runs: tuple[Result, ...]
    tables: tuple[Filled, ...]


def write_report(runs_dir: str | Path, out_dir: str | Path, *, say: Callable[[str], None] = print) -> list[Path]:
    """Write report.html and table1 to table5 as .md, .csv and .tex into out_dir; returns their paths.

    runs_dir: holds one folder a run with result.json; evaluation.npz, metrics.csv and checkpoints/last.ckpt beside it
    add intervals, curves, and heat maps. The data sets' images, where they are still at their place, add the gallery.

    Raises ConfigError where runs_dir holds no finished run.
    """
    results = read_results(runs_dir)
    evidence = Evidence()
    say(f"{len(results)} finished run{'' if len(results) == 1 else 's'} in {runs_dir}")
    found = setting_tables(results, evidence)
    written = write_tables(out_dir, found)
    say(f"tables: {', '.join(path.name for path in written if path.suffix == '.md')} (and .csv, .tex) in {out_dir}")
    sections = [
        *(_setting_section(setting, evidence, say) for setting in found),
        Section("All runs", tables=(sweep_table(results, PARTS, caption=f"All finished runs: {len(results)}."),)),
        Section(
            "Where the paper's text contradicts itself",
            ("Contradictions of a table stand under that table. Those of the text:", *TEXT_NOTES),
        ),
    ]
    title = "MSIL: the paper's tables and figures, regenerated"
    footer = f"Made by msil {msil.__version__} (msil report) from {len(results)} runs."
    target = Path(out_dir) / PAGE_FILE
    write_bytes(target, render(title, (LEAD,), tuple(sections), footer).encode())
    return [target, *written]


def setting_tables(results: Sequence[Result], evidence: Evidence) -> list[SettingTables]:
    """Each setting with the tables that it has a row of; a table that no run is of stands in the first, empty."""
    groups = settings(results) or [[]]
    filled = [[fill(table, group) for table in TABLES.values()] for group in groups]
    taken = {one.paper.number for tables in filled for one in tables if one.runs}
    made = []
    for i, (group, tables) in enumerate(zip(groups, filled, strict=True)):
        kept = tuple(evidence.compare(one) for one in tables if one.runs or (i == 0 and one.paper.number not in taken))
        made.append(SettingTables(setting_name(group) if group else "no runs yet", tuple(group), kept))
    return made


def write_tables(out_dir: str | Path, found: Sequence[SettingTables]) -> list[Path]:
    """tableN.md, .csv and .tex, each with the table of every setting, one after the other."""
    written = []
    for number in (table.number for table in TABLES.values()):
        tables = [paper_table(one) for setting in found for one in setting.tables if one.paper.number == number]
        markdown, latex = ("\n".join(map(form, tables)) for form in (to_markdown, to_latex))
        for ending, text in (("md", markdown), ("csv", to_csv(*tables)), ("tex", latex)):
            written.append(Path(out_dir) / f"table{number}.{ending}")
            write_bytes(written[-1], text.encode())
    return written


def _setting_section(setting: SettingTables, evidence: Evidence, say: Callable[[str], None]) -> Section:
    parts = []
    for lines in detectors(setting.runs):
        say(f"{lines.name}: {', '.join(line.label for line in lines.lines)}")
        part = detector_section(lines, evidence)
        pair = lines.pair()
        if pair is not None:
            say(f"  {pair[0].label} against {pair[1].label}")
            sections = (gallery_section(*pair, evidence), heatmap_section(*pair, evidence))
            for section in sections:
                say(f"    {section.title}" if section.pictures else f"    {section.paragraphs[0]}")
            part = replace(part, subsections=sections)
        parts.append(part)
    return Section(
        setting.name,
        tables=tuple(map(paper_table, setting.tables)),
        subsections=tuple(parts),
    )
