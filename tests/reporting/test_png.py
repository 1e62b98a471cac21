"""The report's charts as PNG, for dashboards."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from PIL import Image

from msil.reporting.canvas import as_png, message_svg
from msil.reporting.charts import class_bars


def bars() -> bytes:
    return class_bars(["circle", "square"], {"plain": [0.25, 0.5], "MSIL": [0.3, 0.4]})


def test_inside_as_png_a_chart_is_the_same_picture_in_pixels() -> None:
    with as_png(dpi=144):
        png = bars()
    picture = Image.open(io.BytesIO(png))
    assert picture.format == "PNG"
    box = re.search(rb'viewBox="0 0 ([0-9.]+) ([0-9.]+)"', bars())
    assert box is not None
    # An SVG's units are points: 144 pixels an inch are two a point.
    sides = [2 * float(side) for side in box.groups()]
    assert np.abs(np.array(picture.size) - sides).max() <= 1
    colors = set(map(tuple, np.asarray(picture.convert("RGB")).reshape(-1, 3).tolist()))
    assert {(0x5B, 0x7A, 0x99), (0xE8, 0x71, 0x0A)} <= colors  # the two rows' bars


def test_outside_it_charts_are_svg_again_even_after_an_error() -> None:
    with pytest.raises(ValueError), as_png():
        raise ValueError
    assert message_svg("title", "text").lstrip().startswith((b"<?xml", b"<svg"))
