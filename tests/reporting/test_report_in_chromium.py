"""A whole report, of runs whose classes and folders have hostile names, opened from disk in a real browser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from msil.reporting.report import write_report

from .browser import Browser
from .made_runs import write_runs

CLASSES = ('<img src=x onerror="window.hacked=1">', '"><script>window.hacked=1</script>$x^2$')
NAME = "</title><script>window.hacked=1</script>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium on PATH: Debian's package is called chromium")
    one = Browser(program, tmp_path_factory.mktemp("profile"))
    yield one
    one.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    write_runs(folder, CLASSES)
    for path in (folder / "runs").glob("*/result.json"):
        result = json.loads(path.read_text())
        result["run_name"] += NAME
        result["command"] += " " + NAME
        path.write_text(json.dumps(result))
    write_report(folder / "runs", folder / "report", say=lambda line: None)
    return folder / "report" / "report.html"


@pytest.mark.parametrize(("width", "dark"), [(390, True), (1440, False)])
def test_a_report_of_hostile_names_opens_quietly(browser: Browser, report: Path, width: int, dark: bool) -> None:
    browser.open(report, width=width, height=900, dark=dark)
    assert browser.complaints() == []
    assert browser.requests() == {report.as_uri(), "data:"}
    assert browser.evaluate("window.hacked") is None
    assert browser.evaluate("[innerWidth, document.scrollingElement.scrollWidth]") == [width, width]
    images = browser.evaluate("[...document.images].map((image) => [image.naturalWidth, image.alt.length])")
    assert len(images) > 10 and all(drawn > 0 and alt > 0 for drawn, alt in images)
    assert NAME in browser.evaluate("document.querySelector('main').textContent")


def test_the_policy_stops_what_was_not_made_by_us(browser: Browser, report: Path, tmp_path: Path) -> None:
    injected = "<script>window.hacked=1</script><img src='https://example.org/x.png'></body>"
    (tmp_path / "page.html").write_text(report.read_text(encoding="utf-8").replace("</body>", injected))
    browser.open(tmp_path / "page.html")
    assert browser.evaluate("window.hacked") is None
    assert len(browser.complaints()) >= 2


def test_a_wide_table_scrolls_in_its_own_frame(browser: Browser, report: Path) -> None:
    browser.open(report, width=390)
    frame = "[...document.querySelectorAll('.scroll')].find((one) => one.scrollWidth > one.clientWidth)"
    before = browser.evaluate(f"{frame}.querySelector('tbody th').getBoundingClientRect().left")
    browser.evaluate(f"{frame}.scrollLeft = 200")
    assert browser.evaluate(f"{frame}.scrollLeft") == 200
    assert browser.evaluate(f"{frame}.querySelector('tbody th').getBoundingClientRect().left") == before


def test_a_click_sorts_and_a_box_shows_a_curve(browser: Browser, report: Path) -> None:
    browser.open(report)
    cells = "[...document.querySelector('tbody').rows].map((row) => row.cells[2].textContent)"
    click = "document.querySelectorAll('thead button')[2].click()"
    scores = browser.evaluate(cells)
    assert scores == sorted(scores, key=lambda text: -float(text.split()[0])) and len(scores) == 3
    browser.evaluate(click)
    browser.evaluate(click)
    assert browser.evaluate(cells) == scores[::-1]
    hidden = "[...document.querySelectorAll('svg [id^=curve0-2-]')].map((line) => line.style.display)"
    assert browser.evaluate(hidden) == ["none"] * len(browser.evaluate(hidden)) != []
    browser.evaluate("document.querySelectorAll('[data-curve]')[2].click()")
    assert set(browser.evaluate(hidden)) == {""}
