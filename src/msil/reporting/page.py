"""A report as one HTML text: no network, no second file.

Every text here is plain text: it is escaped, whatever it holds. Pictures become data: URIs in <img>, where a browser
runs no script of an SVG. A content-security policy allows the inlined style, data: images and the one script by its
hash, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import jinja2

from msil.reporting.tables import Column, Table, cell, is_missing

MIME_TYPES = {"svg": "image/svg+xml", "jpeg": "image/jpeg"}
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{}'; base-uri 'none'; "
    "form-action 'none'"
)


@dataclass(frozen=True)
class Picture:
    """alt: what it shows, for those who do not see it. data: the bytes of the file. width: in CSS pixels, on a wide
    screen. caption: a text below it."""

    alt: str
    data: bytes
    kind: Literal["svg", "jpeg"]
    width: int
    caption: str = ""

    @property
    def uri(self) -> str:
        return f"data:{MIME_TYPES[self.kind]};base64,{base64.b64encode(self.data).decode()}"


@dataclass(frozen=True)
class Curves:
    """A chart whose lines are shown by choice. svg: of our own making, no text of a user in it. lines: of each the
    start of its elements' ids, its name and its colour; the first two are shown at first."""

    svg: str
    lines: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Section:
    """In this order: title, paragraphs, tables, curves, pictures, subsections. folded: closed until it is clicked."""

    title: str
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    curves: Curves | None = None
    pictures: tuple[Picture, ...] = ()
    subsections: tuple[Section, ...] = ()
    folded: bool = False


def render(title: str, sections: tuple[Section, ...], footer: str) -> str:
    """The page. Characters that HTML cannot hold (controls, lone surrogates of odd file names) become U+FFFD."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("msil.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(cell=cell, sort_value=sort_value)
    style, script = ((resources.files("msil.reporting") / "templates" / name).read_text(encoding="utf-8")
                     for name in ("report.css", "report.js"))  # fmt: skip
    return environment.get_template("report.html.j2").render(
        title=title,
        sections=sections,
        footer=footer,
        policy=POLICY.format(base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()),
        style=style,
        script=script,
    )


def sort_value(row: Mapping[str, Any], column: Column) -> str:
    """What a column is sorted by: of a mean or an estimate with its interval the first; texts as they are shown."""
    value = row.get(column.key)
    value = value[0] if isinstance(value, tuple) and value else value
    return repr(float(value)) if isinstance(value, int | float) and not is_missing(value) else ""


def _clean(value: Any) -> Any:
    """A text as every HTML parser reads it back; anything else (what the template marks as safe) as it is."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    text = value.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub("[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]", "\ufffd", text)
