"""The charts of a report, read back as XML: bars as long as their values, texts that are only text, the same bytes."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from xml.etree.ElementTree import Element

import matplotlib
import numpy as np
import pytest
from defusedxml import ElementTree
from PIL import Image

from msil.reporting.canvas import OTHER_COLORS, PLAIN_COLORS, clean, row_colors
from msil.reporting.charts import class_bars, difference_plot, error_bars, size_bars
from msil.reporting.curves import learning_curves, loss_curves, precision_recall, precision_recall_classes
from msil.reporting.matrix import confusion_matrix

SVG = "{http://www.w3.org/2000/svg}"
NAN = float("nan")
RECALLS = np.linspace(0, 1, 101)
ERRORS = {"Cls": 0.03, "Loc": 0.08, "Both": 0.004, "Dupe": 0.001, "Bkg": 0.02, "Miss": 0.05}
EPOCHS = np.arange(1, 13)


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def texts(svg: bytes) -> list[str]:
    return ["".join(element.itertext()) for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def groups(svg: bytes, start: str) -> dict[str, Element]:
    """The groups whose id starts so, by id."""
    found = ElementTree.fromstring(svg).iter(f"{SVG}g")
    return {element.attrib["id"]: element for element in found if element.attrib.get("id", "").startswith(start)}


def points(group: Element) -> np.ndarray:
    """(N, 2) of the group's first path."""
    path = next(group.iter(f"{SVG}path"))
    return np.array([[float(n) for n in pair] for pair in re.findall(r"[ML] (\S+) (\S+)", path.attrib["d"])])


def extent(group: Element) -> tuple[float, float]:
    width, height = np.ptp(points(group), axis=0)
    return float(width), float(height)


def style_of(group: Element) -> str:
    return next(group.iter(f"{SVG}path")).attrib["style"]


# one call a chart, for what all of them must keep
CHARTS: dict[str, Callable[[str], bytes]] = {
    "learning": lambda name: learning_curves({name: [(EPOCHS, EPOCHS / 20), (EPOCHS, EPOCHS / 25)]}, title=name),
    "loss": lambda name: loss_curves({name: [(np.arange(500), np.exp(-np.arange(500) / 100))]}, title=name),
    "classes": lambda name: class_bars([name, "b"], {name: [0.5, 0.25], "b": [0.1, NAN]}, title=name),
    "sizes": lambda name: size_bars({name: {"APs": 0.1, "APm": 0.2, "APl": NAN}}, title=name),
    "errors": lambda name: error_bars({name: ERRORS}, title=name),
    "differences": lambda name: difference_plot([name, "b"], [0.1, NAN], [0.0, NAN], [0.2, NAN], title=name),
    "matrix": lambda name: confusion_matrix([name, "b"], [[5, 1, 0], [0, 7, 2], [1, 1, 0]], title=name),
    "precision": lambda name: precision_recall(RECALLS, {name: 1 - RECALLS**3}, title=name),
    "precisions": lambda name: precision_recall_classes(RECALLS, [name], {name: [1 - RECALLS**3]}, title=name),
}


@pytest.mark.parametrize("chart", CHARTS)
@pytest.mark.parametrize("name", ["$\\frac{1}{$", "<b>&\"'--><script>", "_hidden", "a\0b\x1b\ud800\n", "猫 🐈 ‮x"])
def test_names_are_only_text(chart: str, name: str) -> None:
    svg = CHARTS[chart](name)
    shown = clean(name)
    assert ElementTree.fromstring(svg).findtext(f"{SVG}title") == shown  # parsed: no mark-up came in
    assert any(shown in text for text in texts(svg))
    assert b"<script" not in svg and b"<!" not in svg


@pytest.mark.parametrize("chart", CHARTS)
def test_small_narrow_and_the_same_every_time(chart: str) -> None:
    first = CHARTS[chart]("MSIL")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.hashsalt": "other"}):
        second = CHARTS[chart]("MSIL")  # nor does a reader's own matplotlibrc matter
    assert first == second
    assert len(first) < 60_000
    root = ElementTree.fromstring(first)
    assert root.attrib["width"] == "460.8pt"  # 6.4 inches of 72 points
    sizes = [float(size) for size in re.findall(r"font(?:-size)?: (?:bold |700 )?([\d.]+)px", first.decode())]
    assert sizes and min(sizes) >= 10
    # nothing is fetched: links point into the file, pictures are data
    links = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")]
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)


def test_the_largest_charts_stay_below_60_kB() -> None:
    random = np.random.default_rng(0)
    names = [f"class number {i}" for i in range(80)]
    rows = {name: random.uniform(size=80) for name in ("plain", "cls", "reg", "both")}
    noisy = {name: np.sort(random.uniform(size=(80, 101)))[:, ::-1] for name in ("plain", "both")}
    steps = np.arange(100_000)
    for svg in (
        class_bars(names, rows),
        class_bars(names[:20], {name: values[:20] for name, values in rows.items()}),  # 80 bars, all shown
        confusion_matrix(names, random.integers(0, 1000, (81, 81))),
        confusion_matrix(names[:12], random.integers(1, 10_000, (13, 13))),
        precision_recall_classes(RECALLS, names, noisy),
        loss_curves({name: [(steps, random.uniform(size=100_000))] * 3 for name in ("plain", "both")}),
    ):
        assert len(svg) < 60_000


@pytest.mark.parametrize(
    ("svg", "says"),
    [
        (lambda: learning_curves({}), "No evaluation was logged."),
        (lambda: learning_curves({"plain": []}), "No evaluation was logged."),
        (lambda: learning_curves({"plain": [([1, 2], [NAN, NAN])]}), "No evaluation was logged."),
        (lambda: loss_curves({"plain": [([], [])]}), "No loss was logged."),
        (lambda: class_bars([], {}), "No class has a box to be found."),
        (lambda: class_bars(["a"], {"plain": [NAN]}), "No class has a box to be found."),
        (lambda: size_bars({}), "No AP by size was measured."),
        (lambda: size_bars({"plain": {"APs": NAN}}), "No AP by size was measured."),
        (lambda: error_bars({"plain": {}}), "No errors were counted."),
        (lambda: difference_plot([], [], [], []), "No two rows can be compared yet."),
        (lambda: difference_plot(["a"], [NAN], [NAN], [NAN]), "No two rows can be compared yet."),
        (lambda: confusion_matrix([], [[0]]), "No boxes and no detections to compare."),
        (lambda: confusion_matrix(["a"], np.zeros((2, 2))), "No boxes and no detections to compare."),
        (lambda: precision_recall(RECALLS, {"plain": np.full(101, -1.0)}), "No class has a box to be found."),
        (lambda: precision_recall_classes(RECALLS, [], {"a": np.zeros((0, 101))}), "No class has a box to be found."),
        (lambda: precision_recall_classes(RECALLS, ["a"], {}), "No class has a box to be found."),
    ],
)  # fmt: skip
def test_nothing_to_draw_is_said(svg: Callable[[], bytes], says: str) -> None:
    assert says in texts(svg())


def test_a_single_point_is_a_dot() -> None:
    svg = learning_curves({"plain": [([3], [0.4])]})
    assert len(list(groups(svg, "mean-")["mean-0"].iter(f"{SVG}use"))) == 1
    assert "3" in texts(svg)  # the epoch, on the axis


def test_learning_curve_is_in_percent_with_the_mean_of_the_seeds() -> None:
    # means 10, 20, 30 at the epochs 1, 2, 3; the fourth epoch has one seed alone
    svg = learning_curves({"plain": [([1, 2, 3, 4], [0.05, 0.15, 0.25, 0.9]), ([1, 2, 3], [0.15, 0.25, 0.35])]})
    mean = points(groups(svg, "mean-")["mean-0"])
    steps = np.diff(mean, axis=0)
    assert len(mean) == 3 and steps[0] == pytest.approx(steps[1]) and steps[0, 1] < 0  # up is down in SVG
    assert "AP, percent" in texts(svg) and "thin: one seed, bold: mean of the seeds" in texts(svg)


def test_a_row_without_numbers_is_named() -> None:
    svg = learning_curves({"plain": [([1, 2], [0.1, 0.2])], "both": []})
    assert "nothing logged: both" in texts(svg) and list(groups(svg, "mean-")) == ["mean-0"]


def test_long_losses_are_averaged_in_bins() -> None:
    # 160 steps 3 1 3 1 .. in 80 bins of two: 2 everywhere
    svg = loss_curves({"plain": [(np.arange(160), np.tile([3.0, 1.0], 80))]})
    ys = points(groups(svg, "mean-")["mean-0"])[:, 1]
    assert len(ys) == 80 and np.ptp(ys) == pytest.approx(0, abs=1e-4)
    assert "smoothed: a point is the mean of 2 logged steps" in texts(svg)


def test_class_bars_are_as_long_as_their_values_and_sorted_by_the_first_row() -> None:
    rows = {"plain": [0.2, 0.8, NAN, 0.4], "both": [0.3, 0.6, NAN, NAN]}
    svg = class_bars(["a", "b", "c", "d"], rows, spreads={"both": [0.01, 0.02, NAN, NAN]})
    bars = groups(svg, "bar-")
    # plain's b, d, a: 0.8, 0.4, 0.2; both's b and a: 0.6, 0.3, d was not measured
    expected = {"bar-0-0": 0.8, "bar-0-1": 0.4, "bar-0-2": 0.2, "bar-1-0": 0.6, "bar-1-2": 0.3}
    assert set(bars) == set(expected)
    unit = extent(bars["bar-0-0"])[0] / 0.8
    for name, value in expected.items():
        assert extent(bars[name])[0] == pytest.approx(unit * value, rel=1e-3)
    shown = texts(svg)
    assert [text for text in shown if text in ("a", "b", "c", "d")] == ["b", "d", "a"]
    assert {"80.0", "40.0", "20.0", "60.0", "30.0", "n/a"} <= set(shown)
    assert "left out: 1 of 4 classes, which have no boxes" in shown


def test_of_many_classes_the_best_and_the_worst_are_shown_and_it_says_so() -> None:
    names = [f"c{i:02}" for i in range(90)]
    svg = class_bars(names, {"plain": np.arange(90) / 100})
    shown = [text for text in texts(svg) if re.fullmatch(r"c\d\d", text)]
    assert shown == [*(f"c{i:02}" for i in range(89, 79, -1)), *(f"c{i:02}" for i in range(9, -1, -1))]
    assert "the 10 best and the 10 worst of 90 classes, by plain" in texts(svg)
    assert len(groups(class_bars(names[:80], {"plain": np.arange(80) / 100}), "bar-")) == 80


def test_upright_bars_are_as_high_as_their_values_also_below_zero() -> None:
    svg = error_bars({"plain": ERRORS, "both": {**ERRORS, "Loc": 0.04, "Dupe": -0.01, "Bkg": NAN}})
    bars = groups(svg, "bar-")
    assert len(bars) == 11
    unit = extent(bars["bar-0-1"])[1] / 0.08
    assert extent(bars["bar-1-1"])[1] == pytest.approx(unit * 0.04, rel=1e-3)
    assert extent(bars["bar-0-5"])[1] == pytest.approx(unit * 0.05, rel=1e-3)
    # 0 is the lower end of the first bar and the upper end of the negative one
    assert points(bars["bar-1-3"])[:, 1].min() == pytest.approx(points(bars["bar-0-0"])[:, 1].max(), abs=1e-3)
    assert "n/a" in texts(svg)


def test_sizes_tell_how_many_objects_they_have() -> None:
    counts = {"APs": 12345, "APm": 1, "APl": 0}
    shown = texts(size_bars({"plain": {"APs": 0.125, "APm": 0.5, "APl": NAN}}, counts=counts))
    assert {"12,345 objects", "1 object", "0 objects", "small", "12.5", "50.0", "n/a"} <= set(shown)


def test_differences_stand_where_they_are_and_are_coloured_by_what_they_say() -> None:
    svg = difference_plot(["better", "worse", "open", "none"], [0.02, -0.03, 0.01, NAN], [0.01, -0.04, -0.01, NAN],
                          [0.03, -0.02, 0.03, NAN])  # fmt: skip
    lines = {name: points(group) for name, group in groups(svg, "interval-").items()}
    assert sorted(lines) == ["interval-0", "interval-1", "interval-2"]
    # in points: 1 to 3, -4 to -2, -1 to 3
    unit = np.ptp(lines["interval-0"][:, 0]) / 2
    assert np.ptp(lines["interval-2"][:, 0]) == pytest.approx(4 * unit, rel=1e-3)
    assert lines["interval-0"][0, 0] - lines["interval-1"][0, 0] == pytest.approx(5 * unit, rel=1e-3)
    styles = {name: style_of(group) for name, group in groups(svg, "interval-").items()}
    assert OTHER_COLORS[0] in styles["interval-0"] and PLAIN_COLORS[0] in styles["interval-1"]
    assert not any(color in styles["interval-2"] for color in (OTHER_COLORS[0], PLAIN_COLORS[0]))
    assert {"+2.0  [+1.0, +3.0]", "−3.0  [−4.0, −2.0]", "+1.0  [−1.0, +3.0]", "not measured"} <= set(texts(svg))


def matrix_pixels(svg: bytes) -> np.ndarray:
    image = next(ElementTree.fromstring(svg).iter(f"{SVG}image"))
    link = next(value for key, value in image.attrib.items() if key.endswith("href"))
    with Image.open(io.BytesIO(base64.b64decode(link.split(",")[1]))) as png:
        return np.asarray(png.convert("RGB"))


def test_confusion_is_coloured_by_the_share_of_its_row() -> None:
    # row a: 90 %, none, 10 % missed; row b: 0.1 % (one in a thousand must still show), 99.9 %; background: 3 to 1
    counts = [[9, 0, 1], [1, 999, 0], [3, 1, 0]]
    svg = confusion_matrix(["a", "b"], counts)
    pixels = matrix_pixels(svg)
    assert pixels.shape == (3, 3, 3)
    darkness = 765 - pixels.sum(axis=2).astype(int)
    assert darkness[0, 0] == darkness[1, 1] > darkness[2, 0] > darkness[2, 1] > darkness[0, 2] > darkness[1, 0] > 0
    assert darkness[0, 1] == darkness[1, 2] == 0
    shown = texts(svg)
    assert {"9", "1", "999", "3", "missed", "background", "prediction", "truth"} <= set(shown)
    assert shown.count("a") == shown.count("b") == 2


def test_large_counts_fit_their_cells() -> None:
    shown = texts(confusion_matrix(["a", "b"], [[9999, 10_000, 999_499], [999_500, 1_250_000, 1], [0, 0, 0]]))
    assert {"9999", "10k", "999k", "1.0M", "1.2M", "1"} <= set(shown)


def test_confusion_of_many_classes_shows_those_with_the_most_errors() -> None:
    counts = np.diag(np.full(31, 50))
    counts[5, 7] = 30  # of class 5 and class 7
    counts[3, -1] = 20
    counts[-1, -1] = 0
    svg = confusion_matrix([f"c{i:02}" for i in range(30)], counts)
    assert "the 20 of 30 classes with the most errors" in texts(svg)
    assert {"c03", "c05", "c07"} <= set(texts(svg)) and "c29" not in texts(svg)
    assert "50" not in texts(svg)  # too many for numbers


def test_confusion_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="square"):
        confusion_matrix(["a", "b"], np.zeros((2, 2)))


def test_precision_lines_are_simplified_but_not_bent() -> None:
    # a step down at 0.5: 101 points, of which the ends and the corners suffice
    precisions = np.where(RECALLS <= 0.5, 1.0, 0.25)
    line = points(groups(precision_recall(RECALLS, {"plain": precisions}), "curve-")["curve-0"])
    assert len(line) == 4
    curved = points(groups(precision_recall(RECALLS, {"plain": 1 - RECALLS**2}), "curve-")["curve-0"])
    left, right = curved[:, 0].min(), curved[:, 0].max()
    top, bottom = curved[:, 1].min(), curved[:, 1].max()
    xs = (curved[:, 0] - left) / (right - left)
    ys = (bottom - curved[:, 1]) / (bottom - top)
    assert len(curved) < 30 and np.abs(np.interp(RECALLS, xs, ys) - (1 - RECALLS**2)).max() < 0.004


def test_nine_classes_from_the_best_to_the_worst() -> None:
    names = [f"c{i:02}" for i in range(17)]
    heights = np.linspace(0.1, 0.9, 17)[:, None].repeat(101, axis=1)
    heights[4] = -1  # no box to be found; 16 classes are left
    svg = precision_recall_classes(RECALLS, names, {"plain": heights, "both": heights / 2})
    shown = [text for text in texts(svg) if re.fullmatch(r"c\d\d", text)]
    assert len(shown) == 9 and shown[0] == "c16" and shown[-1] == "c00" and shown == sorted(shown, reverse=True)
    assert "c04" not in shown
    assert "9 of 16 classes, evenly from the best to the worst of plain" in texts(svg)
    assert len([e for e in ElementTree.fromstring(svg).iter(f"{SVG}g") if e.attrib.get("id") == "curve-0"]) == 9


def test_plain_is_blue_and_the_other_orange_in_either_order() -> None:
    assert row_colors(["plain", "MSIL"]) == [PLAIN_COLORS[0], OTHER_COLORS[0]]
    assert row_colors(["MSIL", "VFNet, plain"]) == [OTHER_COLORS[0], PLAIN_COLORS[0]]
    assert row_colors(["one", "two"]) == [PLAIN_COLORS[0], OTHER_COLORS[0]]
    assert len(set(row_colors([f"row {i}" for i in range(9)]))) == 9
    assert row_colors([]) == []


def test_long_names_are_cut_by_what_they_take() -> None:
    assert clean("abcdef", 6) == "abcdef" and clean("abcdefg", 6) == "abcdef…"
    assert clean("猫猫猫", 6) == "猫猫猫" and clean("猫猫猫猫", 6) == "猫猫猫…"
    assert clean(" a \n b\t") == "a b" and clean("a\x00b") == "a\ufffdb"


def test_pyplot_stays_out() -> None:
    code = "import sys, msil.reporting.charts, msil.reporting.curves, msil.reporting.matrix as m; "
    code += "m.confusion_matrix(['a'], [[1, 0], [0, 0]]); print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False" and not done.stderr
