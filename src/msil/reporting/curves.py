"""Curves of a report, as SVG: AP and loss while training, precision against recall."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from msil.reporting.canvas import MUTED, clean, draw_svg, legend_of, message_svg, row_colors

POINTS = 80  # of a curve; longer ones are averaged in bins
CLASS_LIMIT = 9  # small multiples
TOLERANCE = 0.003  # how far the line of a precision-recall curve may pass by a point, 1/3 of a pixel
PANEL_TOLERANCE = 0.01  # in small multiples, a pixel

Runs = Mapping[str, Sequence[tuple[Any, Any]]]  # row name -> (x, y) of each seed


def learning_curves(rows: Runs, *, metric: str = "AP", title: str = "AP during training") -> bytes:
    """AP over epochs: a thin line a seed, the row's mean bold over the epochs that all its seeds reached.

    rows: of each row, the compared one first, one (epochs, AP) a seed, both (E,), AP as fractions; NaN is left out.
    """
    percents = {row: [(xs, 100 * np.asarray(ys, dtype=float)) for xs, ys in seeds] for row, seeds in rows.items()}
    return _training(percents, f"{metric}, percent", "epoch", title, "No evaluation was logged.")


def loss_curves(rows: Runs, *, title: str = "Training loss") -> bytes:
    """Loss over steps, as `learning_curves`; curves of more than 80 points are averaged in bins, which smooths them.

    rows: of each row one (steps, losses) a seed, both (N,).
    """
    longest = max((len(xs) for seeds in rows.values() for xs, _ in seeds), default=0)
    size = _bin_size(longest)
    notes = [f"smoothed: a point is the mean of {size} logged steps"] if size > 1 else []
    return _training(rows, "loss", "step", title, "No loss was logged.", notes)


def precision_recall(
    recalls: Any, rows: Mapping[str, Any], *, iou: float = 0.5, title: str = "Precision and recall"
) -> bytes:
    """Precision over recall, the mean over the classes.

    recalls: (R,) ascending, 0..1. rows: of each row (R,) precisions 0..1; NaN and negative ones are missing.
    """
    if not any(len(_drawable(recalls, precisions)[0]) for precisions in rows.values()):
        return message_svg(title, "No class has a box to be found.")

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        _draw_precisions(axes, recalls, list(rows.values()), row_colors(list(rows)))
        axes.set(xlabel="recall", ylabel="precision")

    notes = [f"mean over the classes, boxes matched at IoU {iou:g}"]
    return draw_svg(draw, 3.8, title=title, notes=notes, legend=legend_of(list(rows)))


def precision_recall_classes(
    recalls: Any,
    classes: Sequence[str],
    rows: Mapping[str, Any],
    *,
    iou: float = 0.5,
    title: str = "Precision and recall per class",
) -> bytes:
    """Precision over recall of each class; of more than 9, nine evenly from the first row's best class to its worst.

    recalls: (R,) ascending, 0..1. classes: K names. rows: of each row (K, R) precisions 0..1, NaN or negative where
    a class has no box to be found; classes without any are left out.
    """
    size = np.size(recalls)
    arrays = {row: np.asarray(values, dtype=float).reshape(len(classes), size) for row, values in rows.items()}
    areas = np.array([[_area(recalls, values) for values in array] for array in arrays.values()])
    areas = areas.reshape(len(arrays), len(classes))
    with_boxes = np.flatnonzero(np.isfinite(areas).any(axis=0))
    if not len(with_boxes):
        return message_svg(title, "No class has a box to be found.")
    first = np.nan_to_num(areas[0], nan=-1.0)[with_boxes]
    shown = with_boxes[np.argsort(-first, kind="stable")]
    notes = [f"boxes matched at IoU {iou:g}"]
    if len(shown) > CLASS_LIMIT:
        notes.append(
            f"{CLASS_LIMIT} of {len(shown)} classes, evenly from the best to the worst of {clean(next(iter(rows)))}"
        )
        shown = shown[np.linspace(0, len(shown) - 1, CLASS_LIMIT).round().astype(int)]
    columns = min(len(shown), 2 if len(shown) in (2, 4) else 3)
    lines = math.ceil(len(shown) / columns)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
        for axes, label in zip(grid, shown, strict=False):
            _draw_precisions(axes, recalls, [array[label] for array in arrays.values()], row_colors(list(rows)),
                             PANEL_TOLERANCE)  # fmt: skip
            axes.set_title(clean(classes[int(label)], 48 // columns), fontsize=12, loc="left", pad=4)
            axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
            axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
        for axes in grid[len(shown) :]:
            axes.set_visible(False)
        for axes in grid[max(0, len(shown) - columns) : len(shown)]:
            axes.tick_params(labelbottom=True)
        figure.supxlabel("recall", fontsize=12)
        figure.supylabel("precision", fontsize=12)

    height = 0.6 + lines * (3.2 if columns == 1 else 2.4 if columns == 2 else 1.8)
    return draw_svg(draw, height, title=title, notes=notes, legend=legend_of(list(rows)))


def _training(rows: Runs, y_label: str, x_label: str, title: str, empty: str, notes: Sequence[str] = ()) -> bytes:
    points = {row: [_finite_points(xs, ys) for xs, ys in seeds] for row, seeds in rows.items()}
    points = {row: [seed for seed in seeds if len(seed[0])] for row, seeds in points.items()}
    if not any(points.values()):
        return message_svg(title, empty)
    notes = list(notes)
    if any(len(seeds) > 1 for seeds in points.values()):
        notes.insert(0, "thin: one seed, bold: mean of the seeds")
    missing = [clean(row) for row, seeds in points.items() if not seeds]
    if missing:
        notes.append(f"nothing logged: {', '.join(missing)}")

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for number, (seeds, color) in enumerate(zip(points.values(), row_colors(list(points)), strict=True)):
            if len(seeds) > 1:
                for xs, ys in map(_binned, seeds):
                    axes.plot(xs, ys, color=color, linewidth=0.9, alpha=0.5, marker="." if len(xs) == 1 else "")
            xs, ys = _binned(_mean_curve(seeds))
            if len(xs):
                marker = "o" if len(xs) <= 15 else ""
                axes.plot(xs, ys, color=color, linewidth=2.4, marker=marker, markersize=4.5, clip_on=False,
                          zorder=3, gid=f"mean-{number}")  # fmt: skip
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.set_ylim(bottom=min(0.0, axes.dataLim.ymin), top=axes.dataLim.ymax * 1.05 or 1.0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True))
        left, right = axes.dataLim.intervalx
        if right - left < 1:  # one point: no ticks between epochs
            axes.set_xlim(left - 1, right + 1)

    return draw_svg(draw, 3.6, title=title, notes=notes, legend=legend_of(list(rows)))


def _finite_points(xs: Any, ys: Any) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(xs, dtype=float).ravel(), np.asarray(ys, dtype=float).ravel()
    kept = np.isfinite(x) & np.isfinite(y)
    return x[kept], y[kept]


def _mean_curve(seeds: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the seeds at the places that all of them have, so that a run that ended early makes no jump."""
    if not seeds:
        return np.zeros(0), np.zeros(0)
    tables = [dict(zip(xs.tolist(), ys.tolist(), strict=True)) for xs, ys in seeds]
    shared = sorted(set.intersection(*(set(table) for table in tables)))
    return np.array(shared), np.array([np.mean([table[x] for table in tables]) for x in shared])


def _binned(points: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS points, each the mean of as many neighbours; the last may be of fewer."""
    size = _bin_size(len(points[0]))
    xs, ys = ([part.mean() for part in np.split(values, range(size, len(values), size))] if len(values) else []
              for values in points)  # fmt: skip
    return np.array(xs), np.array(ys)


def _bin_size(count: int) -> int:
    return max(1, math.ceil(count / POINTS))


def _draw_precisions(
    axes: Axes, recalls: Any, rows: Sequence[Any], colors: Sequence[str], tolerance: float = TOLERANCE
) -> None:
    axes.set(xlim=(0, 1.01), ylim=(0, 1.03))
    for number, (precisions, color) in enumerate(zip(rows, colors, strict=True)):
        xs, ys = _simplified(*_drawable(recalls, precisions), tolerance)
        if len(xs):
            axes.plot(xs, ys, color=color, linewidth=2, marker="o" if len(xs) == 1 else "", clip_on=False,
                      gid=f"curve-{number}")  # fmt: skip
    if not axes.lines:
        axes.text(0.5, 0.5, "no boxes", ha="center", va="center", color=MUTED)


def _drawable(recalls: Any, precisions: Any) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(recalls, dtype=float).ravel(), np.asarray(precisions, dtype=float).ravel()
    kept = np.isfinite(x) & np.isfinite(y) & (y >= 0)
    return x[kept], y[kept]


def _area(recalls: Any, precisions: Any) -> float:
    _, ys = _drawable(recalls, precisions)
    return float(ys.mean()) if len(ys) else math.nan


def _simplified(xs: np.ndarray, ys: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """The fewest points whose line passes all of them within the tolerance in y (Ramer, Douglas and Peucker's rule)."""
    if len(xs) < 3:
        return xs, ys
    kept, spans = {0, len(xs) - 1}, [(0, len(xs) - 1)]
    while spans:
        start, end = spans.pop()
        line = np.interp(xs[start : end + 1], xs[[start, end]], ys[[start, end]])
        distances = np.abs(ys[start : end + 1] - line)
        middle = start + int(distances.argmax())
        if distances.max() > tolerance:
            kept.add(middle)
            spans += [(start, middle), (middle, end)]
    order = sorted(kept)
    return xs[order], ys[order]
