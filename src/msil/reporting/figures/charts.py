"""Charts of a report, as SVG: bars, confusion, curves; and Figure 5 as PNG. matplotlib lays them out.

A chart is 6.4 inches wide with text of 11 points and more, so that it can be read at the 330 pixels of a phone. Its
letters stay text, so that the browser finds the glyphs (of Chinese class names, say) that matplotlib's font lacks.
"""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

WIDTH = 6.4  # inches
NAME_LETTERS = 30  # of a row's or a class's name before it is cut
MATRIX_LIMIT = 20  # classes of a confusion matrix
COUNTS_LIMIT = 12  # classes of a confusion matrix with its counts printed
POINTS = 120  # of a curve; longer ones are averaged in bins

# Okabe & Ito's idea: apart in hue and in lightness, for every kind of colour vision; the first is the plain detector's.
COLORS = ("#5b7a99", "#e8710a", "#00875a", "#8e44ad", "#d4a900", "#b3123f", "#3aa6c9", "#7a4a2b", "#e07bb0")
STYLE = {
    "svg.hashsalt": "msil",  # or every file has ids of its own
    "svg.fonttype": "none",
    "text.parse_math": False,  # a class may be called $\frac
    "font.size": 12,
    "axes.titlesize": 14,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#d9dee3",
}
Runs = Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]]  # row name -> (x, y) of each seed


def clean(text: str, letters: int = NAME_LETTERS) -> str:
    """Text of a user on one line: control characters, which XML forbids, as U+FFFD, and cut after so many letters."""
    text = "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(str(text).split()))
    return text if len(text) <= letters else text[: letters - 1].rstrip() + "\u2026"


def draw_svg(draw: Callable[[Axes], None], height: float, title: str) -> bytes:
    """An SVG file of what `draw` puts into an empty chart with a title. height: inches.

    The same input gives the same bytes under the same matplotlib. Sets matplotlib's settings while it runs, so not for
    two threads at once.
    """
    with style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the browser has it
        figure = Figure(figsize=(WIDTH, height), facecolor="none", layout="constrained")
        figure.suptitle("\n".join(textwrap.wrap(clean(title, 120), 60)), x=0.01, ha="left", weight="bold", size=14)
        axes = figure.add_subplot()
        draw(axes)
        handles, names = axes.get_legend_handles_labels()
        if names:
            figure.legend(handles, names, loc="outside lower left", ncols=2)
        content = io.BytesIO()
        FigureCanvasSVG(figure).print_svg(content, metadata={"Date": None, "Creator": None, "Title": clean(title, 120)})
    return content.getvalue()


def grouped_bars(rows: Mapping[str, Mapping[str, float]], labels: Mapping[str, str], y_label: str, title: str) -> bytes:
    """Upright bars, a group a key of `labels`, a bar a row, in percent; "n/a" where a value is missing."""
    width = 0.8 / len(rows)

    def draw(axes: Axes) -> None:
        for number, ((name, row), color) in enumerate(zip(rows.items(), cycle(COLORS), strict=False)):
            values = np.array([row[key] for key in labels], dtype=float)
            places = np.arange(len(labels)) - 0.4 + width * (number + 0.5)
            bars = axes.bar(places, np.nan_to_num(values), width * 0.94, color=color, label=clean(name))
            texts = [f"{100 * value:.1f}" if np.isfinite(value) else "n/a" for value in values]
            axes.bar_label(bars, texts, padding=2, fontsize=10)
        axes.set_xticks(range(len(labels)), list(labels.values()))
        axes.grid(visible=False, axis="x")
        axes.margins(y=0.12)
        axes.set_ylabel(y_label)
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))

    return draw_svg(draw, 4.2, title)


def confusion_matrix(classes: Sequence[str], counts: np.ndarray, title: str) -> bytes:
    """Truths down, predictions across, coloured by the share of the row; counts but zeros printed up to 12 classes.

    classes: K names. counts: (K+1, K+1), last row: background (detections that belong to no box), last column: missed
    (boxes without a detection). Of more than 20 classes, those with the most errors are shown.
    """
    shown = np.arange(len(classes))
    if len(classes) > MATRIX_LIMIT:
        errors = counts.sum(axis=0)[:-1] + counts.sum(axis=1)[:-1] - 2 * np.diag(counts)[:-1]
        shown = np.sort(np.argsort(-errors, kind="stable")[:MATRIX_LIMIT])
        title += f", the {MATRIX_LIMIT} of {len(classes)} classes with the most errors"
    chosen = np.ix_(np.append(shown, len(classes)), np.append(shown, len(classes)))
    shares = np.divide(100 * counts, counts.sum(axis=1, keepdims=True), where=counts > 0, out=np.zeros(counts.shape))
    table, shares, size = counts[chosen], shares[chosen], len(shown) + 1
    names = [clean(classes[int(label)], 14) for label in shown]

    def draw(axes: Axes) -> None:
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, aspect="auto")
        axes.figure.colorbar(image, ax=axes, label="share of the row, percent")
        axes.set_xticks(range(size), [*names, "missed"], rotation=0 if size <= 4 else 90)
        axes.set_yticks(range(size), [*names, "background"])
        axes.set(xlabel="prediction", ylabel="truth")
        axes.grid(visible=False)
        for row, column in np.argwhere(table).tolist() if len(shown) <= COUNTS_LIMIT else ():
            axes.text(column, row, f"{table[row, column]:.4g}", ha="center", va="center", fontsize=10,
                      color="white" if shares[row, column] > 60 else "black")  # fmt: skip

    return draw_svg(draw, 2.2 + min(4.4, 0.4 * size), title)


def curves(rows: Runs, x_label: str, y_label: str, title: str) -> bytes:
    """See `plot_curves`."""
    return draw_svg(lambda axes: plot_curves(axes, rows, x_label, y_label), 4.2, title)


def chosen_curves(rows: Runs, key: str, x_label: str, y_label: str, title: str) -> tuple[str, list[tuple[str, str]]]:
    """The curves as an <svg> element without the rows' names; and of each row the start of its lines' ids, made of
    `key`, and its colour."""

    def draw(axes: Axes) -> None:
        plot_curves(axes, {f"_{name}": seeds for name, seeds in rows.items()}, x_label, y_label)  # _: no legend
        places = [row for row, seeds in enumerate(rows.values()) for _ in range(1 + len(seeds) * (len(seeds) > 1))]
        for i, (row, line) in enumerate(zip(places, axes.lines, strict=True)):
            line.set_gid(f"{key}-{row}-{i}")

    svg = draw_svg(draw, 4.2, title).decode()
    svg = re.sub(rf'<g id="(?!{key}-)[^"]*">', "<g>", svg[svg.index("<svg") :])  # a page has several charts
    return svg, [(f"{key}-{row}-", color) for row, color in zip(range(len(rows)), cycle(COLORS), strict=False)]


def plot_curves(axes: Axes, rows: Runs, x_label: str, y_label: str = "") -> None:
    """A thin line a seed, the row's mean bold over the places that all its seeds reached.

    rows: of each row, the compared one first, one (x, y) a seed, both (E,). Curves of more than 120 points are averaged
    in bins, which smooths them.
    """
    for (name, seeds), color in zip(rows.items(), cycle(COLORS), strict=False):
        for xs, ys in map(_binned, seeds if len(seeds) > 1 else ()):
            axes.plot(xs, ys, color=color, linewidth=0.9, alpha=0.5)
        xs, ys = _binned(mean_curve(seeds))
        axes.plot(xs, ys, "o-" if len(xs) <= 15 else "-", color=color, linewidth=2.4, label=clean(name))
    axes.set_ylim(bottom=min(0.0, axes.dataLim.ymin))
    whole = all((xs % 1 == 0).all() for seeds in rows.values() for xs, _ in seeds)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=whole))
    axes.set(xlabel=x_label, ylabel=y_label)


def mean_curve(seeds: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the seeds at the places that all of them have, so that a run that ended early makes no jump."""
    tables = [dict(zip(xs.tolist(), ys.tolist(), strict=True)) for xs, ys in seeds]
    shared = sorted(set.intersection(*(set(table) for table in tables)))
    return np.array(shared), np.array([np.mean([table[x] for table in tables]) for x in shared])


def _binned(points: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS points, each the mean of as many neighbours; the last may be of fewer."""
    size = max(1, -(-len(points[0]) // POINTS))
    xs, ys = ([part.mean() for part in np.split(one, range(size, len(one), size)) if len(part)] for one in points)
    return np.array(xs), np.array(ys)
