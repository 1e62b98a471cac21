"""The confusion matrix of a report, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from msil.reporting.canvas import INK, clean, draw_svg, message_svg

MATRIX_LIMIT = 20  # classes of a confusion matrix
COUNTS_LIMIT = 12  # classes of a confusion matrix with its counts printed
SHARES = (0.05, 0.2, 0.5, 0.8)  # of a row, where the next darker colour begins
SHARE_NAMES = ("none", "< 5 %", "5 to 20", "20 to 50", "50 to 80", "\u2265 80 %")
SHARE_COLORS = ("#ffffff", "#e3edf7", "#b7d2ea", "#74a9d4", "#3577b0", "#0f3f73")
NO_CELL = "#e6e6e6"


def confusion_matrix(classes: Sequence[str], counts: Any, *, title: str = "Confusion matrix") -> bytes:
    """Truths down, predictions across, coloured by the share of the row; counts but zeros printed up to 12 classes.

    classes: K names. counts: (K+1, K+1), last row: background (detections that belong to no box), last column: missed
    (boxes without a detection). Of more than 20 classes, those with the most errors are shown.
    """
    table = np.asarray(counts, dtype=float)
    if table.shape != (len(classes) + 1, len(classes) + 1):
        raise ValueError(f"counts of {len(classes)} classes must be square with one row more, not {table.shape}")
    table = np.where(np.isfinite(table), table, 0.0)
    if not table.sum():
        return message_svg(title, "No boxes and no detections to compare.")
    totals = table.sum(axis=1, keepdims=True)
    shares = np.divide(table, totals, out=np.zeros_like(table), where=totals > 0)
    notes = ["colour: share of the row, percent"]
    shown = np.arange(len(classes))
    if len(classes) > MATRIX_LIMIT:
        errors = table.sum(axis=0)[:-1] + table.sum(axis=1)[:-1] - 2 * np.diag(table)[:-1]
        shown = np.sort(np.argsort(-errors, kind="stable")[:MATRIX_LIMIT])
        notes.insert(0, f"the {MATRIX_LIMIT} of {len(classes)} classes with the most errors")
    chosen = np.append(shown, len(classes))
    table, shares, size = table[np.ix_(chosen, chosen)], shares[np.ix_(chosen, chosen)], len(chosen)
    level = (shares > 0) + np.searchsorted(SHARES, shares, side="right")
    level[-1, -1] = len(SHARE_COLORS)  # background that was not detected cannot be counted
    names = [clean(classes[int(label)], 14) for label in shown]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.imshow(level, cmap=ListedColormap([*SHARE_COLORS, NO_CELL]), vmin=0, vmax=len(SHARE_COLORS),
                    interpolation="none", aspect="auto")  # fmt: skip
        axes.set_xticks(range(size), [*names, "missed"], rotation=0 if size <= 5 else 90)
        axes.set_yticks(range(size), [*names, "background"])
        axes.set(xlabel="prediction", ylabel="truth")
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.axhline(size - 1.5, color=INK, linewidth=1.2)
        axes.axvline(size - 1.5, color=INK, linewidth=1.2)
        if len(shown) <= COUNTS_LIMIT:
            for row, column in np.argwhere(table).tolist():
                if (row, column) != (size - 1, size - 1):
                    color = "white" if level[row, column] >= 4 else INK
                    axes.text(column, row, _short(table[row, column]), ha="center", va="center",
                              color=color, fontsize=12 if size <= 7 else 10)  # fmt: skip

    legend = list(zip(SHARE_NAMES, SHARE_COLORS, strict=True))
    return draw_svg(draw, 1.5 + min(4.4, 0.9 + 0.45 * size), title=title, notes=notes, legend=legend)


def _short(count: float) -> str:
    """At most four signs, what a cell has room for: 9999, 10k, 999k, 1.0M."""
    if count < 9_999.5:
        return f"{count:.0f}"
    return f"{count / 1e3:.0f}k" if count < 999_500 else f"{count / 1e6:.1f}M"
