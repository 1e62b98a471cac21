"""The page as text, read back by the parser of the standard library: what a browser would find in it."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import itertools
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from msil.reporting.page import (
    Cell,
    Gallery,
    GalleryItem,
    Picture,
    Report,
    ReportColumn,
    ReportRow,
    ReportTable,
    Section,
    render,
)

from .sample_page import HOSTILE, sample, with_texts

DOT = Picture("a dot", b"<svg xmlns='http://www.w3.org/2000/svg' width='1' height='1'/>", "svg", 1, 1)


class Parsed(HTMLParser):
    """elements: (tag, attributes) in order. texts: the text nodes, without the white space around them."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), f"an attribute twice in {tag}: {attrs}"
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def values(self, attribute: str) -> list[str]:
        return [attributes[attribute] or "" for _, attributes in self.elements if attribute in attributes]


def hostile(start: int = 0) -> tuple[Report, list[str]]:
    """The sample with hostile texts everywhere, each numbered so that every one must be found; and the texts."""
    used: list[str] = []

    def text() -> str:
        used.append(f"{HOSTILE[(start + len(used)) % len(HOSTILE)]} [{len(used)}]")
        return used[-1]

    return with_texts(sample(), text), used


def readable(text: str) -> str:
    """By hand: what must come out where HTML cannot hold the character."""
    return text.replace("\0", "�").replace("\x1b", "�").replace("\udcff", "�").replace("\r", "\n").replace("\x07", "�")


def page_of(*sections: Section) -> Parsed:
    return Parsed(render(Report("Report", (), sections)))


@pytest.mark.parametrize("start", range(len(HOSTILE)))
def test_hostile_texts_are_texts(start: int) -> None:
    report, used = hostile(start)
    parsed = Parsed(render(report))
    harmless = Parsed(render(with_texts(sample(), lambda: "harmless")))
    shape = [(tag, sorted(attributes)) for tag, attributes in parsed.elements]
    assert shape == [(tag, sorted(attributes)) for tag, attributes in harmless.elements]

    found = {*parsed.texts, *itertools.chain.from_iterable(attributes.values() for _, attributes in parsed.elements)}
    block = next(text for text in parsed.texts if text.endswith(readable(last_command(report))))  # one for all commands
    missing = [text for text in map(readable, used) if text not in found and text not in block]
    assert missing == []


def last_command(report: Report) -> str:
    return report.sections[0].subsections[0].tables[0].commands[-1]


def test_policy_allows_the_inlined_style_and_script_alone() -> None:
    page = render(hostile()[0])
    hashes = {}
    for tag in ("style", "script"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        hashes[tag] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    (policy,) = (meta["content"] for meta in Parsed(page).all("meta") if "http-equiv" in meta)
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes['style']}'; "
        f"script-src 'sha256-{hashes['script']}'; base-uri 'none'; form-action 'none'"
    )


def test_nothing_comes_from_outside() -> None:
    page = render(hostile()[0])
    parsed = Parsed(page)
    loading = {"link", "base", "iframe", "frame", "object", "embed", "video", "audio", "source", "track", "svg", "form"}
    assert not loading & {tag for tag, _ in parsed.elements}
    assert all(re.match("data:image/(png|jpeg|svg\\+xml);base64,[A-Za-z0-9+/=]+$", one) for one in parsed.values("src"))
    assert all(re.match("#[a-z0-9-]+$", one) for one in parsed.values("href"))
    names = {name for _, attributes in parsed.elements for name in attributes}
    assert not {name for name in names if name.startswith("on")} | names & {"style", "srcset", "action", "background"}
    (style,) = re.findall("<style>(.*?)</style>", page, flags=re.DOTALL)
    assert "url(" not in style and "@import" not in style
    page.encode()  # no lone surrogate is left


def test_structure_is_sound() -> None:
    parsed = Parsed(render(sample()))
    ids = parsed.values("id")
    assert len(ids) == len(set(ids))
    assert {one[1:] for one in parsed.values("href")} | set(parsed.values("aria-labelledby")) <= set(ids)
    levels = [int(tag[1]) for tag, _ in parsed.elements if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert [len(parsed.all(tag)) for tag in ("header", "nav", "main", "footer")] == [1, 1, 1, 1]
    assert parsed.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in parsed.all("meta")
    assert len(parsed.all("caption")) == len(parsed.all("table")) == 2
    assert {one["scope"] for one in parsed.all("th")} == {"col", "row"}
    assert [one["tabindex"] for one in parsed.all("div") if one.get("role") == "region"] == ["0", "0"]
    assert all(one["alt"] and one["width"] and one["height"] for one in parsed.all("img"))
    assert parsed.elements.index(("a", {"class": "skip", "href": "#content"})) < parsed.elements.index(
        ("header", {"id": "top"})
    )


def test_pictures_keep_their_bytes() -> None:
    pictures = tuple(Picture(kind, f"bytes of {kind}".encode(), kind, 3, 2) for kind in ("svg", "png", "jpeg"))
    images = page_of(Section("a", "A", pictures=pictures)).all("img")
    decoded = [(str(one["src"]).split(",")[0], base64.b64decode(str(one["src"]).split(",")[1])) for one in images]
    assert decoded == [
        ("data:image/svg+xml;base64", b"bytes of svg"),
        ("data:image/png;base64", b"bytes of png"),
        ("data:image/jpeg;base64", b"bytes of jpeg"),
    ]


def test_gallery_shows_the_largest_first() -> None:
    scores = {"a": 1.0, "b": 3.0, "c": 1.0, "d": -2.0, "e": 3.0}
    items = tuple(GalleryItem(name, (("left", DOT),), sort=score) for name, score in scores.items())
    figures = page_of(Section("s", "S", galleries=(Gallery("g", "G", items),))).all("figure")
    assert [one["data-title"] for one in figures] == ["b", "e", "a", "c", "d"]  # equal ones in the order given


def test_rows_tell_whose_numbers_they_are() -> None:
    rows = tuple(ReportRow((Cell(kind),), kind) for kind in ("ours", "paper", "quoted", "missing"))
    parsed = page_of(Section("s", "S", tables=(ReportTable("t", "T", (ReportColumn("name"),), rows),)))
    assert [one.get("class") for one in parsed.all("tr")] == [None, "ours", "paper", "quoted", "missing"]
    start = parsed.texts.index("name") + 1
    assert parsed.texts[start : start + 7] == ["ours", "paper", "paper", "quoted", "quoted", "missing", "not run"]


@pytest.mark.parametrize(
    ("numeric", "sort", "written"),
    [
        (True, 0.1 + 0.2, "0.30000000000000004"),
        (True, 7, "7.0"),
        (True, -1e-9, "-1e-09"),
        (True, -math.inf, "-Infinity"),  # as JavaScript spells it
        (True, math.nan, ""),
        (True, None, ""),
        (False, None, "shown"),
        (False, "other", "other"),
        (False, "", ""),
    ],
)
def test_sort_values(numeric: bool, sort: Any, written: str) -> None:
    table = ReportTable("t", "T", (ReportColumn("c", numeric),), (ReportRow((Cell("shown", sort),)),))
    assert page_of(Section("s", "S", tables=(table,))).values("data-sort") == [written]


def test_smallest_reports() -> None:
    assert Parsed(render(Report("Nothing yet", (), ()))).all("table") == []
    empty = Section("s", "S", tables=(ReportTable("t", "T", (), ()),), galleries=(Gallery("g", "G", ()),))
    assert len(page_of(empty).all("table")) == 1


def test_deep_sections_stay_at_the_last_heading() -> None:
    section = Section("s7", "S")
    for level in range(6, 0, -1):
        section = Section(f"s{level}", "S", subsections=(section,))
    tags = [tag for tag, _ in page_of(section).elements if re.fullmatch("h[1-9]", tag)]
    assert tags == ["h1", "h2", "h2", "h3", "h4", "h5", "h6", "h6", "h6"]  # the second is the contents'


TABLE = ReportTable("t", "T", (ReportColumn("name"), ReportColumn("AP", numeric=True)), ())
NAMELESS = GalleryItem("i", (("l", dataclasses.replace(DOT, alt="")),))
WRONG = {
    "a section's id twice": ((Section("s", "S"), Section("s", "S")), "'s' is used twice"),
    "a subsection's id": ((Section("s", "S", subsections=(Section("s", "S"),)),), "'s' is used twice"),
    "a table's id": ((Section("t", "S", tables=(TABLE,)),), "'t' is used twice"),
    "an id made of a table's": ((Section("t-caption", "S", tables=(TABLE,)),), "'t-caption' is used twice"),
    "the page's own id": ((Section("content", "S"),), "'content' is used twice"),
    "an id with a space": ((Section("a b", "S"),), "'a b' cannot be an id"),
    "no id": ((Section("", "S"),), "'' cannot be an id"),
    "a short row": (
        (Section("s", "S", tables=(dataclasses.replace(TABLE, rows=(ReportRow((Cell("a"),)),)),)),),
        "row 0 of table 't' has 1 cells, but there are 2 columns",
    ),
    "a number sorted by text": (
        (Section("s", "S", tables=(dataclasses.replace(TABLE, rows=(ReportRow((Cell("a"), Cell("1", "1"))),)),)),),
        "column 'AP' of table 't' sorts by a number, but row 0 gives '1'",
    ),
    "a text sorted by number": (
        (Section("s", "S", tables=(dataclasses.replace(TABLE, rows=(ReportRow((Cell("a", 1), Cell("1"))),)),)),),
        "column 'name' of table 't' sorts by a text, but row 0 gives 1",
    ),
    "a picture without alt": (
        (Section("s", "S", pictures=(dataclasses.replace(DOT, alt=" "),)),),
        "a picture in section 's' has no alt",
    ),
    "a gallery's picture without alt": (
        (Section("s", "S", galleries=(Gallery("g", "G", (NAMELESS,)),)),),
        "a picture in section 's' has no alt",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_reports_are_refused(case: str) -> None:
    sections, message = WRONG[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        render(Report("Report", (), sections))
