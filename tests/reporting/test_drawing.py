"""Labels and lines that grow with the picture, and names that are wider than it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from msil.reporting.drawing import HALO, draw_boxes, readable_font_size

GRAY = 128
RED = (255, 45, 45)  # class 0


def picture(
    height: int, width: int, box: list[float], *, name: str = "cat", score: float | None = 0.9, font_size: int = 13
) -> np.ndarray:
    image = torch.full((3, height, width), GRAY, dtype=torch.uint8)
    scores = None if score is None else torch.tensor([score])
    return draw_boxes(image, torch.tensor([box]), torch.tensor([0]), [name], scores=scores, font_size=font_size)


def red_columns(drawn: np.ndarray) -> np.ndarray:
    return np.flatnonzero((drawn == RED).all(axis=2).any(axis=0))


# 13 up to 1000 pixels, then 1.3 % of the long side
@pytest.mark.parametrize(
    ("height", "width", "size"), [(1, 1, 13), (480, 640, 13), (1000, 700, 13), (3000, 4000, 52), (2000, 100, 26)]
)
def test_font_size_follows_large_pictures(height: int, width: int, size: int) -> None:
    assert readable_font_size(height, width) == size


def test_lines_and_tags_scale_with_the_font() -> None:
    """A picture of 4 times the size with a font of 4 times the size is the picture, 4 times as large."""
    small = picture(100, 120, [20, 40, 60, 90], score=None)
    large = picture(400, 480, [80, 160, 240, 360], score=None, font_size=52)
    # below the tag, whose letters do not scale to the pixel: rows 42 and on
    assert (large[42 * 4 :] == small[42:].repeat(4, axis=0).repeat(4, axis=1)).all()
    # column 20 * 4 = 80: 8 pixels of red inside, 4 dark ones outside
    assert (large[240, 80:88] == RED).all() and (large[240, 76:80] == HALO).all() and (large[240, 75] == GRAY).all()
    # the tag is 16 * 4 pixels high and stands on the box
    assert tuple(large[160 - 63, 80]) == RED and (large[: 160 - 64] == GRAY).all()


@pytest.mark.parametrize("score", [0.9, None])
def test_a_name_wider_than_the_picture_is_cut_to_fit(score: float | None) -> None:
    fits = picture(100, 150, [10, 40, 60, 90], name="long name", score=score)
    cut = picture(100, 150, [10, 40, 60, 90], name="long name that goes on and on", score=score)
    for drawn in (fits, cut):
        tag = (drawn[24:40] == RED).all(axis=2)
        assert tag[0].sum() > 60  # far wider than a score alone, of some 35 pixels
    assert red_columns(cut)[-1] < 150
    other = picture(100, 150, [10, 40, 60, 90], name="another name that goes on and on", score=score)
    assert (cut != other).any()  # its beginning is what is kept


def test_a_name_at_the_border_moves_inside() -> None:
    drawn = picture(100, 300, [280, 40, 300, 90], name="rather a long name")
    columns = red_columns(drawn[24:40])
    assert columns[-1] == 299 and columns[0] < 200
