"""`msil report`: finished runs as one page, the best first, and the paper's tables as files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import msil
from msil.reporting.evidence import Evidence
from msil.reporting.groups import Result, detectors, lookup, setting_name, settings
from msil.reporting.page import Section, render
from msil.reporting.paper import TABLES, TEXT_NOTES
from msil.reporting.paper_tables import Filled, fill, paper_table
from msil.reporting.sections import detector_section, gallery_section, heatmap_section
from msil.reporting.sweep_table import sweep_table
from msil.reporting.tables import amount, interval, percent, to_csv, to_latex, to_markdown
from msil.runs import read_results, write_bytes

PAGE_FILE = "report.html"
PARTS = ("model/head", "model/backbone", "model.detector", "model/msil", "data.name", "schedule.name", "seed")


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
    ranked = sorted(results, key=lambda run: (lookup(run, "mode") == "test", -(run["metrics"].get("AP") or 0.0)))
    caption = f"Finished runs: {len(results)}, best first; AP in percent on the images that each run names."
    answers = tuple(answer for setting in found if (answer := best_of(setting, evidence)))
    sections = [
        Section("Runs", answers, tables=(sweep_table(ranked, PARTS, caption=caption),)),
        *(_setting_section(setting, evidence, say) for setting in found if setting.runs),
    ]
    if any(one.runs for setting in found for one in setting.tables):
        words = ("Contradictions of a table stand under that table. Those of the text:", *TEXT_NOTES)
        sections.append(Section("Where the paper's text contradicts itself", words))
    title = "msil: runs, and the paper's tables"
    footer = f"Made by msil {msil.__version__} (msil report) from {len(results)} runs."
    target = Path(out_dir) / PAGE_FILE
    write_bytes(target, render(title, (), tuple(sections), footer).encode())
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


def best_of(setting: SettingTables, evidence: Evidence) -> str | None:
    """Which detector of a setting is best, by how much, whether that is more than luck, and its price; None of one."""
    metric = "VOC_AP" if all("VOC_AP" in run["metrics"] for run in setting.runs) else "AP"
    lines = [(f"{one.name} {line.label}", line.runs) for one in detectors(setting.runs) for line in one.lines]
    means = {name: fmean([run["metrics"].get(metric) or 0.0 for run in runs]) for name, runs in lines}
    if len(lines) < 2:
        return None
    (best, ours), (second, theirs) = sorted(lines, key=lambda line: -means[line[0]])[:2]
    difference = evidence.difference(ours, theirs, metric)
    luck = "of these no interval can be had"
    if difference is not None:
        luck = f"{interval(difference)} (95 %), " + ("more than luck" if difference.low > 0 else "which luck may give")
        luck += "" if min(len(ours), len(theirs)) > 1 else ", of one seed"
        luck += "" if len(lines) == 2 else f", not corrected for the choice among {len(lines)}"
    price = [f"{amount(runs[0]['parameters'])} parameters, {amount(runs[0]['flops'])} FLOPs" for runs in (ours, theirs)]
    score = f"{metric.replace('_', ' ')} {percent(means[best])}"
    return (
        f"{setting.name}: best of {len(lines)} is {best}, {score} ({price[0]}), before {second}, "
        f"{percent(means[second])} ({price[1]}): {luck}."
    )


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
    tables = [paper_table(one) for one in setting.tables if one.runs]
    shared = [note for note, times in Counter(note for table in tables for note in table.notes).items() if times > 1]
    tables = [replace(table, notes=tuple(note for note in table.notes if note not in shared)) for table in tables]
    return Section(setting.name, tuple(shared), tuple(tables), subsections=tuple(parts))
