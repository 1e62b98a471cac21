"""Results -> one table, for a terminal, as Markdown and as CSV. Standard library alone: it redraws in no time.

Every table has parameters and FLOPs beside AP, so that a gain is read next to its price.
"""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msil.reporting import captions, formats
from msil.reporting.captions import Row
from msil.reporting.paper import TABLES, paper_metrics
from msil.runs import write_bytes

AP_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_NUMBER, _OF_THE_PAPER = re.compile(r"^Table (\d+)\. "), r"The paper's Table \1. "  # LaTeX numbers tables of its own
# package.module.Class by its last name
FORMS = {
    "model.head.name": lambda name: name.rpartition(".")[2],
    "model.msil.block": lambda name: "MSIL" if name in (None, "null") else name.rpartition(".")[2],
}
ABSENT = object()  # a setting that a row does not have, where None is a value


@dataclass(frozen=True)
class Column:
    """key: the CSV header; values stand under it as measured (AP as a fraction, seconds, counts).
    title: the header people read. form: value -> text. shown: False for columns of the CSV alone. written: False for
    columns that the CSV has in parts."""

    key: str
    title: str
    form: Callable[[Any], str] = formats.setting
    right: bool = True
    shown: bool = True
    written: bool = True


@dataclass(frozen=True)
class Table:
    """rows: one dict a run, by the columns' keys; a key that is missing is a value that is missing."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]


def sweep_table(rows: Sequence[Row], *, varied: Sequence[str], table: str | None) -> Table:
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
    settings = [{key: value for key in keys if (value := _value(row, key)) is not ABSENT} for row in rows]
    printed = [_printed(row, table) for row in rows]
    metrics = [row.get("metrics") or {} for row in rows]
    names_needed = not keys or not all(settings)  # without its settings a line would say nothing about itself

    columns = [Column(key, titles[key], FORMS.get(key, formats.setting), right=False) for key in keys]
    columns.insert(0, Column("run_name", "run", str, right=False, shown=names_needed))
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
    ]
    extra = (
        "exit_code", "seed", "config_hash", "trainable_parameters", "flops_height", "flops_width", "images_per_second",
        "train_seconds", "epochs", "train_images", "val_images",
    )  # fmt: skip
    columns += [Column(key, key, shown=False) for key in extra if key not in keys]

    lines = []
    for row, chosen, ours, theirs in zip(rows, settings, metrics, printed, strict=True):
        height, width = row.get("flops_image_size") or (None, None)
        line = {column.key: row.get(column.key) for column in columns if column.key not in keys}
        line |= {name: ours.get(name) for name in names}
        # Fractions, as ours; rounding takes back the noise of the division.
        line |= {f"paper_{name}": round(value / 100, 6) for name, value in theirs.items()}
        lines.append(line | chosen | {"state": captions.state(row), "flops_height": height, "flops_width": width})
    return Table(
        captions.caption(rows, table),
        tuple(columns),
        tuple(lines),
        captions.notes(rows, table, printed),
    )


def to_text(table: Table) -> str:
    """For a terminal: aligned, with rules; the caption above and the notes below, wrapped to the table's width."""
    columns = [column for column in table.columns if column.shown]
    cells = [[column.title for column in columns], *([cell(row, column) for column in columns] for row in table.rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
    body = ["  ".join(_align(text, width, column) for text, width, column in zip(line, widths, columns, strict=True))
            for line in cells]  # fmt: skip
    lines = [rule, body[0].rstrip(), rule, *(line.rstrip() for line in body[1:]), rule]
    width = max(len(rule), 80)
    above = textwrap.wrap(table.caption, width)
    below = [textwrap.fill(note, width, initial_indent="- ", subsequent_indent="  ") for note in table.notes]
    return "\n".join([*above, *lines, *below]) + "\n"


def to_markdown(table: Table) -> str:
    columns = [column for column in table.columns if column.shown]
    lines = [
        _pipes(column.title for column in columns),
        _pipes("---:" if column.right else ":---" for column in columns),
        *(_pipes(cell(row, column) for column in columns) for row in table.rows),
    ]
    notes = [f"- {note}" for note in table.notes]
    return "\n".join([table.caption, "", *lines, "", *notes]) + "\n"


def to_csv(table: Table) -> str:
    """Every column under its key, numbers in full: AP as fractions (the paper's too), seconds; missing: empty."""
    columns = [column for column in table.columns if column.written]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(column.key for column in columns)
    for row in table.rows:
        writer.writerow(_raw(row.get(column.key, "")) for column in columns)
    return text.getvalue()


def to_latex(table: Table) -> str:
    """A table environment for booktabs, amssymb and graphicx, as wide as the text; the notes as comments."""
    columns = [column for column in table.columns if column.shown]
    lines = [
        "% needs \\usepackage{booktabs,amssymb,graphicx}",
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{formats.latex(_NUMBER.sub(_OF_THE_PAPER, table.caption))}}}",
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


def result_line(result: Row) -> str:
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


def _settings(rows: Sequence[Row], varied: Sequence[str]) -> list[str]:
    """Dotted keys of the columns; a group becomes those of its settings that differ, or its name if none does."""
    keys: list[str] = []
    for typed in varied:
        key = typed.lstrip("+").replace("/", ".")
        groups = [node for row in rows if isinstance(node := captions.lookup(row, *key.split(".")), Mapping)]
        leaves = dict.fromkeys(leaf for group in groups for leaf in group)
        differing = [leaf for leaf in leaves if len({str(group.get(leaf)) for group in groups}) > 1]
        if "name" in leaves and ("name" in differing or not differing):
            differing = ["name"]  # resnet50 against resnet101 says it all
        keys += [f"{key}.{leaf}" for leaf in differing] or [key]
    return list(dict.fromkeys(keys))


def _value(row: Row, key: str) -> Any:
    """A setting of a row: from its config, else as its overrides spell it, else ABSENT."""
    *parents, leaf = key.split(".")
    node = captions.lookup(row, *parents)
    if isinstance(node, Mapping) and leaf in node and (leaf == "options" or not isinstance(node[leaf], Mapping)):
        return node[leaf]
    group = ".".join(parents) if leaf == "name" else key
    for override in row.get("overrides") or ():
        name, _, value = str(override).partition("=")
        if name.lstrip("+").replace("/", ".") in (key, group):
            return value
    return ABSENT


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """The shortest endings that tell the keys apart; model.backbone.name is called backbone."""
    paths = {key: (key.removesuffix(".name")).split(".") for key in keys}
    names = {}
    for key, path in paths.items():
        for length in range(1, len(path) + 1):
            ending = path[-length:]
            if sum(other[-length:] == ending for other in paths.values()) == 1:
                break
        names[key] = ".".join(ending)
    return names


def _printed(row: Row, table: str | None) -> dict[str, float]:
    model = captions.lookup(row, "model")
    if not table or not isinstance(model, Mapping):
        return {}
    msil = model["msil"]
    if msil.get("block"):
        return {}
    found = paper_metrics(
        table,
        head=model["head"].get("name"),
        backbone=model["backbone"].get("name"),
        align=msil["align"],
        separate=msil["separate"],
        apply=msil["apply"],
    )
    return found or {}


def cell(row: Mapping[str, Any], column: Column) -> str:
    """What stands in a line's column for people to read."""
    return column.form(row[column.key]) if column.key in row else formats.MISSING


def _align(text: str, width: int, column: Column) -> str:
    return text.rjust(width) if column.right else text.ljust(width)


def _ampersands(cells: Iterable[str]) -> str:
    return " & ".join(formats.latex(text) for text in cells) + r" \\"


def _pipes(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _raw(value: Any) -> str:
    """In full precision (repr), missing numbers empty."""
    if formats.is_missing(value):
        return ""
    if isinstance(value, str):
        return formats.csv_text(value)
    return repr(value) if isinstance(value, float) else formats.setting(value)
