"""A whole report, of runs whose classes and folders have hostile names, opened from disk in a real browser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from msil.reporting.report import write_report

from .browser import Browser, complaints, requests
from .made_runs import write_runs

CLASSES = ('<img src=x onerror="window.hacked=1">', '"><script>window.hacked=1</script>$x^2$')
NAME = "</title><script>window.hacked=1</script>"


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


@pytest.mark.parametrize("width", [390, 1440])
def test_a_report_of_hostile_names_opens_quietly(browser: Browser, report: Path, width: int) -> None:
    browser.open(report, width=width, height=900)
    assert complaints(browser) == []
    assert requests(browser) == {report.as_uri(), "data:"}
    assert browser.evaluate("window.hacked") is None
    assert browser.evaluate("[innerWidth, document.scrollingElement.scrollWidth]") == [width, width]
    images = browser.evaluate("[...document.images].map((image) => [image.naturalWidth, image.alt.length])")
    assert len(images) > 10 and all(drawn > 0 and alt > 0 for drawn, alt in images)
    assert NAME in browser.evaluate("document.querySelector('#all-runs').textContent")


def test_the_runs_sort_by_ap(browser: Browser, report: Path) -> None:
    browser.open(report, width=1440, height=900)
    headers = browser.evaluate(
        "[...document.querySelectorAll('#all-runs thead th')].map((th) => th.textContent.trim())"
    )
    column = next(i for i, text in enumerate(headers) if text.split()[0] == "AP")
    browser.click(f"#all-runs thead th:nth-child({column + 1}) button")
    shown = browser.evaluate(
        f"[...document.querySelectorAll('#all-runs tbody tr')].map((row) => row.cells[{column}].textContent.trim())"
    )
    runs = [json.loads(path.read_text()) for path in (report.parents[1] / "runs").glob("*/result.json")]
    assert shown == [f"{100 * ap:.1f}" for ap in sorted((run["metrics"]["AP"] for run in runs), reverse=True)]
