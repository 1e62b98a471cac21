"""What every benchmark says about times and counts. The clock is a made-up one."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from benchmarks import __main__ as all_of_them
from benchmarks import compare
from benchmarks.compare import NotRun, Row, counted, faster, interleaved, relative_difference, run

FOLDER = Path(compare.__file__).parent


class Clock:
    """CPU seconds that pass only when a way says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr(compare.time, "process_time", lambda: self.now)

    def way(self, name: str, *seconds: float):
        left = iter(seconds)

        def call() -> None:
            self.calls.append(name)
            self.now += next(left)

        return call


def test_median_of_the_rounds_after_the_first_each_way_in_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    # The first value of each is the warm-up's; the medians of the others are 3 and 5, whatever the outlier.
    ways = {"ours": clock.way("ours", 90, 1, 100, 3), "anchor": clock.way("anchor", 80, 6, 5, 4)}
    assert interleaved(ways, repeats=3) == {"ours": 3.0, "anchor": 5.0}
    assert clock.calls == ["ours", "anchor"] * 4


def test_several_calls_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    # After the warm-up's two: (1 + 3) / 2 = 2 seconds a call.
    assert interleaved({"ours": clock.way("ours", 9, 9, 1, 3)}, repeats=1, calls=2) == {"ours": 2.0}


def test_medians_of_at_least_seven_rounds_are_the_default() -> None:
    assert compare.REPEATS >= 7


@pytest.mark.parametrize(("ours", "met"), [(0.5, True), (0.25, True), (0.51, False)])
def test_a_goal_in_times(ours: float, met: bool) -> None:
    row = faster("P0 a name", ours, 1.0, 2, "to 1e-6")  # 1 s / 0.5 s is just twice as fast
    assert row.met is met and row.goal == ">= 2x" and row.anchor == "1.00 s" and row.ratio == 1 / ours


def test_milliseconds_and_no_goal() -> None:
    row = faster("P0", 0.00123, 0.1, None, "")
    assert (row.ours, row.anchor, row.goal, row.met) == ("1.23 ms", "100.00 ms", "", None)
    assert "met" not in row.line() and "MISSED" not in row.line()


@pytest.mark.parametrize(("count", "met"), [(160, True), (161, False)])
def test_a_goal_in_counts(count: int, met: bool) -> None:
    row = counted("P0", count, 300, 160, "constant")
    assert row.met is met and row.ratio is None
    assert row.line().split() == ["P0", str(count), "300", "<=", "160", "met" if met else "MISSED", "constant"]


def test_difference_relative_to_the_largest_value() -> None:
    assert relative_difference(torch.tensor([1.0, 4.5]), torch.tensor([1.5, -4.0])) == 8.5 / 4


def rows() -> Iterator[Row]:
    yield faster("P0 one", 1.0, 3.0, 2, "to 1e-6")
    yield counted("P0 two", 3, "", None, "")


def no_rows() -> Iterator[Row]:
    yield faster("P0 one", 1.0, 3.0, 2, "to 1e-6")
    raise NotRun("no GPU here.")


def test_rows_are_printed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "--json", str(tmp_path / "rows.json")])
    run(rows, "P0")
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == ["P0 one", "P0 two"]
    written = json.loads((tmp_path / "rows.json").read_text())
    assert [Row(**row) for row in written["rows"]] == list(rows())


def test_what_cannot_run_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "--json", str(tmp_path / "rows.json")])
    run(no_rows, "P0")
    assert capsys.readouterr().out.splitlines()[-1] == "not run: no GPU here."
    assert json.loads((tmp_path / "rows.json").read_text()) == {"not_run": "no GPU here."}


OUTCOME = {
    "rows": [
        {
            "name": "P0 a|b", "ours": "1.00 s", "anchor": "3.00 s", "ratio": 3.0, "goal": ">= 2x", "met": True,
            "agreement": "to 1e-6",
        },
        {"name": "P0 c", "ours": "3", "anchor": "", "ratio": None, "goal": "<= 2", "met": False, "agreement": ""},
    ],
    "seconds": 3, "date": "2026-01-02", "machine": "a CPU, one thread", "versions": "Python 3",
}  # fmt: skip


def test_the_table_stands_between_its_marks_and_nothing_else_changes(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text(f"# Before\n{all_of_them.BEGIN}\nold\n{all_of_them.END}\nafter\n")
    for _ in range(2):
        all_of_them.write_table(page, {"fcos_loss": OUTCOME, "gpu_training": {"not_run": "no GPU here."}})
    text = page.read_text()
    assert text.startswith(f"# Before\n{all_of_them.BEGIN}\n\n| what ")
    assert text.endswith(f"2026-01-02, a CPU, one thread, Python 3.\n\n{all_of_them.END}\nafter\n")
    assert "| P0 a\\|b | 1.00 s | 3.00 s | 3.00x | >= 2x | met | to 1e-6 |" in text
    assert "| P0 c | 3 |  |  | <= 2 | **missed** |  |" in text
    assert "| gpu_training | | | | | not measured yet | no GPU here. |" in text


def test_a_page_without_marks_is_named(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text("# Nothing\n")
    with pytest.raises(SystemExit, match=re.escape(str(page))):
        all_of_them.write_table(page, {})
    assert page.read_text() == "# Nothing\n"


def fake_benchmarks(monkeypatch: pytest.MonkeyPatch, folder: Path, outcomes: dict[str, dict | None]) -> None:
    (folder / "performance.md").write_text(f"{all_of_them.BEGIN}\n{all_of_them.END}\n")
    monkeypatch.setattr(all_of_them, "BENCHMARKS", tuple(outcomes))
    monkeypatch.setattr(all_of_them, "ROOT", folder)
    monkeypatch.setattr(all_of_them, "RESULTS", folder / "results.json")
    monkeypatch.setattr(all_of_them, "DOCUMENT", folder / "performance.md")
    monkeypatch.setattr(all_of_them, "measured", outcomes.get)
    monkeypatch.setattr(sys, "argv", ["benchmarks"])


def test_what_did_not_run_keeps_what_was_measured_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_benchmarks(monkeypatch, tmp_path, {"on_cpu": {"rows": []}, "on_gpu": {"not_run": "no GPU here."}})
    (tmp_path / "results.json").write_text(json.dumps({"on_gpu": OUTCOME, "gone": OUTCOME}))
    all_of_them.main()
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["on_cpu", "on_gpu"]
    assert results["on_gpu"] == OUTCOME and set(results["on_cpu"]) == {"rows", "date", "machine", "versions"}


def test_a_failed_benchmark_is_named_after_all_others_ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_benchmarks(monkeypatch, tmp_path, {"broken": None, "whole": {"rows": []}})
    with pytest.raises(SystemExit, match=r"^failed: broken$"):
        all_of_them.main()
    assert list(json.loads((tmp_path / "results.json").read_text())) == ["whole"]


def test_an_unknown_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "fcos_los"])
    with pytest.raises(SystemExit):
        all_of_them.main()
    assert "unknown: fcos_los; choose from fcos_assignment, fcos_loss," in capsys.readouterr().err


@pytest.mark.parametrize("name", all_of_them.BENCHMARKS)
def test_each_file_names_its_goal_and_its_command(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text()
    assert re.match(r'"""[PG]\d+', text)
    assert f"\n    python -m benchmarks.{name}\n" in text
    assert "run(measure, __doc__)" in text
