"""Boxes with labels on images, as uint8 pixels. Pillow draws: its pixels are exact, where a figure's are resampled."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]  # x1 y1 x2 y2 in pixels, x2 and y2 exclusive

# Bright, and far apart in the first few, which small sets use; red first.
PALETTE: tuple[Color, ...] = (
    (255, 45, 45), (60, 160, 255), (70, 220, 80), (255, 215, 0), (235, 80, 255), (0, 230, 230), (255, 140, 20),
    (255, 150, 190), (170, 255, 60), (170, 120, 255), (0, 200, 140), (255, 225, 160), (190, 80, 40), (160, 200, 255),
    (200, 200, 0), (220, 40, 130),
)  # fmt: skip
HALO: Color = (20, 20, 20)
FONT_SIZE = 13


def class_color(label: int) -> Color:
    """RGB of a class, the same in every picture; classes beyond the palette get hues a golden ratio apart."""
    if label < len(PALETTE):
        return PALETTE[label]
    red, green, blue = colorsys.hsv_to_rgb(
        label * 0.618034 % 1.0, 0.55 + 0.45 * (label % 2), 0.8 + 0.2 * (label % 3) / 2
    )
    return round(255 * red), round(255 * green), round(255 * blue)


@cache
def font(size: int = FONT_SIZE) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: no font of the machine is needed."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def to_numpy(value: Any) -> np.ndarray:
    """A tensor on any device, or anything array-like, as an array."""
    return value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)


def readable_font_size(height: int, width: int) -> int:
    """Of labels on a picture of that size in pixels: 13, growing with those of more than 1000 pixels, which are shown
    smaller than they are."""
    return round(FONT_SIZE * max(1.0, max(height, width) / 1000))


def enlarged_scale(height: int, width: int, side: int) -> float:
    """Factor that brings an image near `side` pixels on its long side: whole for small images, so that their pixels
    stay square and sharp, else the one that fits."""
    long = max(height, width)
    return float(side // long) if 2 * long <= side else side / long


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

    A tag goes where it hides no other tag and the least of its box; where a class name has no room the score alone
    stands, and where that has none nothing: the colour still tells.
    Returns uint8 (H', W', 3).
    """
    pixels = np.ascontiguousarray(to_numpy(image).transpose(1, 2, 0))
    if pixels.dtype != np.uint8 or pixels.shape[2] != 3:
        raise ValueError(f"draw_boxes needs a uint8 (3, H, W) image, not {pixels.dtype} {to_numpy(image).shape}")
    canvas = Image.fromarray(pixels)
    scale = 1.0
    if side is not None:
        scale = enlarged_scale(canvas.height, canvas.width, side)
        size = (max(1, round(canvas.width * scale)), max(1, round(canvas.height * scale)))
        canvas = canvas.resize(size, Image.Resampling.NEAREST if scale.is_integer() else Image.Resampling.LANCZOS)

    corners = to_numpy(boxes).reshape(-1, 4).astype(float) * scale
    kinds = [int(label) for label in to_numpy(labels).reshape(-1)]
    marks = np.full(len(corners), np.nan) if scores is None else to_numpy(scores).reshape(-1).astype(float)
    kept = np.isfinite(corners).all(axis=1) & (np.isfinite(marks) | (scores is None))
    ranks = np.argsort(np.arange(len(marks)) if scores is None else -marks, kind="stable")
    order = [int(i) for i in ranks if kept[i]]
    rectangles = {i: _on_canvas(corners[i], canvas.width, canvas.height) for i in order}

    draw = ImageDraw.Draw(canvas)
    for i in reversed(order):
        _outline(draw, rectangles[i], class_color(kinds[i]), max(1, round(font_size / FONT_SIZE)))
    # Boxes about as small as a tag would vanish under one, so tags keep off them.
    tags = [box for box in rectangles.values() if max(box[2] - box[0], box[3] - box[1]) < 2 * font_size]
    for i in order:  # the surest first, so that they get the room
        texts = _texts(classes[kinds[i]], None if scores is None else f"{marks[i]:.2f}", canvas.width, font_size)
        _tag(draw, texts, font_size, rectangles[i], class_color(kinds[i]), tags, canvas.size)
    return np.asarray(canvas)


def jpeg_bytes(picture: np.ndarray) -> bytes:
    """uint8 (H, W, 3) as a JPEG whose thin lines keep their colour."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "JPEG", quality=85, subsampling=0)
    return content.getvalue()


def text_color(background: Color) -> Color:
    """Black or white, whichever reads better on the background."""
    red, green, blue = background
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 110 else (255, 255, 255)


def _on_canvas(box: np.ndarray, width: int, height: int) -> Rectangle:
    x1, y1, x2, y2 = (round(float(value)) for value in box)
    x1, y1 = min(max(x1, 0), width - 1), min(max(y1, 0), height - 1)
    return x1, y1, min(max(x2, x1 + 1), width), min(max(y2, y1 + 1), height)


def _outline(draw: ImageDraw.ImageDraw, box: Rectangle, color: Color, unit: int) -> None:
    """Two units of colour just inside the box, and one dark one around, which shows on any background."""
    x1, y1, x2, y2 = box
    draw.rectangle((x1 - unit, y1 - unit, x2 + unit - 1, y2 + unit - 1), outline=HALO, width=unit)
    draw.rectangle((x1, y1, x2 - 1, y2 - 1), outline=color, width=2 * unit)


def _texts(name: str, score: str | None, room: int, font_size: int) -> list[str]:
    """What a tag may say, the best first. A name that is wider than the picture, `room`, is cut."""
    whole = name if score is None else f"{name} {score}"
    length = len(name)
    while length > 1 and _tag_size(whole, font_size)[0] > room:
        length -= 1
        whole = f"{name[:length].rstrip()}\u2026" + ("" if score is None else f" {score}")
    return [whole] if score is None else [whole, score]


def _tag_size(text: str, font_size: int) -> tuple[int, int]:
    """(width, height) with the margins around the letters."""
    left, _, right, _ = font(font_size).getbbox(text, anchor="ls")
    return round(right - left) + round(5 * font_size / FONT_SIZE), font_size + round(3 * font_size / FONT_SIZE)


def _tag(
    draw: ImageDraw.ImageDraw,
    texts: Sequence[str],
    font_size: int,
    box: Rectangle,
    color: Color,
    taken: list[Rectangle],
    canvas: tuple[int, int],
) -> None:
    """Write the first text that has a free place; taken gains the place."""
    margin, descent = round(2 * font_size / FONT_SIZE), round(4 * font_size / FONT_SIZE)
    for text in texts:
        width, height = _tag_size(text, font_size)
        for x, y in _places(box, width, height, canvas):
            place = (x, y, x + width, y + height)
            if not any(_overlap(place, other) for other in taken):
                draw.rectangle((x, y, x + width - 1, y + height - 1), fill=color)
                start = (x + margin, y + height - descent)
                draw.text(start, text, font=font(font_size), fill=text_color(color), anchor="ls")
                taken.append(place)
                return


def _places(box: Rectangle, width: int, height: int, canvas: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Top-left corners for a tag, all inside the canvas: above the box, below it, then inside if it is big enough."""
    x1, y1, x2, y2 = box
    right_end, bottom_end = canvas[0] - width, canvas[1] - height
    if right_end < 0 or bottom_end < 0:
        return
    columns = [min(x1, right_end), min(max(x2 - width, 0), right_end)]
    for y in (y1 - height, y2):
        if 0 <= y <= bottom_end:
            yield from ((x, y) for x in columns)
    if x2 - x1 >= width and y2 - y1 >= 2 * height:
        yield x1, y1
        yield x1, y2 - height


def _overlap(one: Rectangle, other: Rectangle) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
