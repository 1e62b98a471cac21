"""What the charts of a report are drawn on: one width, one look, colours of rows, text that is only text, and SVG.

A chart is 6.4 inches wide with text of 11 points and more, so that it can still be read at the 330 pixels of a phone.
Its letters stay text, which keeps the files small and lets the browser find the glyphs (of Chinese class names, say)
that matplotlib's font lacks; DejaVu, by which matplotlib lays out, is wider than what browsers take in its place.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle

WIDTH = 6.4  # inches
PAD = 0.08  # inches around everything
TEXT_SIZE, SMALL_SIZE, TITLE_SIZE = 12, 11, 14  # points
TITLE_LINE, NOTE_LINE, LEGEND_LINE = 0.27, 0.22, 0.26  # inches a line
SWATCH = 0.15  # inches, the side of a legend's square
NAME_COLUMNS = 30  # letters of a row's or a run's name before it is cut

# Okabe & Ito's idea: apart in hue and in lightness, for every kind of colour vision.
PLAIN_COLORS = ("#5b7a99", "#1f4e79", "#9db7d1", "#2b2f36")
OTHER_COLORS = ("#e8710a", "#00875a", "#8e44ad", "#d4a900", "#b3123f", "#3aa6c9", "#7a4a2b", "#e07bb0")
INK, MUTED, GRID = "#1d2329", "#5a636c", "#d9dee3"

STYLE = {
    "svg.hashsalt": "msil",  # or every file has ids of its own
    "svg.fonttype": "none",
    "text.parse_math": False,  # a class may be called $\frac
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
    "font.size": TEXT_SIZE,
    "axes.labelsize": TEXT_SIZE,
    "xtick.labelsize": SMALL_SIZE,
    "ytick.labelsize": SMALL_SIZE,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}

LegendEntry = tuple[str, str]  # name, colour

_png_dpi: ContextVar[int | None] = ContextVar("png_dpi", default=None)


@contextmanager
def as_png(dpi: int = 150) -> Iterator[None]:
    """Inside, every chart comes as a PNG file of so many pixels an inch instead of an SVG: for dashboards that show no
    SVG. Letters that matplotlib's font lacks are boxes then."""
    token = _png_dpi.set(dpi)
    try:
        yield
    finally:
        _png_dpi.reset(token)


def row_colors(rows: Sequence[str]) -> list[str]:
    """A colour a row: greyish blues for those with "plain" in their name, orange and on for the others.

    Where no name says plain, the first row, with which the others are compared, takes the first blue.
    """
    plain = ["plain" in row.casefold() for row in rows]
    if rows and not any(plain):
        plain[0] = True
    colors, used = [], {True: 0, False: 0}
    for is_plain in plain:
        palette = PLAIN_COLORS if is_plain else OTHER_COLORS
        colors.append(palette[used[is_plain] % len(palette)])
        used[is_plain] += 1
    return colors


def clean(text: str, columns: int = NAME_COLUMNS) -> str:
    """Text of a user on one line: control characters, which XML forbids, shown as U+FFFD, and cut after `columns`
    letters, of which Chinese, Japanese and Korean ones take two."""
    text = " ".join(str(text).split())
    text = "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
    used = 0
    for position, letter in enumerate(text):
        used += _columns(letter)
        if used > columns:
            return text[:position].rstrip() + "\u2026"
    return text


def draw_svg(
    draw: Callable[[Figure], None],
    height: float,
    *,
    title: str = "",
    notes: Sequence[str] = (),
    legend: Sequence[LegendEntry] = (),
) -> bytes:
    """An SVG file, a PNG inside `as_png`: title, notes and legend above what `draw` puts into the figure, never over.

    draw: adds axes to an empty figure; the layout is matplotlib's constrained one. height: inches left for it.
    The same input gives the same bytes under the same matplotlib. Sets matplotlib's settings while it runs, so not for
    two threads at once.
    """
    with style.context(["default", STYLE]), warnings.catch_warnings():
        # The browser has the glyph that matplotlib's font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        title_lines = textwrap.wrap(clean(title, 120), 54)
        note_lines = [line for note in notes for line in textwrap.wrap(clean(note, 300), 70)]
        entries = list(_placed(legend))
        legend_lines = 1 + max((line for line, *_ in entries), default=-1)
        heading = TITLE_LINE * len(title_lines) + NOTE_LINE * len(note_lines) + LEGEND_LINE * legend_lines
        total = height + heading + (PAD if heading else 0)
        figure = Figure(figsize=(WIDTH, total), facecolor="white")
        canvas = FigureCanvasSVG(figure)
        figure.set_layout_engine(
            ConstrainedLayoutEngine(w_pad=PAD, h_pad=PAD, wspace=0.03, hspace=0.03, rect=(0, 0, 1, height / total))
        )
        top = PAD
        for line in title_lines:
            _write(figure, PAD, top + TITLE_LINE / 2, line, TITLE_SIZE, INK, "bold")
            top += TITLE_LINE
        for line in note_lines:
            _write(figure, PAD, top + NOTE_LINE / 2, line, SMALL_SIZE, MUTED)
            top += NOTE_LINE
        for line, left, name, color in entries:
            middle = top + LEGEND_LINE * (line + 0.5)
            corner = (left / WIDTH, 1 - (middle + SWATCH / 2) / total)
            figure.add_artist(Rectangle(corner, SWATCH / WIDTH, SWATCH / total, facecolor=color, edgecolor=MUTED,
                                        linewidth=0.6, transform=figure.transFigure))  # fmt: skip
            _write(figure, left + SWATCH + 0.07, middle, name, SMALL_SIZE, INK)
        draw(figure)
        content = io.BytesIO()
        dpi = _png_dpi.get()
        if dpi is not None:
            figure.set_dpi(dpi)
            FigureCanvasAgg(figure).print_png(content)
            return content.getvalue()
        canvas.print_svg(content, metadata={"Date": None, "Creator": None, "Title": clean(title, 120) or None})
    # Out with the comments, in which matplotlib repeats every text, and the address of a DTD. In a text or an attribute
    # "<" is always escaped.
    return re.sub(rb"\s*<!(--.*?--|DOCTYPE[^>]*)>", b"", content.getvalue(), flags=re.DOTALL)


def message_svg(title: str, text: str) -> bytes:
    """A picture that says why there is none."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.set_axis_off()
        say(axes, text)

    return draw_svg(draw, 1.6, title=title)


def say(axes: Axes, text: str) -> None:
    """Text in the middle of axes that have nothing else to show."""
    axes.text(0.5, 0.5, textwrap.fill(text, 50), ha="center", va="center", transform=axes.transAxes, color=MUTED)


def legend_of(rows: Sequence[str]) -> list[LegendEntry]:
    """One entry a row; none for a single row without a name."""
    return [(name, color) for name, color in zip(rows, row_colors(rows), strict=True) if name]


def _write(figure: Figure, left: float, top: float, text: str, size: float, color: str, weight: str = "normal") -> None:
    """A line of text whose middle is `top` inches below the figure's edge."""
    height = figure.get_figheight()
    figure.text(left / WIDTH, 1 - top / height, text, fontsize=size, color=color, weight=weight, ha="left",
                va="center_baseline", in_layout=False)  # fmt: skip


def _placed(legend: Sequence[LegendEntry]) -> Iterator[tuple[int, float, str, str]]:
    """(line, inches from the left, name, colour), broken into lines that fit."""
    line, left = 0, PAD
    for name, color in legend:
        shown = clean(name)
        # 0.66 em a letter is DejaVu's mean and a little more.
        advance = SWATCH + 0.07 + sum(map(_columns, shown)) * 0.66 * SMALL_SIZE / 72 + 0.2
        if left > PAD and left + advance - 0.2 > WIDTH - PAD:
            line, left = line + 1, PAD
        yield line, left, shown, color
        left += advance


def _columns(letter: str) -> int:
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 0 if unicodedata.combining(letter) else 1


def finite(value: float | None) -> bool:
    """Whether there is a number to draw."""
    return value is not None and math.isfinite(value)
