"""Bars and intervals of a report, as SVG: AP by class and by size, the cost of errors, differences between rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from msil.reporting.canvas import (
    INK,
    MUTED,
    OTHER_COLORS,
    PLAIN_COLORS,
    SMALL_SIZE,
    clean,
    draw_svg,
    finite,
    legend_of,
    message_svg,
    row_colors,
)
from msil.reporting.formats import percent

BAR_LIMIT = 80  # bars of class_bars
HALF_LIMIT = 10  # best and as many worst classes where there would be more bars
BAR_HEIGHT, BAR_GAP = 0.18, 0.14  # inches a bar, and between two classes

ERROR_NAMES = {"Cls": "class", "Loc": "location", "Both": "class, box", "Dupe": "duplicate", "Bkg": "background",
               "Miss": "missed"}  # fmt: skip
SIZE_NAMES = {"APs": "small", "APm": "medium", "APl": "large"}


def class_bars(
    classes: Sequence[str],
    rows: Mapping[str, Any],
    *,
    spreads: Mapping[str, Any] | None = None,
    title: str = "AP per class",
) -> bytes:
    """Horizontal bars, the first row's best class on top; where there were more than 80, the 10 best and the 10 worst.

    classes: K names. rows: of each row, the compared one first, (K,) AP as fractions, NaN where a class has no boxes;
    classes with none in any row are left out, and the chart says so. spreads: of the rows that have one, (K,) the
    half length of a whisker, as fractions.
    """
    values = np.array([np.asarray(row, dtype=float) for row in rows.values()]).reshape(len(rows), len(classes))
    measured = np.flatnonzero(np.isfinite(values).any(axis=0))
    if not len(measured):
        return message_svg(title, "No class has a box to be found.")
    reference = np.where(np.isfinite(values[0]), values[0], -1.0)
    shown = measured[np.argsort(-reference[measured], kind="stable")]
    notes, half = [], max(3, min(HALF_LIMIT, BAR_LIMIT // len(rows) // 2))
    name = clean(next(iter(rows)))
    if len(shown) * len(rows) > BAR_LIMIT and len(shown) > 2 * half:
        notes.append(f"the {half} best and the {half} worst of {len(shown)} classes, by {name or 'AP'}")
        shown = np.concatenate([shown[:half], shown[-half:]])
    if len(measured) < len(classes):
        notes.append(f"left out: {len(classes) - len(measured)} of {len(classes)} classes, which have no boxes")
    cut = half if len(shown) < len(measured) else None
    places = _stacked(len(shown), len(rows), cut)
    whiskers = _spread_table(rows, spreads, len(classes))

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for number, color in enumerate(row_colors(list(rows))):
            _bars(axes, places + number * BAR_HEIGHT, values[number, shown], whiskers[number, shown], color, number)
        middles = places + (len(rows) - 1) * BAR_HEIGHT / 2
        axes.set_yticks(middles, [clean(classes[int(label)], 22) for label in shown])
        axes.tick_params(axis="y", length=0)
        if cut is not None:
            between = (places[cut - 1] + places[cut] + (len(rows) - 1) * BAR_HEIGHT) / 2
            axes.axhline(between, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
        axes.set_ylim(places[-1] + len(rows) * BAR_HEIGHT, places[0] - BAR_HEIGHT)
        axes.set_xlim(0, 1.14 * max(0.01, _highest(values[:, shown], whiskers[:, shown])))
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("AP, percent")

    height = 0.75 + places[-1] - places[0] + (len(rows) + 1) * BAR_HEIGHT
    return draw_svg(draw, float(height), title=title, notes=notes, legend=legend_of(list(rows)))


def size_bars(
    rows: Mapping[str, Mapping[str, float]],
    *,
    counts: Mapping[str, int] | None = None,
    spreads: Mapping[str, Mapping[str, float]] | None = None,
    title: str = "AP by size of object",
) -> bytes:
    """Bars of AP for small, medium and large objects.

    rows: of each row fractions under APs, APm and APl. counts: number of objects under the same names, for the labels.
    spreads: of the rows that have one, the half length of a whisker under the same names, fractions.
    """
    labels = {key: SIZE_NAMES[key] for key in SIZE_NAMES}
    if counts is not None:
        labels = {key: f"{name}\n{_objects(counts.get(key, 0))}" for key, name in labels.items()}
    return _grouped(rows, labels, spreads or {}, "AP, percent", title, "No AP by size was measured.", [])


def error_bars(rows: Mapping[str, Mapping[str, float]], *, title: str = "What each kind of error costs") -> bytes:
    """Bars of TIDE's dAP50: how much AP50 would grow if that kind of error alone were mended.

    rows: of each row fractions under Cls, Loc, Both, Dupe, Bkg and Miss. Bolya et al. 2020, arXiv 2008.08115.
    """
    labels = {key: f"{key}\n{name}" for key, name in ERROR_NAMES.items()}
    notes = ["AP50 lost to each kind of error (TIDE); lower is better"]
    return _grouped(rows, labels, {}, "AP50 lost, points", title, "No errors were counted.", notes)


def difference_plot(
    names: Sequence[str],
    estimates: Any,
    lows: Any,
    highs: Any,
    *,
    metric: str = "AP",
    title: str = "Differences, with 95 % intervals",
) -> bytes:
    """A forest plot: one line a comparison, its name and numbers above it, and where zero is.

    names: N comparisons. estimates, lows, highs: (N,) fractions; NaN: not measured.
    Filled and coloured where the interval leaves zero out (orange: better, blue: worse), hollow and grey where not.
    """
    table = np.array([np.asarray(column, dtype=float).ravel() for column in (estimates, lows, highs)]).T
    table = 100 * table.reshape(len(names), 3)
    known = np.isfinite(table[:, 0])
    if not known.any():
        return message_svg(title, "No two rows can be compared yet.")
    ends = np.concatenate([table[known].ravel(), [0.0]])
    ends = ends[np.isfinite(ends)]
    margin = 0.06 * max(float(np.ptp(ends)), 0.1)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.set_xlim(ends.min() - margin, ends.max() + margin)
        axes.set_ylim(len(names) - 0.35, -0.75)
        axes.axvline(0, color=INK, linewidth=1.4, zorder=1)
        for place, (name, (estimate, low, high)) in enumerate(zip(names, table, strict=True)):
            words = _difference_text(estimate, low, high)
            for x, text, side in ((0, clean(name, 48), "left"), (1, words, "right")):
                axes.text(x, place - 0.32, text, transform=axes.get_yaxis_transform(), ha=side, va="center",
                          fontsize=SMALL_SIZE, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
            if not finite(estimate):
                continue
            color = OTHER_COLORS[0] if low > 0 else PLAIN_COLORS[0] if high < 0 else MUTED
            if finite(low) and finite(high):
                axes.plot([low, high], [place, place], color=color, linewidth=2.4, gid=f"interval-{place}")
            axes.plot([estimate], [place], "o", color=color, markersize=8, markeredgewidth=2, zorder=3,
                      markerfacecolor="white" if color == MUTED else color, gid=f"estimate-{place}")  # fmt: skip
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
        axes.set_xlabel(f"difference in {clean(metric)}, points")

    notes = ["right of zero is better; hollow: the interval holds zero"]
    return draw_svg(draw, 0.7 + 0.56 * (len(names) + 0.4), title=title, notes=notes)


def _grouped(
    rows: Mapping[str, Mapping[str, float]],
    labels: Mapping[str, str],
    spreads: Mapping[str, Mapping[str, float]],
    y_label: str,
    title: str,
    empty: str,
    notes: Sequence[str],
) -> bytes:
    """Upright bars, a group a key of `labels`, a bar a row, in percent; "n/a" where a value is missing."""
    values = np.array([[_number(row.get(key)) for key in labels] for row in rows.values()])
    values = values.reshape(len(rows), len(labels))
    whiskers = np.array([[_number(spreads.get(name, {}).get(key)) for key in labels] for name in rows])
    whiskers = whiskers.reshape(values.shape)
    if not np.isfinite(values).any():
        return message_svg(title, empty)
    width = 0.8 / len(rows)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        places = np.arange(len(labels)) - 0.4 + width / 2
        for number, color in enumerate(row_colors(list(rows))):
            _columns(axes, places + number * width, width, values[number], whiskers[number], color, number,
                     write=len(rows) * len(labels) <= 12)  # fmt: skip
        axes.set_xticks(range(len(labels)), list(labels.values()))
        axes.tick_params(axis="x", length=0)
        axes.set_ylim(1.1 * min(0.0, float(np.nanmin(values))), 1.12 * max(0.01, _highest(values, whiskers)))
        axes.set_xlim(-0.55, len(labels) - 0.45)
        axes.grid(visible=False, axis="x")
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")
        axes.set_ylabel(y_label)

    return draw_svg(draw, 3.4, title=title, notes=notes, legend=legend_of(list(rows)))


def _bars(axes: Axes, places: np.ndarray, values: np.ndarray, spreads: np.ndarray, color: str, number: int) -> None:
    """Horizontal bars of one row of a chart, each with its value at its end. Bar i has the id bar-{number}-{i}."""
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")
    known = np.isfinite(values)
    for i in range(len(values)):
        end = float(values[i]) if known[i] else 0.0
        if known[i]:
            (bar,) = axes.barh(places[i], values[i], height=BAR_HEIGHT * 0.92, color=color)
            bar.set_gid(f"bar-{number}-{i}")
        if known[i] and finite(spreads[i]):
            axes.errorbar(values[i], places[i], xerr=spreads[i], color=INK, linewidth=1, capsize=2)
            end += float(spreads[i])
        axes.annotate(_label(values[i]), (end, places[i]), (3, 0), textcoords="offset points",
                      va="center_baseline", fontsize=10)  # fmt: skip


def _columns(
    axes: Axes,
    places: np.ndarray,
    width: float,
    values: np.ndarray,
    spreads: np.ndarray,
    color: str,
    number: int,
    *,
    write: bool,
) -> None:
    """Upright bars of one row of a chart. Bar i has the id bar-{number}-{i}."""
    for i in range(len(values)):
        end = float(values[i]) if finite(values[i]) else 0.0
        if finite(values[i]):
            (bar,) = axes.bar(places[i], values[i], width=width * 0.94, color=color)
            bar.set_gid(f"bar-{number}-{i}")
            if finite(spreads[i]):
                axes.errorbar(places[i], values[i], yerr=spreads[i], color=INK, linewidth=1, capsize=3)
                end += float(spreads[i])
        if write or not finite(values[i]):
            axes.annotate(_label(values[i]), (places[i], max(end, 0.0)), (0, 2), textcoords="offset points",
                          ha="center", va="bottom", fontsize=11 if len(values) <= 3 else 10)  # fmt: skip


def _stacked(classes: int, rows: int, cut: int | None) -> np.ndarray:
    """Inches from the top of each class's first bar; a wider gap after the first `cut` classes."""
    places = np.arange(classes) * (rows * BAR_HEIGHT + BAR_GAP)
    return places if cut is None else places + np.where(np.arange(classes) >= cut, 2 * BAR_GAP, 0.0)


def _spread_table(rows: Mapping[str, Any], spreads: Mapping[str, Any] | None, size: int) -> np.ndarray:
    nothing = np.full(size, np.nan)
    return np.array([np.asarray((spreads or {}).get(row, nothing), dtype=float) for row in rows])


def _highest(values: np.ndarray, spreads: np.ndarray) -> float:
    return float(np.nanmax(values + np.nan_to_num(spreads)))


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _label(value: float) -> str:
    return percent(float(value)) if finite(value) else "n/a"


def _objects(count: int) -> str:
    return f"{count:,} object{'' if count == 1 else 's'}"


def _difference_text(estimate: float, low: float, high: float) -> str:
    if not finite(estimate):
        return "not measured"
    numbers = [f"{number:+.1f}".replace("-", "\u2212") for number in (estimate, low, high)]
    return f"{numbers[0]}  [{numbers[1]}, {numbers[2]}]" if finite(low) and finite(high) else numbers[0]
