"""Charts as SVG: their texts and bytes, whatever the names and however many; not where matplotlib puts things."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable

import numpy as np
import pytest

from msil.reporting.figures import charts

NAN = float("nan")


def made(name: str, classes: int = 3) -> dict[str, Callable[[], bytes]]:
    names = [f"{name}{i}" for i in range(classes)]
    sizes = {name: {"APs": 0.1, "APm": NAN, "APl": 1.0}}
    seeds = [(np.arange(3.0), np.arange(3.0)), (np.arange(200.0), np.arange(200.0))]
    return {
        "sizes": lambda: charts.grouped_bars(sizes, {"APs": "small", "APm": "medium", "APl": "large"}, "AP", "sizes"),
        "confusion": lambda: charts.confusion_matrix(names, np.eye(classes + 1), name),
        "curves": lambda: charts.curves({name: seeds, "one": [(np.ones(1), np.ones(1))]}, "x", "y", name),
    }


def texts(svg: bytes) -> list[str]:
    return ["".join(one.itertext()) for one in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("chart", list(made("x")))
def test_names_are_only_text_and_charts_the_same_every_time(chart: str) -> None:
    for name in ("$\\frac{", "<script>", "日本\0\x1b", "]]>--&"):
        draw = made(name)[chart]
        svg = draw()
        assert svg == draw() and b"<script" not in svg
        assert texts(svg)


def test_charts_have_their_names_and_numbers() -> None:
    found = {name: set(texts(draw())) for name, draw in made("row ").items()}
    assert {"10.0", "n/a", "100.0", "small"} <= found["sizes"]
    assert {"background", "missed", "1", "row 0"} <= found["confusion"]


def test_of_many_classes_those_with_most_errors_are_shown() -> None:
    names = [f"class {i}" for i in range(80)]
    counts = np.diag(np.arange(81))
    counts[5:25, 0] = 9
    shown = texts(charts.confusion_matrix(names, counts, "Confusion"))
    assert {"class 0", "class 23"} <= set(shown) and "class 40" not in shown


def test_means_are_over_the_places_that_all_seeds_have() -> None:
    seeds = [(np.array([1.0, 2.0]), np.array([0.2, 0.4])), (np.array([1.0]), np.array([0.6]))]
    xs, ys = charts.mean_curve(seeds)
    assert xs.tolist() == [1.0] and ys.tolist() == pytest.approx([0.4])


def test_pyplot_stays_out_and_tables_need_neither_torch_nor_numpy() -> None:
    for modules, unwanted in (
        ("figures.pictures", ("matplotlib.pyplot", "torch")),
        ("paper_tables, msil.reporting.sweep_table", ("torch", "numpy", "matplotlib", "lightning", "hydra")),
    ):
        code = f"import sys, msil.reporting.{modules}; print([name for name in {unwanted} if name in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"
