"""The page as text, read back by the parser of the standard library: what a browser would find in it."""

from __future__ import annotations

import base64
import hashlib
from html.parser import HTMLParser
from typing import Any

from msil.reporting.page import Curves, Picture, Section, render
from msil.reporting.tables import Column, Table

HOSTILE = (
    '<script>alert("x")</script>', '"><img src=x onerror=alert(1)>', "</style></title><b>", "{{ 7 * 7 }}{% raw %}",
    "&lt;i&gt; &amp;", "\0\x1b\x07 \udcff", "' onmouseover='alert(1)",
)  # fmt: skip


class Parsed(HTMLParser):
    """elements: (tag, attributes) in order. texts: all text nodes and attribute values. text: the nodes as one."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts += [value or "" for _, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())
        self.text = " ".join([self.text, *data.split()])

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page(text: str) -> str:
    """A page that has `text` wherever a text can stand."""
    picture = Picture(f"alt {text}", b"<svg/>", "svg", 10, text)
    row: dict[str, Any] = {"name": text, "number": 0.5}
    table = Table(text, (Column("name", text, str), Column("number", "number")), (row,), (text,))
    curves = Curves("<svg></svg>", (("a-", text, "red"), ("b-", text, "red")))
    inner = Section(text, (text,), (table,), curves, (picture,), (Section(text, folded=True),))
    return render(text, (Section("outer", subsections=(inner,)),), text)


def test_hostile_texts_are_texts() -> None:
    tags = [tag for tag, _ in Parsed(page("plain")).elements]
    for text in HOSTILE:
        parsed = Parsed(page(text))
        assert [tag for tag, _ in parsed.elements] == tags
        wanted = text.replace("\0", "\ufffd").replace("\x1b", "\ufffd").replace("\x07", "\ufffd")
        assert parsed.texts.count(wanted.replace("\udcff", "\ufffd")) >= 12
        page(text).encode()


def test_nothing_comes_from_outside_and_nothing_runs_but_the_pages_own_script() -> None:
    parsed = Parsed(page("plain"))
    assert not parsed.all("link") and parsed.all("script") == [{}]
    assert {(one["src"] or "").partition(",")[0] for one in parsed.all("img")} == {"data:image/svg+xml;base64"}
    (policy,) = (one.get("content") for one in parsed.all("meta") if one.get("http-equiv") == "Content-Security-Policy")
    script = page("plain").partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy is not None and "default-src 'none'" in policy and f"script-src 'sha256-{digest}';" in policy
    assert "url(" not in page("plain") and "@import" not in page("plain")


def test_links_lead_to_the_first_sections() -> None:
    parsed = Parsed(page("plain"))
    assert [one["href"] for one in parsed.all("a")] == [f"#{parsed.all('section')[0]['id']}"]
