"""The page in a real browser, opened from disk: what it shows, what it does at a click or a key, and what it must not.

One browser serves all tests; each opens its page anew.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from msil.reporting.page import Picture, Report, render

from .browser import Browser, complaints, requests
from .sample_page import AP_COLUMN, HOSTILE, sample, with_texts

PHONE, DESK = (390, 844), (1440, 900)
SPYING_SVG = b"""<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9" onload="top.hacked = 1">
<script>top.hacked = 1</script><image href="http://127.0.0.1:9/spy.png" width="9" height="9"/>
<foreignObject width="9" height="9"><img xmlns="http://www.w3.org/1999/xhtml" src="x" onerror="top.hacked = 1"/>
</foreignObject></svg>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "a report.html"
    file.write_text(render(sample()), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = itertools.cycle(HOSTILE)
    report = with_texts(sample(), lambda: next(texts))
    spy = Picture(HOSTILE[0], SPYING_SVG, "svg", 9, 9, HOSTILE[1])
    section = dataclasses.replace(report.sections[-1], pictures=(spy,))
    file = tmp_path_factory.mktemp("hostile") / "report.html"
    file.write_text(render(Report(report.title, report.paragraphs, (*report.sections[:-1], section))), encoding="utf-8")
    return file


def names_of_rows(browser: Browser) -> list[str]:
    return browser.evaluate(
        "[...document.querySelectorAll('#table1 tbody tr')].map((row) =>"
        " row.cells[0].firstChild.textContent.trim() + ' ' + row.cells[1].textContent)"
    )


def sorting(browser: Browser) -> list[str | None]:
    return browser.evaluate("[...document.querySelectorAll('#table1 thead th')].map((th) => th.ariaSort)")


def accessible(browser: Browser) -> list[tuple[str, str]]:
    """(role, name) of everything that a screen reader is told of."""
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    return [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node.get("ignored", False)
    ]


def header(column: int) -> str:
    return f"#table1 thead th:nth-child({column + 1}) button"


@pytest.mark.parametrize("size", [PHONE, DESK])
def test_opens_quietly(browser: Browser, page: Path, size: tuple[int, int]) -> None:
    browser.open(page, width=size[0], height=size[1])
    assert complaints(browser) == []
    assert requests(browser) == {page.as_uri(), "data:"}
    images = browser.evaluate("[...document.images].map((image) => [image.naturalWidth, image.alt.trim().length])")
    assert len(images) == 3 + 6 * 3  # charts, gallery
    assert all(width > 0 and alt > 0 for width, alt in images)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("size", [PHONE, DESK])
@pytest.mark.parametrize("which", ["page", "hostile_page"])
def test_readable(
    browser: Browser, request: pytest.FixtureRequest, which: str, size: tuple[int, int], dark: bool
) -> None:
    browser.open(request.getfixturevalue(which), width=size[0], height=size[1], dark=dark)
    assert browser.evaluate("[innerWidth, document.scrollingElement.scrollWidth]") == [size[0], size[0]]
    sizes = browser.evaluate(
        "[...document.querySelectorAll('p, li, th, td, pre, caption, figcaption, nav a, button')]"
        ".filter((one) => one.checkVisibility()).map((one) => parseFloat(getComputedStyle(one).fontSize))"
    )
    assert len(sizes) > 100 and min(sizes) >= 14
    assert min(contrasts(browser)) >= 4.5  # WCAG 2.2, 1.4.3


def contrasts(browser: Browser) -> list[float]:
    """Of every kind of text against the page: (lighter + 0.05) / (darker + 0.05), relative luminance by WCAG."""
    colours = browser.evaluate(
        "[document.body, ...document.querySelectorAll('p, a, th, td, .tag, .detail, .note, figcaption, .notes')]"
        ".map((one) => getComputedStyle(one).color).concat(getComputedStyle(document.body).backgroundColor)"
    )
    lights = [luminance([float(part) / 255 for part in one[4:-1].split(",")]) for one in colours]
    return [(max(one, lights[-1]) + 0.05) / (min(one, lights[-1]) + 0.05) for one in set(lights[:-1])]


def luminance(rgb: list[float]) -> float:
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_wide_table_scrolls_in_its_own_frame(browser: Browser, page: Path) -> None:
    browser.open(page, width=PHONE[0], height=PHONE[1])
    browser.evaluate("document.querySelector('#table1 .scroll').focus()")
    assert browser.evaluate("document.activeElement.className") == "scroll"
    before, after = (
        browser.evaluate(
            f"(() => {{ const frame = document.querySelector('#table1 .scroll'); frame.scrollLeft = {left};"
            " return ['tbody th', 'tbody td', 'caption span'].map((one) => frame.querySelector(one)"
            ".getBoundingClientRect().left); })()"
        )
        for left in (0, 200)
    )
    assert after == [before[0], before[1] - 200, before[2]]  # names and caption stay in view


def test_a_click_sorts(browser: Browser, page: Path) -> None:
    browser.open(page)
    missing = ["FCOS ResNet-101 none", "FCOS ResNet-101 both"]  # last in both directions, in the order given
    rising = ["FCOS ResNet-50 none", "FCOS ResNet-50 both", "VFNet ResNet-50 both", "VFNet ResNet-50 none"]
    assert sorting(browser) == [None] * 10
    browser.click(header(AP_COLUMN))
    assert names_of_rows(browser) == [*rising[::-1], *missing]  # numbers: the largest first
    assert sorting(browser) == [None] * AP_COLUMN + ["descending"] + [None] * 6
    assert browser.evaluate("document.querySelector('[role=status]').textContent") == "Sorted by AP, descending."
    browser.click(header(AP_COLUMN))
    assert names_of_rows(browser) == [*rising, *missing]
    assert sorting(browser)[AP_COLUMN] == "ascending"

    browser.click(header(1))  # texts: A to Z; equal ones stay as they stood
    both = ["FCOS ResNet-50 both", "VFNet ResNet-50 both", "FCOS ResNet-101 both"]
    none = ["FCOS ResNet-50 none", "VFNet ResNet-50 none", "FCOS ResNet-101 none"]
    assert names_of_rows(browser) == [*both, *none]
    assert sorting(browser) == [None, "ascending"] + [None] * 8
    browser.click(header(1))
    assert names_of_rows(browser) == [*none, *both]

    browser.click(header(0))  # numbers inside texts count: ResNet-50 before ResNet-101
    assert [name.rsplit(" ", 1)[0] for name in names_of_rows(browser)] == [
        *2 * ["FCOS ResNet-50"], *2 * ["FCOS ResNet-101"], *2 * ["VFNet ResNet-50"]
    ]  # fmt: skip
    assert complaints(browser) == []


def test_the_keyboard_sorts(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.press("Tab")
    assert browser.evaluate("document.activeElement.className") == "skip"  # the first stop of all
    browser.evaluate("document.querySelector('#table1 .scroll').focus()")
    for _ in range(AP_COLUMN + 1):
        browser.press("Tab")
    assert browser.evaluate("document.activeElement.textContent") == "AP"
    assert browser.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.press("Enter")
    assert names_of_rows(browser)[0] == "VFNet ResNet-50 none"
    assert sorting(browser)[AP_COLUMN] == "descending"
    assert browser.evaluate("document.activeElement.textContent") == "AP"  # and the focus stays where it was


@pytest.mark.parametrize("how", ["click", "Enter"])
def test_a_picture_opens_large(browser: Browser, page: Path, how: str) -> None:
    browser.open(page)
    button = ".item:nth-child(2) .picture:nth-child(3) button"
    if how == "click":
        browser.click(button)
    else:
        browser.evaluate(f"document.querySelector({json.dumps(button)}).focus()")
        browser.press("Enter")
    assert in_viewer(browser) == ["val/000004.png: MSIL", "6 of 18", "Image 4, MSIL"]
    image = "viewer.querySelector('img').getBoundingClientRect()"
    assert browser.evaluate(f"{image}.width") > 1300 and browser.evaluate(f"{image}.height") > 750
    for key, title in (
        ("ArrowRight", "val/000003.png: Ground truth"),
        ("ArrowLeft", "val/000004.png: MSIL"),
        ("ArrowUp", "val/000005.png: MSIL"),
        ("ArrowDown", "val/000004.png: MSIL"),
        ("ArrowLeft", "val/000004.png: Plain"),
        ("ArrowRight", "val/000004.png: MSIL"),
    ):
        browser.press(key)
        assert in_viewer(browser)[0] == title
    browser.press("Escape")
    assert not browser.evaluate("viewer.open")
    browser.wait_for(f"document.activeElement === document.querySelector({json.dumps(button)})")
    assert complaints(browser) == []


def in_viewer(browser: Browser) -> list[str]:
    assert browser.evaluate("viewer.open && viewer.querySelectorAll('img').length === 1")
    return browser.evaluate(
        "[viewer.querySelector('.viewer-title').textContent, viewer.querySelector('.viewer-count').textContent,"
        " viewer.querySelector('img').alt]"
    )


def test_the_buttons_of_the_large_picture(browser: Browser, page: Path) -> None:
    browser.open(page, width=PHONE[0], height=PHONE[1])
    browser.click("#curves .picture button")
    assert in_viewer(browser)[:2] == ["Training: AP by epoch", "1 of 2"]
    browser.click("[data-step='-1']")  # round to the last
    assert in_viewer(browser)[:2] == ["Training: Loss", "2 of 2"]
    browser.press("ArrowDown")  # charts have no items to go to
    assert in_viewer(browser)[:2] == ["Training: Loss", "2 of 2"]
    browser.click("[data-close]")
    assert not browser.evaluate("viewer.open")
    browser.wait_for("document.activeElement.firstChild?.alt?.startsWith('Loss over the steps')")  # the one last shown


@pytest.mark.parametrize(
    ("allowed", "label", "where"),
    [
        (["clipboardSanitizedWrite", "clipboardReadWrite"], "Copied", "navigator.clipboard.readText()"),
        (["geolocation"], "Selected: press Ctrl+C", "getSelection().toString()"),  # all others are denied
    ],
)
def test_commands_can_be_copied(browser: Browser, page: Path, allowed: list[str], label: str, where: str) -> None:
    browser.call("Browser.grantPermissions", permissions=allowed)
    browser.open(page)
    browser.click(".commands button")
    browser.wait_for("document.querySelector('.commands button').textContent !== 'Copy'")
    assert browser.evaluate("document.querySelector('.commands button').textContent") == label
    copied = browser.evaluate(where).split("\n")
    browser.call("Browser.resetPermissions")
    assert copied == list(sample().sections[0].subsections[0].tables[0].commands)


def test_what_a_screen_reader_is_told(browser: Browser, page: Path) -> None:
    browser.open(page)
    nodes = accessible(browser)
    roles = [role for role, _ in nodes]
    assert [roles.count(role) for role in ("main", "navigation", "banner", "contentinfo")] == [1, 1, 1, 1]
    tables = [name for role, name in nodes if role == "table"]
    assert [name.split(",")[0].split(":")[0] for name in tables] == ["Table 1", "Table 3"]
    assert ("navigation", "Contents") in nodes
    assert ("group", "Six validation images of 200") in nodes
    for role in ("button", "image", "link", "region", "columnheader", "rowheader", "heading"):
        names = [name for one, name in nodes if one == role]
        assert names and all(name.strip() for name in names), f"a {role} without a name: {names}"
    assert ("button", "Image 5, Ground truth") in nodes
    assert ("columnheader", "Difference to plain") in nodes  # the arrow is not read out
    browser.click(header(AP_COLUMN))
    browser.click(".item .picture button")
    assert ("dialog", "val/000005.png: Ground truth") in accessible(browser)


def test_without_javascript(browser: Browser, page: Path) -> None:
    browser.open(page, script=False)
    assert browser.evaluate("[...document.images].every((image) => image.naturalWidth > 0)")
    # No button that would do nothing:
    buttons = "[...document.querySelectorAll('button')].filter((one) => one.checkVisibility())"
    assert browser.evaluate(f"{buttons}.length") == 0
    assert len(names_of_rows(browser)) == 6
    assert complaints(browser) == []


def test_hostile_texts_do_nothing(browser: Browser, hostile_page: Path) -> None:
    browser.open(hostile_page)
    browser.click(header(AP_COLUMN))
    browser.click(header(0))
    browser.click("#images .chart button")
    browser.press("Escape")
    browser.click(".gallery .picture button")
    for key in ("ArrowRight", "ArrowDown", "Escape"):
        browser.press(key)
    assert browser.evaluate("typeof window.hacked") == "undefined"
    assert complaints(browser) == []
    assert requests(browser) == {hostile_page.as_uri(), "data:"}
    assert browser.evaluate("document.querySelectorAll('script').length") == 1


@pytest.mark.parametrize(
    ("attempt", "directive"),
    [
        ("Object.assign(document.createElement('script'), { textContent: 'window.hacked = 1' })", "script-src-elem"),
        ("Object.assign(document.createElement('img'), { src: 'http://127.0.0.1:9/spy.png' })", "img-src"),
        ("Object.assign(document.createElement('style'), { textContent: 'p { color: red }' })", "style-src-elem"),
        ("Object.assign(document.createElement('iframe'), { src: 'http://127.0.0.1:9/' })", "frame-src"),
    ],
)
def test_the_policy_holds(browser: Browser, page: Path, attempt: str, directive: str) -> None:
    """Were something to get past the escaping after all: the browser itself refuses it."""
    browser.open(page)
    refused = browser.evaluate(
        "new Promise((done) => { document.addEventListener('securitypolicyviolation',"
        f" (event) => done(event.effectiveDirective)); document.body.append({attempt});"
        " setTimeout(() => done('nothing'), 2000); })"
    )
    assert refused == directive
    assert browser.evaluate("typeof window.hacked") == "undefined"
    # The browser tells of a request before it asks the policy; none may have come further.
    asked = [event["params"] for event in browser.events if event["method"] == "Network.requestWillBeSent"]
    outside = {one["requestId"] for one in asked if one["request"]["url"].startswith("http")}
    ended = [event["params"] for event in browser.events if event["method"] == "Network.loadingFailed"]
    assert outside == {one["requestId"] for one in ended if one.get("blockedReason") == "csp"}
