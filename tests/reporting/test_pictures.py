"""Boxes pixel by pixel at places worked out by hand, grids, curves of whatever was logged, Figure 5."""

from __future__ import annotations

import csv
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.metrics.cases import make

from msil.detection.structures import Detections, Target
from msil.errors import ConfigError
from msil.reporting.figures.centers import write_centers
from msil.reporting.figures.charts import COLORS
from msil.reporting.figures.pictures import (
    HALO,
    above,
    class_color,
    draw_boxes,
    draw_curves,
    draw_predictions,
)

GRAY = 128
RED = (255, 45, 45)  # class 0
BLUE = (60, 160, 255)  # class 1


def gray(height: int, width: int) -> torch.Tensor:
    return torch.full((3, height, width), GRAY, dtype=torch.uint8)


def detections(*rows: tuple[list[float], float, int]) -> Detections:
    boxes = torch.tensor([row[0] for row in rows], dtype=torch.float32).reshape(-1, 4)
    return Detections(boxes, torch.tensor([row[1] for row in rows]), torch.tensor([row[2] for row in rows]).long())


def draw_detections(image: torch.Tensor, found: Detections, classes: list[str]) -> np.ndarray:
    found = above(found, 0.3)
    return draw_boxes(image, found.boxes, found.labels, classes, scores=found.scores)


def coloured(picture: np.ndarray, color: tuple[int, int, int]) -> int:
    return int((np.abs(picture[:, :, :3].astype(int) - color).max(axis=2) < 12).sum())


def test_the_outline_is_where_the_box_is() -> None:
    image = gray(100, 120)
    picture = draw_detections(image, detections(([20, 40, 60, 90], 0.9, 0)), ["cat"])
    assert picture.shape == (100, 120, 3) and picture.dtype == np.uint8
    # Box [20, 60) x [40, 90): columns 20, 21, 58, 59 and rows 40, 41, 88, 89 are red, a dark pixel around, gray inside.
    for x in (20, 21, 58, 59):
        assert tuple(picture[60, x]) == RED
    for y in (40, 41, 88, 89):
        assert tuple(picture[y, 50]) == RED
    assert tuple(picture[60, 19]) == tuple(picture[60, 60]) == tuple(picture[90, 50]) == HALO
    assert (picture[42:88, 22:58] == GRAY).all()
    assert tuple(picture[60, 18]) == tuple(picture[60, 61]) == (GRAY, GRAY, GRAY)
    assert tuple(picture[30, 20]) == RED  # the tag sits above the box
    assert (picture[:23] == GRAY).all() and (image == GRAY).all()


def test_boxes_and_pixels_scale_together() -> None:
    image = gray(32, 32)
    image[:, 10, 12] = 0
    picture = draw_boxes(image, torch.tensor([[4.0, 20, 12, 28]]), torch.tensor([1]), ["a", "b"], side=128)
    assert picture.shape == (128, 128, 3)  # 4 times, sharp: one black pixel is a block of 4 x 4
    assert (picture[40:44, 48:52] == 0).all()
    assert tuple(picture[96, 16]) == tuple(picture[96, 47]) == BLUE  # x from 4 * 4 = 16 to 12 * 4 = 48
    assert tuple(picture[111, 30]) == BLUE  # y ends at 28 * 4 = 112
    none = torch.zeros(0)
    assert draw_boxes(gray(480, 640), none, none, [], side=384).shape[:2] == (288, 384)


def test_low_scores_and_broken_boxes_are_left_out_and_others_clipped() -> None:
    nan = float("nan")
    found = detections(([10, 30, 40, 60], 0.29, 0), ([nan, 0, 9, 9], 0.9, 0), ([5, 5, 9, 9], nan, 0))
    assert (draw_detections(gray(64, 64), found, ["cat"]) == GRAY).all()
    picture = draw_detections(gray(50, 50), detections(([-20, -5, 90, 70], 0.3, 0)), ["x"])
    assert tuple(picture[25, 0]) == tuple(picture[25, 49]) == tuple(picture[49, 25]) == RED


def test_tags_hide_neither_tags_nor_tiny_boxes() -> None:
    rows = [([30.0, 60, 150, 160], 0.9 - 0.1 * i, i) for i in range(2)]
    picture = draw_detections(gray(200, 200), detections(*rows), ["a", "b"])
    assert tuple(picture[50, 31]) == RED and tuple(picture[166, 31]) == BLUE  # above, below
    rows = [([40.0, 60, 190, 160], 0.9, 0), ([42.0, 46, 54, 58], 0.8, 1)]
    picture = draw_detections(gray(200, 200), detections(*rows), ["a", "b"])
    assert tuple(picture[52, 42]) == tuple(picture[52, 53]) == BLUE
    assert tuple(picture[52, 48]) == (GRAY, GRAY, GRAY)


@pytest.mark.parametrize(("size", "count"), [((64, 96), 3), ((1, 1), 1), ((64, 96), 0)])
def test_the_grid_has_truth_left_and_prediction_right(size: tuple[int, int], count: int, tmp_path: Path) -> None:
    box = [0.0, 0.0, size[1], size[0]]
    truth = Target(torch.tensor([box]), torch.tensor([0]), 7, size)
    found = detections((box, 0.8, 1), (box, 0.29, 2))
    path = tmp_path / "sub" / "predictions.png"
    names = ["$\\frac{", "square", "third"]
    draw_predictions([gray(*size)] * count, [truth] * count, [found] * count, names, path, max_images=2)
    picture = np.asarray(Image.open(path))
    pairs = min(count, 2)
    assert picture.shape[1] == 800 * max(1, pairs)
    for pair in range(pairs):
        truth_half, prediction = (picture[:400, 800 * pair + 400 * i :][:, :400] for i in (0, 1))
        assert coloured(truth_half, RED) > 0 and coloured(prediction, BLUE) > 0
        assert coloured(truth_half, BLUE) == coloured(prediction, RED) == 0
    assert coloured(picture, class_color(2)) == 0
    weak = detections((box, 0.01, 1), (box, 0.29, 2))  # no score reaches 0.3: the highest
    draw_predictions([gray(*size)] * count, [truth] * count, [weak] * count, names, path, max_images=2)
    picture = np.asarray(Image.open(path))
    assert (coloured(picture, class_color(2)) > 0) == (count > 0) and coloured(picture, BLUE) == 0


@pytest.mark.parametrize(
    "text",
    [
        "",  # a run that logged nothing
        "epoch,AP\n1,0.2\n",  # an evaluation alone
        "epoch,step,lr,loss,AP\n0,1,0.1,inf,nan\n",
        "epoch,step,lr,loss,AP\n0,1,0.1,3.0,\n0,2,0.1\n",  # a line cut off by a crash
        "epoch,step,loss,VOC_AP\n0,1,3.0,\n1,2,,0.7\n",
    ],
)
def test_curves_of_what_there_is(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.csv").write_text(text)
    with ThreadPoolExecutor(2) as pool:  # no global figure is shared
        list(pool.map(lambda i: draw_curves(tmp_path / "metrics.csv", tmp_path / f"{i}.png"), range(2)))
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()
    picture = np.asarray(Image.open(tmp_path / "0.png"))
    first = tuple(bytes.fromhex(COLORS[0][1:]))
    assert (coloured(picture[:, :500], first) > 20) == ("3.0" in text)
    assert (coloured(picture[:, 1000:], first) > 10) == (text.startswith("epoch,AP") or "VOC_AP" in text)


def test_figure_5(tmp_path: Path) -> None:
    out = tmp_path / "new" / "centers.png"
    names = [r"$\frac{", "<b>", "日本", *(f"class {i}" for i in range(9))]
    # One box of every class but the last, in the upper left.
    truth = make([(0, label, [5, 5, 10, 10]) for label in range(11)], classes=names)
    lines = write_centers(truth, out)
    assert lines[1].endswith("of all classes, 12; 11 objects, 1 images") and ", ".join(names[:9]) in lines[0]
    rows = list(csv.DictReader(io.StringIO(out.with_suffix(".csv").read_text())))
    assert (rows[0]["class"], rows[0]["objects"], rows[0]["upper_left"]) == (r"$\frac{", "1", "1.0")
    assert (rows[0]["lower_right"], rows[11]["objects"], rows[11]["upper_left"]) == ("0.0", "0", "")
    picture = np.asarray(Image.open(out).convert("RGB")).astype(int)
    panel = picture[:, : picture.shape[1] // 4]
    red, blue = (np.count_nonzero(panel[..., a] - panel[..., b] > 60) for a, b in ((0, 2), (2, 0)))
    assert blue > 2.5 * red > 0  # one full quarter, three empty ones


def test_figure_5_is_refused_in_one_line(tmp_path: Path) -> None:
    for names, out, words in (
        (["cow"], "a.png", "no class 'cow'; its classes are cat, dog"),
        ([], "a.png", "no object"),
        (None, "a.jpg", r"does not end in \.png"),
        (None, "file/b.png", "cannot be written"),
    ):
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match=words):
            write_centers(make([(0, 0, [5, 5, 10, 10])], classes=("cat", "dog")), tmp_path / out, names)
