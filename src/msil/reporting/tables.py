"""One table of typed cells, for a terminal, as Markdown, CSV and LaTeX; the page has it as HTML; and numbers as people
read them. Standard library alone."""

from __future__ import annotations

import csv
import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from msil.runs import write_bytes

MISSING = "-"
AP_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_NUMBER, _OF_THE_PAPER = re.compile(r"^Table (\d+)\. "), r"The paper's Table \1. "  # LaTeX numbers tables of its own
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "✓": r"$\checkmark$", "✗": r"$\times$",
    "Δ": r"$\Delta$", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip


def is_missing(value: Any) -> bool:
    """None and NaN: a number that a run did not or could not measure."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def percent(fraction: float | None) -> str:
    """0.4205 -> "42.0" (of 100)."""
    return MISSING if fraction is None or is_missing(fraction) else f"{100 * fraction:.1f}"


def signed(fraction: float | None) -> str:
    """0.012 -> "+1.2" (of 100); what rounds to zero is "0.0", without a sign."""
    if fraction is None or is_missing(fraction):
        return MISSING
    text = f"{100 * fraction:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def interval(ends: Sequence[float]) -> str:
    """`+1.2 [-0.3, +2.6]` (of 100), of an estimate and the ends of its interval."""
    estimate, low, high, *_ = map(signed, ends)
    return f"{estimate} [{low}, {high}]"


def spread(value: Sequence[float | None] | None) -> str:
    """`42.0 ± 0.3` (of 100), of a mean and its deviation, or `42.0` without one; nothing of an empty value."""
    if not value:
        return MISSING if value is None else ""
    mean, deviation = value
    return percent(mean) if deviation is None else f"{percent(mean)} ± {percent(deviation)}"


def over_seeds(values: Iterable[float | None]) -> tuple[float, float | None] | None:
    """Mean and sample standard deviation (None for one value), missing values left out; None if all are missing."""
    numbers = [float(value) for value in values if value is not None and not is_missing(value)]
    return (fmean(numbers), stdev(numbers) if len(numbers) > 1 else None) if numbers else None


def rate(value: float | None) -> str:
    """Images a second: three significant digits."""
    if value is None or is_missing(value):
        return MISSING
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def amount(count: float | None) -> str:
    """4150000 -> "4.15 M": two decimals below 100, one above; k, M, G, T."""
    if count is None or is_missing(count):
        return MISSING
    size, unit = float(count), ""
    for larger in ("k", "M", "G", "T"):
        if size < 999.95:  # what would round to 1000.0 takes the next unit
            break
        size, unit = size / 1000, larger
    if not unit:
        return f"{size:.0f}"
    return f"{size:.2f} {unit}" if size < 99.995 else f"{size:.1f} {unit}"


def duration(seconds: float | None) -> str:
    """200 -> "3m 20s", 45 -> "45s", 3700 -> "1h 02m", 90000 -> "1d 01h"."""
    if seconds is None or is_missing(seconds):
        return MISSING
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h {minutes % 60:02d}m"
    hours = round(seconds / 3600)
    return f"{hours // 24}d {hours % 24:02d}h"


def setting(value: Any) -> str:
    """A setting as users type it: true, false, null, [480,960], {depth: 2}, both."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        return "[" + ",".join(setting(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {setting(item)}" for key, item in value.items()) + "}"
    return str(value)


def short(value: Any) -> str:
    """A setting as typed, its end cut off beyond 40 signs."""
    text = setting(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


@dataclass(frozen=True)
class Column:
    """key: the CSV header; values stand under it as measured (AP as a fraction, seconds, counts).
    title: the header people read. form: value -> text. shown: False for columns of the CSV alone. parts: endings of the
    CSV headers of a value with several numbers, such as an interval. below: where a terminal's table is wider than 80,
    in a line of its own."""

    key: str
    title: str = ""
    form: Callable[[Any], str] = setting
    right: bool = True
    shown: bool = True
    parts: tuple[str, ...] = ("",)
    below: bool = False


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
    return column.form(row[column.key]) if column.key in row else MISSING


def to_text(table: Table) -> str:
    """For a terminal: aligned, with rules; the caption above and the notes below, wrapped to the table's width."""
    columns, below = table.shown, []
    widths = _widths(table, columns)
    if sum(widths) + 2 * (len(widths) - 1) > 80:
        below = [column for column in columns if column.below]
        columns = [column for column in columns if not column.below]
        widths = _widths(table, columns)
    rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
    cells = [[column.title for column in columns], *([cell(row, column) for column in columns] for row in table.rows)]
    body = [
        "  ".join(
            text.rjust(width) if column.right else text.ljust(width)
            for text, width, column in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in cells
    ]
    for place, row in enumerate(table.rows if below else (), start=1):
        body[place] += "\n  " + "  ".join(cell(row, column) for column in below).rstrip()
    width = max(len(rule), 80)
    above = textwrap.wrap(table.caption, width)
    notes = [textwrap.fill(note, width, initial_indent="- ", subsequent_indent="  ") for note in table.notes]
    return "\n".join([*above, rule, body[0], rule, *body[1:], rule, *notes]) + "\n"


def _widths(table: Table, columns: Sequence[Column]) -> list[int]:
    return [max(len(text) for text in (one.title, *(cell(row, one) for row in table.rows))) for one in columns]


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
    if is_missing(value):
        return ""
    if isinstance(value, str):
        return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else value
    return repr(value) if isinstance(value, float) else setting(value)


def _latex(text: str) -> str:
    """What LaTeX would read as commands escaped, and the signs that its fonts lack replaced."""
    return "".join(_LATEX.get(sign, sign) for sign in " ".join(text.split()))


def _ampersands(cells: Iterable[str]) -> str:
    return " & ".join(_latex(text) for text in cells) + r" \\"


def _pipes(cells: Iterable[str]) -> str:
    return "| " + " | ".join(" ".join(text.split()).replace("|", "\\|") for text in cells) + " |"
