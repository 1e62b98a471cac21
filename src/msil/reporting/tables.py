"""One table of typed cells, for a terminal, as Markdown, CSV and LaTeX; the page has it as HTML. Standard library
alone."""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msil.reporting import formats
from msil.runs import write_bytes

AP_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_NUMBER, _OF_THE_PAPER = re.compile(r"^Table (\d+)\. "), r"The paper's Table \1. "  # LaTeX numbers tables of its own
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "✓": r"$\checkmark$", "✗": r"$\times$",
    "Δ": r"$\Delta$", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """key: the CSV header; values stand under it as measured (AP as a fraction, seconds, counts).
    title: the header people read. form: value -> text. shown: False for columns of the CSV alone. parts: endings of the
    CSV headers of a value with several numbers, such as an interval."""

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
