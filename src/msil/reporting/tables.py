"""Results -> one table of typed cells, for a terminal, as Markdown, CSV and LaTeX; the page has it as HTML.

Standard library alone: it redraws in no time. Parameters and FLOPs stand beside AP, so that a gain is read next to its
price.
"""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msil.reporting import formats
from msil.reporting.groups import Result, comparable, detector_name, distinct, joined, lookup, setting_name
from msil.reporting.paper import TABLES, paper_metrics
from msil.runs import write_bytes

AP_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
# package.module.Class by its last name
FORMS = {
    "model.head.name": lambda name: name.rpartition(".")[2],
    "model.msil.block": lambda name: "MSIL" if name in (None, "null") else name.rpartition(".")[2],
}
_EXTRA = (
    "exit_code", "seed", "config_hash", "trainable_parameters", "images_per_second", "train_seconds", "epochs",
    "train_images", "val_images",
)  # fmt: skip
_NUMBER, _OF_THE_PAPER = re.compile(r"^Table (\d+)\. "), r"The paper's Table \1. "  # LaTeX numbers tables of its own
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "✓": r"$\checkmark$", "✗": r"$\times$",
    "Δ": r"$\Delta$", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip
_ABSENT = object()  # a setting that a row does not have, where None is a value


@dataclass(frozen=True)
class Column:
    """key: the CSV header; values stand under it as measured (AP as a fraction, seconds, counts).
    title: the header people read. form: value -> text. shown: False for columns of the CSV alone. parts: endings of the
    CSV headers of a value with several numbers, such as an interval; () keeps the column out of the CSV."""

    key: str
    title: str = ""
    form: Callable[[Any], str] = formats.setting
    right: bool = True
    shown: bool = True
    parts: tuple[str, ...] = ("",)


@dataclass(frozen=True)
class Table:
    """rows: by the columns' keys; a key that is missing is a value that is missing."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...] = ()

    @property
    def shown(self) -> list[Column]:
        return [column for column in self.columns if column.shown]


def cell(row: Mapping[str, Any], column: Column) -> str:
    """What stands in a row's column for people to read."""
    return column.form(row[column.key]) if column.key in row else formats.MISSING


def to_text(table: Table) -> str:
    """For a terminal: aligned, with rules; the caption above and the notes below, wrapped to the table's width."""
    columns = table.shown
    cells = [[column.title for column in columns], *([cell(row, column) for column in columns] for row in table.rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
    body = [
        "  ".join(
            text.rjust(width) if column.right else text.ljust(width)
            for text, width, column in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in cells
    ]
    width = max(len(rule), 80)
    above = textwrap.wrap(table.caption, width)
    below = [textwrap.fill(note, width, initial_indent="- ", subsequent_indent="  ") for note in table.notes]
    return "\n".join([*above, rule, body[0], rule, *body[1:], rule, *below]) + "\n"


def to_markdown(table: Table) -> str:
    columns = table.shown
    lines = [
        _pipes(column.title for column in columns),
        _pipes("---:" if column.right else ":---" for column in columns),
        *(_pipes(cell(row, column) for column in columns) for row in table.rows),
    ]
    return "\n".join([table.caption, "", *lines, "", *(f"- {note}" for note in table.notes)]) + "\n"


def to_csv(*tables: Table) -> str:
    """Every column under its key, numbers in full: AP as fractions (the paper's too), seconds; missing: empty.

    Several tables stand below one header with all their columns in order of appearance.
    """
    rows = [_numbers(row, table.columns) for table in tables for row in table.rows]
    names = [column.key + part for table in tables for column in table.columns for part in column.parts]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(names)), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_latex(table: Table) -> str:
    """A table environment for booktabs, amssymb and graphicx, as wide as the text; the notes as comments."""
    columns = table.shown
    lines = [
        "% needs \\usepackage{booktabs,amssymb,graphicx}",
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{_latex(_NUMBER.sub(_OF_THE_PAPER, table.caption))}}}",
        "\\resizebox{\\textwidth}{!}{%",
        f"\\begin{{tabular}}{{{''.join('r' if column.right else 'l' for column in columns)}}}",
        "\\toprule",
        _ampersands(column.title for column in columns),
        "\\midrule",
        *(_ampersands(cell(row, column) for column in columns) for row in table.rows),
        "\\bottomrule",
        "\\end{tabular}}",
        "\\end{table}",
        *(f"% {' '.join(note.split())}" for note in table.notes),
    ]
    return "\n".join(lines) + "\n"


def write_table(folder: str | Path, table: Table) -> None:
    """Write table.md and table.csv, each atomically."""
    write_bytes(Path(folder) / "table.md", to_markdown(table).encode())
    write_bytes(Path(folder) / "table.csv", to_csv(table).encode())


def sweep_table(rows: Sequence[Result], *, varied: Sequence[str], table: str | None) -> Table:
    """The table of a sweep, one line a run, in the order given.

    rows: contents of result.json, with "skipped": True where the run had finished before this sweep; of failed jobs
        {"run_name", "status": "failed", "exit_code", and "config" (nested dict) or "overrides" (["key=value"])}.
    varied: what the sweep varied, as typed: model.msil.apply, or a group such as model/msil, which becomes those of
        its settings that differ between the rows.
    table: "table1" to "table5" puts the paper's printed numbers beside ours wherever it has a row for the same
        settings; None or another name does not.
    """
    keys = _settings(rows, varied)
    titles = _short_names(keys)
    settings = [{key: value for key in keys if (value := _value(row, key)) is not _ABSENT} for row in rows]
    models = [lookup(row, "model") for row in rows]
    printed = [paper_metrics(table, model) if isinstance(model, Mapping) else {} for model in models]
    metrics = [row.get("metrics") or {} for row in rows]
    names_needed = not keys or not all(settings)  # without its settings a line would say nothing about itself

    columns = [Column("run_name", "run", str, right=False, shown=names_needed)]
    columns += [Column(key, titles[key], FORMS.get(key, formats.setting), right=False) for key in keys]
    names = AP_NAMES + (("VOC_AP",) if any("VOC_AP" in one for one in [*metrics, *printed]) else ())
    for name in names:
        title = name.replace("_", " ")
        seen = name == "AP" or any(not formats.is_missing(one.get(name)) for one in [*metrics, *printed])
        columns.append(Column(name, title, formats.percent, shown=seen))
        if table in TABLES and name in TABLES[table].metrics:
            columns.append(Column(f"paper_{name}", f"paper {title}", formats.percent, shown=any(printed)))
    columns += [
        Column("parameters", "parameters", formats.amount),
        Column("flops", "FLOPs", formats.amount),
        Column("total_seconds", "time", formats.duration),
        Column("state", "state", str, right=False),
        Column("flops_image_size", shown=False, parts=("_height", "_width")),
        *(Column(key, shown=False) for key in _EXTRA if key not in keys),
    ]
    lines = []
    for row, chosen, ours, theirs in zip(rows, settings, metrics, printed, strict=True):
        line = {column.key: row.get(column.key) for column in columns if column.key not in keys}
        line |= {name: ours.get(name) for name in names}
        # Fractions, as ours; rounding takes back the noise of the division.
        line |= {f"paper_{name}": round(value / 100, 6) for name, value in theirs.items()}
        lines.append(line | chosen | {"state": _state(row)})
    return Table(_caption(rows, table), tuple(columns), tuple(lines), _notes(rows, table))


def result_line(result: Result) -> str:
    """What a single run prints at its end: three lines with its numbers, their price, and where the files are."""
    metrics = result["metrics"]
    names = [name for name in (*AP_NAMES, "VOC_AP") if name in metrics]
    scores = "  ".join(f"{name.replace('_', ' ')} {formats.percent(metrics[name])}" for name in names)
    height, width = result["flops_image_size"]
    config = result["config"]
    folder = Path(str(config.get("runs_dir", "runs"))) / result["run_name"]
    split = result.get("split")
    where = f"{result['val_images']} {split or 'validation'} images of {config['data']['name']}"
    took = (
        f"tested in {formats.duration(result['total_seconds'])}"
        if split
        else f"{result['steps']} training steps in {formats.duration(result['train_seconds'])} "
        f"({formats.duration(result['total_seconds'])} with evaluation)"
    )
    return "\n".join((
        f"{scores}   (percent, {where})" if names else f"{where} without annotations, so no scores",
        f"{formats.amount(result['parameters'])} parameters, {formats.amount(result['flops'])} FLOPs for one "
        f"{height}x{width} image, {took}",
        f"files in {folder}",
        *(f"to upload: {name}" for name in result.get("detections", ()) if name.endswith(".zip") and not names),
    ))  # fmt: skip


def _settings(rows: Sequence[Result], varied: Sequence[str]) -> list[str]:
    """Dotted keys of the columns; a group becomes those of its settings that differ, or its name if none does."""
    keys: list[str] = []
    for typed in varied:
        key = typed.lstrip("+").replace("/", ".")
        groups = [node for row in rows if isinstance(node := lookup(row, *key.split(".")), Mapping)]
        differing = _differing(groups)
        if groups and "name" in groups[0] and ("name" in differing or not differing):
            # resnet50 against resnet101 says it all, unless two of one name differ in another setting
            named = [[one for one in groups if one.get("name") == name] for name in {one.get("name") for one in groups}]
            differing = ["name", *dict.fromkeys(leaf for alike in named for leaf in _differing(alike))]
        keys += [f"{key}.{leaf}" for leaf in differing] or [key]
    return list(dict.fromkeys(keys))


def _differing(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    leaves = dict.fromkeys(leaf for group in groups for leaf in group)
    return [leaf for leaf in leaves if len({str(group.get(leaf)) for group in groups}) > 1]


def _value(row: Result, key: str) -> Any:
    """A setting of a row: from its config, else as its overrides spell it, else _ABSENT."""
    *parents, leaf = key.split(".")
    node = lookup(row, *parents)
    if isinstance(node, Mapping) and leaf in node and (leaf == "options" or not isinstance(node[leaf], Mapping)):
        return node[leaf]
    group = ".".join(parents) if leaf == "name" else key
    for override in row.get("overrides") or ():
        name, _, value = str(override).partition("=")
        if name.lstrip("+").replace("/", ".") in (key, group):
            return value
    return _ABSENT


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each key, or the whole one where two end alike; model.backbone.name is called backbone."""
    paths = {key: key.removesuffix(".name") for key in keys}
    ends = Counter(path.rpartition(".")[2] for path in paths.values())
    return {key: end if ends[end := path.rpartition(".")[2]] == 1 else path for key, path in paths.items()}


def _caption(rows: Sequence[Result], table: str | None) -> str:
    """Data set, image counts, detector, schedule, seed, and the unit of AP."""
    head = f"Our runs of the paper's Table {TABLES[table].number}" if table in TABLES else "Sweep"
    detectors = distinct(detector_name(row) or None for row in rows)
    seeds = "seed " + (distinct(lookup(row, "seed") for row in rows) or "unknown")
    parts = joined([setting_name(rows), detectors, seeds])
    return f"{head}: {parts}. AP in percent on the validation images."


def _notes(rows: Sequence[Result], table: str | None) -> tuple[str, ...]:
    counts = Counter(_state(row).split(" ")[0] for row in rows)
    meaning = {"skipped": "skipped (finished before, numbers of that run)"}
    states = ", ".join(f"{count} {meaning.get(word, word)}" for word, count in counts.items())
    sizes = {tuple(size) for row in rows if (size := row.get("flops_image_size"))}
    size = "one {}x{} image (height x width)".format(*min(sizes)) if len(sizes) == 1 else "one image at each run's size"
    lines = [
        f"{len(rows)} {'run' if len(rows) == 1 else 'runs'}: {states}." if rows else "No runs.",
        f"FLOPs: the forward pass of {size}, 2 per multiply-add. Time: wall clock of the whole run.",
    ]
    if table in TABLES:
        paper = TABLES[table]
        lines += [comparable(rows, paper), *paper.notes, *(row.note for row in paper.rows if row.note)]
    return tuple(lines)


def _state(row: Result) -> str:
    """ok, skipped (finished before), failed (exit 1), failed (signal 9), preempted (exit 75), or the row's own word."""
    status, code = str(row.get("status")), row.get("exit_code")
    if status == "finished":
        return "skipped" if row.get("skipped") else "ok"
    if status != "failed" or code is None:
        return status
    if code == 75:
        return "preempted (exit 75)"
    return f"failed (signal {-code})" if code < 0 else f"failed (exit {code})"


def _numbers(row: Mapping[str, Any], columns: Iterable[Column]) -> dict[str, str]:
    line = {}
    for column in columns:
        value = row.get(column.key, "")
        values = (value,) if len(column.parts) < 2 else value or ("",) * len(column.parts)
        line |= {column.key + part: _raw(one) for part, one in zip(column.parts, values, strict=False)}
    return line


def _raw(value: Any) -> str:
    """In full precision (repr), missing numbers empty; text that a spreadsheet would take for a formula behind an
    apostrophe (OWASP's CSV injection)."""
    if formats.is_missing(value):
        return ""
    if isinstance(value, str):
        return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else value
    return repr(value) if isinstance(value, float) else formats.setting(value)


def _latex(text: str) -> str:
    """What LaTeX would read as commands escaped, and the signs that its fonts lack replaced."""
    return "".join(_LATEX.get(sign, sign) for sign in " ".join(text.split()))


def _ampersands(cells: Iterable[str]) -> str:
    return " & ".join(_latex(text) for text in cells) + r" \\"


def _pipes(cells: Iterable[str]) -> str:
    return "| " + " | ".join(" ".join(text.split()).replace("|", "\\|") for text in cells) + " |"
