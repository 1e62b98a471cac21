"""A report as one HTML text: no network, no second file, nothing in it that runs but the page's own script.

Every text here is plain text: it is escaped, whatever it holds. Pictures become data: URIs in <img>, where a browser
runs no script of an SVG. A content-security policy allows the inlined style and script by their hashes, data: images,
and nothing else. Without JavaScript only sorting, the large pictures and the copy buttons are missing.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import jinja2

RowKind = Literal["ours", "paper", "quoted", "missing"]
PictureKind = Literal["svg", "png", "jpeg"]

MIME_TYPES = {"svg": "image/svg+xml", "png": "image/png", "jpeg": "image/jpeg"}
ROW_TAGS = {"ours": "", "paper": "paper", "quoted": "quoted", "missing": "not run"}
OWN_IDS = ("top", "content", "contents", "viewer", "viewer-title", "announcement")  # of the template


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    text: what stands in it. detail: a second, smaller line under it: an interval, a spread.
    sort: what a click on the header sorts by: in a numeric column a number, None or NaN where the value is missing
        (missing ones come last in both directions); in a text column a text, None for `text` itself.
    title: a tooltip, for what the cell can do without. note: the text is a remark, not a value ("not run"), set muted.
    """

    text: str
    sort: float | str | None = None
    title: str = ""
    note: bool = False
    detail: str = ""


@dataclass(frozen=True)
class ReportColumn:
    """title: the header. numeric: set flush right, sorted by number, largest first at the first click.
    tooltip: what the header means, for those with a mouse; what all must know belongs into the table's notes."""

    title: str
    numeric: bool = False
    tooltip: str = ""


@dataclass(frozen=True)
class ReportRow:
    """cells: one a column; the first names the row and stays in view. kind: whose numbers these are; all but "ours"
    carry a small tag beside the name: "paper", "quoted" (from other papers), "not run" (missing)."""

    cells: tuple[Cell, ...]
    kind: RowKind = "ours"


@dataclass(frozen=True)
class ReportTable:
    """id: of the element in the page. caption: the table's name and what it was measured on.
    notes: a list below it. commands: what to type to fill its missing cells, shown as one block to copy."""

    id: str
    caption: str
    columns: tuple[ReportColumn, ...]
    rows: tuple[ReportRow, ...]
    notes: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()


@dataclass(frozen=True)
class Picture:
    """alt: what it shows, for those who do not see it; never empty. data: the bytes of the file.
    width, height: in CSS pixels, the size at which it is meant to be seen on a wide screen.
    caption: a text below it, "" for none. SVGs without a background of their own stand on a white card."""

    alt: str
    data: bytes
    kind: PictureKind
    width: int
    height: int
    caption: str = ""


@dataclass(frozen=True)
class GalleryItem:
    """One image seen by several. pictures: (label, picture) side by side: ground truth, plain, MSIL.
    sort: the items with the largest stand first; equal ones stay in the order given."""

    title: str
    pictures: tuple[tuple[str, Picture], ...]
    note: str = ""
    sort: float = 0.0


@dataclass(frozen=True)
class Gallery:
    """label: its name, shown above it. Each picture opens large; left and right go on to the next picture, up and
    down to the next item."""

    id: str
    label: str
    items: tuple[GalleryItem, ...]


@dataclass(frozen=True)
class Section:
    """In this order: title, paragraphs, tables, pictures, galleries, subsections. id: what a link to it ends in."""

    id: str
    title: str
    paragraphs: tuple[str, ...] = ()
    tables: tuple[ReportTable, ...] = ()
    pictures: tuple[Picture, ...] = ()
    galleries: tuple[Gallery, ...] = ()
    subsections: tuple[Section, ...] = ()


@dataclass(frozen=True)
class Report:
    """title: of the page. paragraphs: its lead. footer: how and from what the page was made."""

    title: str
    paragraphs: tuple[str, ...]
    sections: tuple[Section, ...]
    footer: str = ""


def render(report: Report) -> str:
    """The page. Characters that HTML cannot hold (controls, lone surrogates of odd file names) become U+FFFD.

    ValueError: an id is used twice or is not a plain one, a row has not one cell a column, a numeric column is to be
    sorted by text or a text column by number, or a picture has no alt.
    """
    _check(report)
    style, script = _asset("report.css"), _asset("report.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    template = _environment().get_template("report.html.j2")
    return template.render(report=report, policy=policy, style=style, script=script)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("msil.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_clean,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["data_uri"] = _data_uri
    environment.filters["sort_value"] = _sort_value
    environment.filters["row_tag"] = ROW_TAGS.__getitem__
    environment.filters["largest_first"] = lambda items: sorted(items, key=lambda item: -item.sort)
    return environment


def _asset(name: str) -> str:
    """CSS or JavaScript of this package, as it is put into the page: the hash is of these very characters."""
    return (resources.files("msil.reporting") / "templates" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _clean(value: Any) -> Any:
    """A text as every HTML parser reads it back; anything else as it is (what the template marks as safe: our own
    style, script and macros)."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    text = value.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub("[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]", "\ufffd", text)


def _data_uri(picture: Picture) -> str:
    return f"data:{MIME_TYPES[picture.kind]};base64,{base64.b64encode(picture.data).decode()}"


def _sort_value(cell: Cell, column: ReportColumn) -> str:
    """What the script compares; "" for a missing value. A number is written so that JavaScript reads the same one."""
    if not column.numeric:
        return cell.text if cell.sort is None else str(cell.sort)
    value = math.nan if cell.sort is None else float(cell.sort)
    return "" if math.isnan(value) else repr(value).replace("inf", "Infinity")


def _check(report: Report) -> None:
    seen: set[str] = set(OWN_IDS)
    for name in _ids(report.sections):
        if not re.fullmatch("[A-Za-z][A-Za-z0-9_-]*", name):
            raise ValueError(f"{name!r} cannot be an id: use letters, digits, - and _, a letter first")
        if name in seen:
            raise ValueError(f"the id {name!r} is used twice: ids are unique in a page, and {OWN_IDS} are its own")
        seen.add(name)
    for section in _walk(report.sections):
        for table in section.tables:
            _check_table(table)
        shown = [picture for gallery in section.galleries for item in gallery.items for _, picture in item.pictures]
        for picture in (*section.pictures, *shown):
            if not picture.alt.strip():
                raise ValueError(f"a picture in section {section.id!r} has no alt: say in words what it shows")


def _check_table(table: ReportTable) -> None:
    for i, row in enumerate(table.rows):
        if len(row.cells) != len(table.columns):
            raise ValueError(
                f"row {i} of table {table.id!r} has {len(row.cells)} cells, but there are {len(table.columns)} columns"
            )
        for cell, column in zip(row.cells, table.columns, strict=True):
            if cell.sort is not None and isinstance(cell.sort, str) == column.numeric:
                kind = "a number" if column.numeric else "a text"
                raise ValueError(
                    f"column {column.title!r} of table {table.id!r} sorts by {kind}, but row {i} gives {cell.sort!r}"
                )


def _ids(sections: tuple[Section, ...]) -> Iterator[str]:
    """Every id that the page gets from the report, those that the template derives among them."""
    for section in _walk(sections):
        yield section.id
        for table in section.tables:
            yield from (table.id, f"{table.id}-caption")
        for gallery in section.galleries:
            yield from (gallery.id, f"{gallery.id}-label")


def _walk(sections: tuple[Section, ...]) -> Iterator[Section]:
    for section in sections:
        yield section
        yield from _walk(section.subsections)
