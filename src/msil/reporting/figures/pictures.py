"""Pictures as pixels: boxes on images, predictions beside ground truth, and a run's curves.

Thread safe and without a display: Pillow draws boxes, and matplotlib is used without pyplot.
"""

from __future__ import annotations

import colorsys
import csv
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from msil.reporting.figures.charts import plot_curves
from msil.runs import write_bytes

if TYPE_CHECKING:
    from msil.detection.structures import Detections, Target

Color = tuple[int, int, int]
Rect = tuple[int, int, int, int]  # x1 y1 x2 y2 in pixels, x2 and y2 exclusive

# Bright, and far apart in the first few, which small sets use; red first.
PALETTE: tuple[Color, ...] = (
    (255, 45, 45), (60, 160, 255), (70, 220, 80), (255, 215, 0), (235, 80, 255), (0, 230, 230), (255, 140, 20),
    (255, 150, 190), (170, 255, 60), (170, 120, 255), (0, 200, 140), (255, 225, 160), (190, 80, 40), (160, 200, 255),
    (200, 200, 0), (220, 40, 130),
)  # fmt: skip
HALO: Color = (20, 20, 20)
FONT_SIZE = 13
CELL_SIDE = 384  # pixels of an image's long side in the grid


def class_color(label: int) -> Color:
    """RGB of a class, the same in every picture; classes beyond the palette get hues a golden ratio apart."""
    if label < len(PALETTE):
        return PALETTE[label]
    rgb = colorsys.hsv_to_rgb(label * 0.618034 % 1.0, 0.55 + 0.45 * (label % 2), 0.8 + 0.2 * (label % 3) / 2)
    red, green, blue = (round(255 * part) for part in rgb)
    return red, green, blue


def to_numpy(value: Any) -> np.ndarray:
    """A tensor on any device, or anything array-like, as an array."""
    return value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)


def readable_font_size(height: int, width: int) -> int:
    """Of labels on a picture of that size in pixels: 13, growing with those of more than 1000 pixels, which are shown
    smaller than they are."""
    return round(FONT_SIZE * max(1.0, max(height, width) / 1000))


def draw_boxes(
    image: Any,
    boxes: Any,
    labels: Any,
    classes: Sequence[str],
    *,
    scores: Any = None,
    side: int | None = None,
    font_size: int = FONT_SIZE,
) -> np.ndarray:
    """The image with its boxes outlined in their class's colour and tagged with class (and score).

    image: uint8 (3, H, W) RGB. boxes: (M, 4) x1 y1 x2 y2 in its pixels; non-finite ones are left out, others clipped.
    labels: (M,) indices into classes. scores: (M,) in [0, 1], highest drawn on top, or None.
    side: long side to scale to; None keeps the size. font_size: in the picture's pixels; lines get thicker with it.

    A tag that would hide another one above, below and inside its box is left out: the colour still shows the class.
    Returns uint8 (H', W', 3).
    """
    pixels = np.ascontiguousarray(to_numpy(image).transpose(1, 2, 0))
    if pixels.dtype != np.uint8 or pixels.shape[2] != 3:
        raise ValueError(f"draw_boxes needs a uint8 (3, H, W) image, not {pixels.dtype} {to_numpy(image).shape}")
    canvas, scale = scaled(Image.fromarray(pixels), side)
    corners = to_numpy(boxes).reshape(-1, 4).astype(float) * scale
    marks = np.ones(len(corners)) if scores is None else to_numpy(scores).reshape(-1).astype(float)
    order = [i for i in np.argsort(-marks, kind="stable").tolist() if np.isfinite([*corners[i], marks[i]]).all()]
    shown = {i: _on_canvas(corners[i], canvas.width, canvas.height) for i in order}

    draw, unit = ImageDraw.Draw(canvas), max(1, round(font_size / FONT_SIZE))
    kinds = to_numpy(labels).reshape(-1).astype(int).tolist()
    for i in reversed(order):  # colour inside the box, and a dark line around, which shows on any background
        x1, y1, x2, y2 = shown[i]
        draw.rectangle((x1 - unit, y1 - unit, x2 + unit - 1, y2 + unit - 1), outline=HALO, width=unit)
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), outline=class_color(kinds[i]), width=2 * unit)
    # Boxes about as small as a tag would vanish under one, so tags keep off them.
    taken = [box for box in shown.values() if max(box[2] - box[0], box[3] - box[1]) < 2 * font_size]
    for i in order:  # the highest score first, so that it gets the room
        text = str(classes[kinds[i]]) + ("" if scores is None else f" {marks[i]:.2f}")
        _tag(draw, text, font_size, shown[i], class_color(kinds[i]), taken, canvas.size)
    return np.asarray(canvas)


def scaled(image: Image.Image, side: int | None) -> tuple[Image.Image, float]:
    """The image with a long side of about `side` pixels, and the factor: whole for small images, so that their pixels
    stay square and sharp, else the one that fits."""
    if side is None:
        return image, 1.0
    long = max(image.size)
    scale = float(side // long) if 2 * long <= side else side / long
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale.is_integer() else Image.Resampling.LANCZOS), scale


def above(detections: Detections, score_thresh: float) -> Detections:
    """Those of at least this score, which a NaN is not."""
    kept = detections.scores >= score_thresh
    return replace(
        detections, boxes=detections.boxes[kept], scores=detections.scores[kept], labels=detections.labels[kept]
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

    images: uint8 (3, H, W) each. targets, detections: one an image, boxes in its pixels. Drawn are the
    detections of at least score_thresh, where there is none the highest. Two pairs a row.
    """
    cells: list[tuple[str, np.ndarray]] = []
    for image, target, given in list(zip(images, targets, detections, strict=True))[:max_images]:
        found = above(given, score_thresh)
        truth = draw_boxes(image, target.boxes, target.labels, classes, side=CELL_SIDE)
        cells.append((f"ground truth: {len(target.labels)} (image {target.image_id})", truth))
        title = f"prediction: {len(found.labels)} with score ≥ {score_thresh:g}"
        if not len(found.labels) and len(given.labels):
            found = above(given, float(given.scores.max()))
            title += f"; the highest: {float(found.scores[0]):.2g}"
        drawn = draw_boxes(image, found.boxes, found.labels, classes, scores=found.scores, side=CELL_SIDE)
        cells.append((title, drawn))
    draw_grid(cells, path, columns=4 if len(cells) > 2 else 2)


def draw_grid(cells: Sequence[tuple[str, np.ndarray]], path: str | Path, columns: int = 4) -> None:
    """Write a PNG of pictures, uint8 (H, W, 3), each below its title."""
    rows = max(1, -(-len(cells) // columns))
    figure = Figure(figsize=(4 * columns, 4.2 * rows + 0.5), dpi=100, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, (title, picture) in zip(grid, cells, strict=False):
        axes.set_title(title, fontsize=10)
        axes.imshow(picture)
    write_bytes(path, png(figure))


def draw_curves(metrics_csv_path: str | Path, path: str | Path) -> None:
    """Write a PNG of three panels from a run's metrics.csv: losses and learning rate over steps, AP over epochs.

    Columns that are missing, and empty cells, are what was not measured; a panel without a number is empty.
    """
    with open(metrics_csv_path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    losses = [name for name in (rows[0] if rows else ()) if name.startswith("loss")]
    figure = Figure(figsize=(15, 4.2), dpi=100, layout="constrained")
    for axes, x, names, title in zip(
        figure.subplots(1, 3),
        ("step", "step", "epoch"),
        (losses, ["lr"], ["AP", "AP50", "AP75", "VOC_AP"]),
        ("training losses", "learning rate", "validation AP, percent"),
        strict=True,
    ):
        axes.set_title(title)
        found = {name: [curve] for name in names if len((curve := series(rows, x, name))[0])}
        if found:
            plot_curves(axes, found, x)
            axes.legend(frameon=False)
    write_bytes(path, png(figure))


def series(rows: Sequence[Mapping[str, str]], x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """Two columns of metrics.csv, rows with an empty or non-finite cell in either left out: epochs counted from 1, and
    AP in percent.

    Raises ValueError for a cell that is not a number.
    """
    pairs = [(float(row[x]), float(row[y])) for row in rows if row.get(x) and row.get(y)]
    points = np.array([pair for pair in pairs if all(map(math.isfinite, pair))], dtype=float).reshape(-1, 2)
    return points[:, 0] + (x == "epoch"), points[:, 1] * (100 if "AP" in y else 1)


def image_bytes(picture: np.ndarray, kind: str = "PNG", quality: int = 85) -> bytes:
    """uint8 (H, W, 3) as a file of one of Pillow's formats; thin lines keep their colour in a JPEG of this quality."""
    content, about = io.BytesIO(), PngInfo()
    about.add_text("Software", "msil")  # see runs.check_own
    options = {"JPEG": {"quality": quality, "subsampling": 0}, "PNG": {"pnginfo": about}}
    Image.fromarray(picture).save(content, kind, **options.get(kind, {}))
    return content.getvalue()


def png(figure: Figure) -> bytes:
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a name is drawn as far as the font goes
        FigureCanvasAgg(figure).print_png(content, metadata={"Software": "msil"})
    return content.getvalue()


def plain(text: str, letters: int = 22) -> str:
    """A class's name, cut, and without what matplotlib would read as a formula."""
    text = " ".join(text.split()).replace("$", r"\$")
    return text if len(text) <= letters else f"{text[: letters - 1]}\u2026"


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: no font of the machine is needed."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _on_canvas(box: np.ndarray, width: int, height: int) -> Rect:
    x1, y1, x2, y2 = (round(float(value)) for value in box)
    x1, y1 = min(max(x1, 0), width - 1), min(max(y1, 0), height - 1)
    return x1, y1, min(max(x2, x1 + 1), width), min(max(y2, y1 + 1), height)


def _tag(draw: ImageDraw.ImageDraw, text: str, size: int, box: Rect, color: Color, taken: list[Rect],
         canvas: tuple[int, int]) -> None:  # fmt: skip
    """Write the text at the first free place above, below or inside the box; taken gains the place."""
    width, height = round(_font(size).getlength(text)) + size // 3, size + size // 4
    left = max(0, min(box[0], canvas[0] - width))
    for top in (box[1] - height, box[3], box[1]):
        place = (left, top, left + width, top + height)
        hides = any(place[0] < b[2] and b[0] < place[2] and place[1] < b[3] and b[1] < place[3] for b in taken)
        if 0 <= top <= canvas[1] - height and not hides:
            draw.rectangle((left, top, left + width - 1, top + height - 1), fill=color)
            fill = "black" if np.dot(color, (0.299, 0.587, 0.114)) > 110 else "white"
            draw.text((left + size // 6, top + height - size // 3), text, font=_font(size), fill=fill, anchor="ls")
            taken.append(place)
            return
