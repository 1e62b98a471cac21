"""`msil report`: finished runs as one page, the best first, and the paper's tables as files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

import msil
from msil.errors import counted
from msil.reporting.evidence import Evidence
from msil.reporting.filling import Filled, fill
from msil.reporting.groups import (
    ROW,
    Result,
    by_images,
    detectors,
    differing_settings,
    distinct_names,
    lookup,
    own_score,
    setting_name,
    settings,
)
from msil.reporting.page import Section, render
from msil.reporting.paper import HOSTS, TABLES, TEXT_NOTES
from msil.reporting.paper_tables import paper_table
from msil.reporting.ranking import answer, class_table, ranked, ranking
from msil.reporting.sections import detector_section, gallery_section, heatmap_section, learning_curves
from msil.reporting.sweep_table import sweep_table
from msil.reporting.tables import Table, to_csv, to_latex, to_markdown
from msil.runs import read_results, write_bytes

PAGE_FILE = "report.html"


@dataclass(frozen=True)
class SettingTables:
    """The tables of one setting: runs that may stand in one table. name: the setting in words."""

    name: str
    runs: tuple[Result, ...]
    tables: tuple[Filled, ...]


def write_report(runs_dir: str | Path, out_dir: str | Path, *, say: Callable[[str], None] = print) -> list[Path]:
    """Write report.html, and table1 to table5, and hosts where a head ran plain and with a block, as .md, .csv and .tex
    into out_dir; returns their paths.

    runs_dir: holds one folder a run with result.json; evaluation.npz, metrics.csv and checkpoints/last.ckpt beside it
    add intervals, curves, and heat maps. The data sets' images, where they are still at their place, add the gallery.

    Raises ConfigError where runs_dir holds no finished run.
    """
    results = read_results(runs_dir)
    say(f"{counted(len(results), 'finished run')} in {runs_dir}")
    with tqdm(desc="resampling the detections of each run", unit="", leave=False, disable=None) as bar:
        evidence = Evidence(progress=bar.update)
        found = setting_tables(results, evidence)
    evidence.progress = lambda: None  # what follows prints lines of its own
    written = write_tables(out_dir, found)
    say(f"tables: {', '.join(path.name for path in written if path.suffix == '.md')} (and .csv, .tex) in {out_dir}")
    sections = [_runs_section(i, *found, evidence, say) for i, found in enumerate(by_images(results))]
    sections += [_setting_section(setting, evidence, say) for setting in found if setting.runs]
    if any(one.runs for setting in found for one in setting.tables):
        words = ("Contradictions of a table stand under that table. Those of the text:", *TEXT_NOTES)
        sections.append(Section("Where the paper's text contradicts itself", words, folded=True))
    title = "msil: runs, and the paper's tables"
    footer = f"Made by msil {msil.__version__} (msil report) from {len(results)} runs."
    target = Path(out_dir) / PAGE_FILE
    write_bytes(target, render(title, tuple(sections), footer).encode())
    return [target, *written]


def setting_tables(results: Sequence[Result], evidence: Evidence) -> list[SettingTables]:
    """Each setting with the tables that it has a row of; a table that no run is of stands in the first, empty."""
    groups = settings(results) or [[]]
    filled = [[fill(table, group) for table in TABLES.values()] for group in groups]
    taken = {one.paper.name for tables in filled for one in tables if one.runs}
    made = []
    firsts = [group[0] for group in groups if group]
    names = distinct_names([setting_name(group) for group in groups if group], firsts, ROW) or ["no runs yet"]
    for i, (group, tables) in enumerate(zip(groups, filled, strict=True)):
        shown = [one for one in tables if one.runs or (i == 0 and one.paper.name not in taken)]
        hosts = fill(HOSTS, group)
        if any(row.runs and hosts.compared(row) for row in hosts.rows):
            shown.append(hosts)
        kept = tuple(map(evidence.compare, shown))
        made.append(SettingTables(names[i], tuple(group), kept))
    return made


def write_tables(out_dir: str | Path, found: Sequence[SettingTables]) -> list[Path]:
    """table1 to table5 and, where there is one, hosts as .md, .csv and .tex, each with the table of every setting, one
    after the other."""
    written = []
    for name in (*TABLES, HOSTS.name):
        tables = [paper_table(one) for setting in found for one in setting.tables if one.paper.name == name]
        if not tables:  # hosts, which an earlier report may have had
            for ending in ("md", "csv", "tex"):
                (Path(out_dir) / f"{name}.{ending}").unlink(missing_ok=True)
            continue
        markdown, latex = ("\n".join(map(form, tables)) for form in (to_markdown, to_latex))
        for ending, text in (("md", markdown), ("csv", to_csv(*tables)), ("tex", latex)):
            written.append(Path(out_dir) / f"{name}.{ending}")
            write_bytes(written[-1], text.encode())
    return written


def _runs_section(
    number: int, images: str, runs: Sequence[Result], evidence: Evidence, say: Callable[[str], None]
) -> Section:
    """The runs of the same images: which is best, then AP of each class and every run, folded."""
    trained = [run for run in runs if lookup(run, "mode") != "test"]
    words, tables, curves, parts = [], [], None, []
    if trained:
        lines, metric = ranked(trained)
        words = [answer(lines, metric, evidence)]
        say(f"{images}: {words[0]}")
        tables, curves = [ranking(lines, metric, evidence)], learning_curves(number, lines)
        if (by_class := class_table(lines, evidence)) is not None:
            parts.append(Section("AP of each class", tables=(by_class,), folded=True))
    best_first = sorted(runs, key=lambda run: -(run["metrics"].get(own_score(run["metrics"])) or 0.0))
    caption = f"{counted(len(runs), 'finished run')}, best first."
    every = sweep_table(best_first, differing_settings(trained or runs), caption=caption)
    parts.append(Section("Each run", tables=(every,), folded=True))
    return Section(images, tuple(words), tuple(tables), curves, subsections=tuple(parts))


def _setting_section(setting: SettingTables, evidence: Evidence, say: Callable[[str], None]) -> Section:
    """The paper's tables with the runs of one setting, then its detectors' errors, and images, folded."""
    tables = [_with_ours(paper_table(one)) for one in setting.tables if one.runs]
    shared = [note for note, times in Counter(note for table in tables for note in table.notes).items() if times > 1]
    tables = [replace(table, notes=tuple(note for note in table.notes if note not in shared)) for table in tables]
    parts = []
    for detector in detectors(setting.runs):
        parts.append(detector_section(detector, evidence))
        pair = detector.pair()
        for section in (gallery_section(*pair, evidence), heatmap_section(*pair, evidence)) if pair else ():
            say(f"{detector.name}: {section.title if section.pictures else section.paragraphs[0]}")
            parts.append(replace(section, title=f"{detector.name}: {section.title}", folded=True))
    title = f"The paper's tables: {setting.name}" if tables else setting.name
    return Section(title, tuple(shared), tuple(tables), subsections=tuple(parts))


def _with_ours(table: Table) -> Table:
    """The rows that runs of ours stand in."""
    rows = tuple(row for row in table.rows if row.get("runs"))
    left_out = len(table.rows) - len(rows)
    note = f"{counted(left_out, 'row')} without a run of ours: in the table's .md."
    return replace(table, rows=rows, notes=table.notes + ((note,) if left_out else ()))
