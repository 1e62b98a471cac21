"""Pictures of a run: predictions beside ground truth, and the curves of losses, learning rate and AP.

Thread safe and without a display: Pillow pastes pixels, and matplotlib is used without pyplot.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw

from msil.reporting.drawing import FONT_SIZE, class_color, draw_boxes, font, text_color, to_numpy
from msil.runs import write_bytes

if TYPE_CHECKING:
    from msil.detection.structures import Detections, Target

CELL_SIDE = 384  # pixels of an image's long side in the grid
MARGIN = 8
GAP = 24  # between two pairs
TITLE_HEIGHT = 22
LEGEND_LIMIT = 24  # classes


def draw_detections(
    image: Any,
    detections: Detections,
    classes: Sequence[str],
    score_thresh: float = 0.3,
    *,
    side: int | None = None,
) -> np.ndarray:
    """One image with its detections of at least score_thresh, each tagged with class and score.

    image: uint8 (3, H, W). detections: boxes in its pixels. side: long side of the picture in pixels (labels are 13
    pixels high, so small images need it), None: the image's own size. Returns uint8 (H', W', 3).
    """
    kept = to_numpy(detections.scores) >= score_thresh  # NaN scores compare false
    return draw_boxes(
        image,
        to_numpy(detections.boxes)[kept],
        to_numpy(detections.labels)[kept],
        classes,
        scores=to_numpy(detections.scores)[kept],
        side=side,
    )


def draw_predictions(
    images: Sequence[Any],
    targets: Sequence[Target],
    detections: Sequence[Detections],
    classes: Sequence[str],
    path: str | Path,
    *,
    score_thresh: float = 0.3,
    max_images: int = 8,
) -> None:
    """Write a PNG grid of the first max_images images: ground truth on the left of each pair, prediction on the right.

    images: uint8 (3, H, W) each. targets, detections: one an image, boxes in its pixels. Only detections of at least
    score_thresh are drawn. Two pairs a row.
    """
    cells = []
    seen: set[int] = set()
    for image, target, found in list(zip(images, targets, detections, strict=True))[:max_images]:
        truth = draw_boxes(image, target.boxes, target.labels, classes, side=CELL_SIDE)
        prediction = draw_detections(image, found, classes, score_thresh, side=CELL_SIDE)
        kept = to_numpy(found.scores) >= score_thresh
        seen.update(to_numpy(target.labels).tolist(), to_numpy(found.labels)[kept].tolist())
        cells.append((
            (f"ground truth: {_objects(len(target.labels))} (image {target.image_id})", truth),
            (f"prediction: {int(kept.sum())} with score ≥ {score_thresh:g}", prediction),
        ))  # fmt: skip
    page = _page(cells, [(classes[label], class_color(label)) for label in sorted(seen)])
    content = io.BytesIO()
    page.save(content, "PNG")
    write_bytes(path, content.getvalue())


def draw_curves(metrics_csv_path: str | Path, path: str | Path) -> None:
    """Write a PNG of three panels from a run's metrics.csv: losses and learning rate over steps, AP over epochs.

    Columns that are missing, and empty cells, are what was not measured; a panel without a number says so.
    """
    with open(metrics_csv_path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = list(rows[0]) if rows else []
    figure = Figure(figsize=(15, 4.2), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    losses, rate, scores = figure.subplots(1, 3, width_ratios=(1.5, 1, 1.2))

    for name in (name for name in names if name.startswith("loss")):
        steps, values = _series(rows, "step", name)
        if len(steps):
            (line,) = losses.plot(steps, _smooth(values), linewidth=2, marker=_marker(steps), label=name)
            losses.plot(steps, values, color=line.get_color(), alpha=0.25, linewidth=1)
    _finish(losses, "training losses (bold: smoothed)", "step", "no loss was logged")

    steps, values = _series(rows, "step", "lr")
    if len(steps):
        rate.plot(steps, values, color="tab:gray", linewidth=2, marker=_marker(steps), label="lr")
        rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    _finish(rate, "learning rate", "step", "no learning rate was logged")

    for name in ("AP", "AP50", "AP75", "VOC_AP"):
        epochs, values = _series(rows, "epoch", name)
        if len(epochs):
            label = f"{name.replace('_', ' ')}  (last {100 * values[-1]:.1f})"
            scores.plot(epochs + 1, 100 * values, marker="o", markersize=4, linewidth=2, label=label, clip_on=False)
    _finish(scores, "validation AP, percent", "epoch", "no evaluation yet")

    content = io.BytesIO()
    canvas.print_png(content)
    write_bytes(path, content.getvalue())


def _objects(count: int) -> str:
    return "no objects" if count == 0 else f"{count} object{'' if count == 1 else 's'}"


def _page(cells: Sequence[tuple[tuple[str, np.ndarray], ...]], legend: Sequence[tuple[str, tuple[int, int, int]]]):
    """White page with two pairs of titled pictures a row, and the colours' names below."""
    rows = [cells[i : i + 2] for i in range(0, len(cells), 2)]
    pair_width = 2 * CELL_SIDE + MARGIN
    width = 2 * MARGIN + pair_width + (GAP + pair_width if len(cells) > 1 else 0)
    heights = [TITLE_HEIGHT + max(picture.shape[0] for pair in row for _, picture in pair) + MARGIN for row in rows]
    legend_lines = _legend_lines(legend[:LEGEND_LIMIT], width - 2 * MARGIN)
    page = Image.new("RGB", (width, MARGIN + sum(heights) + TITLE_HEIGHT * len(legend_lines)), "white")
    draw = ImageDraw.Draw(page)
    top = MARGIN
    for row, height in zip(rows, heights, strict=True):
        left = MARGIN
        for pair in row:
            for title, picture in pair:
                draw.text((left, top + TITLE_HEIGHT - 6), title, font=font(), fill="black", anchor="ls")
                page.paste(Image.fromarray(picture), (left, top + TITLE_HEIGHT))
                left += CELL_SIDE + MARGIN
            left += GAP - MARGIN
        top += height
    for line in legend_lines:
        left = MARGIN
        for name, color, advance in line:
            right = left + advance - MARGIN
            draw.rectangle((left, top, right - 1, top + FONT_SIZE + 4), fill=color)
            draw.text((left + 4, top + FONT_SIZE), name, font=font(), fill=text_color(color), anchor="ls")
            left += advance
        top += TITLE_HEIGHT
    return page


def _legend_lines(
    entries: Sequence[tuple[str, tuple[int, int, int]]], width: int
) -> list[list[tuple[str, tuple[int, int, int], int]]]:
    """(name, colour, pixels to the next entry), broken into lines no wider than width."""
    lines: list[list[tuple[str, tuple[int, int, int], int]]] = []
    used = width + 1
    for name, color in entries:
        advance = round(font().getlength(name)) + 8 + MARGIN
        if used + advance > width:
            lines.append([])
            used = 0
        lines[-1].append((name, color, advance))
        used += advance
    return lines


def _series(rows: Sequence[Mapping[str, str]], x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """Two columns, rows with an empty or non-finite cell in either left out."""
    pairs = [(float(row[x]), float(row[y])) for row in rows if row.get(x) and row.get(y)]
    pairs = [pair for pair in pairs if all(math.isfinite(value) for value in pair)]
    points = np.asarray(pairs, dtype=float).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of about a twentieth of the points (no lag), shorter at the ends."""
    window = np.ones(2 * (len(values) // 40) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def _marker(points: np.ndarray) -> str:
    return "o" if len(points) == 1 else ""  # a line through one point is invisible


def _finish(axes: Axes, title: str, x_label: str, empty: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not axes.lines:
        axes.text(0.5, 0.5, empty, ha="center", va="center", transform=axes.transAxes, color="gray")
        axes.set_axis_off()
        return
    axes.set_ylim(bottom=0)
    left, right = axes.dataLim.intervalx
    if right - left < 1:  # one point: no ticks between steps or epochs
        axes.set_xlim(left - 1, right + 1)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
