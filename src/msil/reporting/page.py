"""A report as one HTML text: no network, no second file, no script.

Every text here is plain text: it is escaped, whatever it holds. Pictures become data: URIs in <img>, where a browser
runs no script of an SVG. A content-security policy allows the inlined style and data: images, and nothing else.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import jinja2

from msil.reporting.tables import Table, cell

MIME_TYPES = {"svg": "image/svg+xml", "jpeg": "image/jpeg"}
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


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
class Section:
    """In this order: title, paragraphs, tables, pictures, subsections."""

    title: str
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    subsections: tuple[Section, ...] = ()


def render(title: str, paragraphs: tuple[str, ...], sections: tuple[Section, ...], footer: str) -> str:
    """The page. Characters that HTML cannot hold (controls, lone surrogates of odd file names) become U+FFFD."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("msil.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(cell=cell)
    return environment.get_template("report.html.j2").render(
        title=title,
        paragraphs=paragraphs,
        sections=sections,
        footer=footer,
        policy=POLICY,
        style=(resources.files("msil.reporting") / "templates" / "report.css").read_text(encoding="utf-8"),
    )


def _clean(value: Any) -> Any:
    """A text as every HTML parser reads it back; anything else (what the template marks as safe) as it is."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    text = value.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub("[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]", "\ufffd", text)
