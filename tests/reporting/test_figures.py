"""Pictures: boxes pixel by pixel at places worked out by hand, the grid's measures, curves of whatever was logged."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from msil.detection.structures import Detections, Target
from msil.reporting.drawing import HALO, class_color, draw_boxes
from msil.reporting.figures import draw_curves, draw_detections, draw_predictions

GRAY = 128
RED = (255, 45, 45)  # class 0
BLUE = (60, 160, 255)  # class 1
HEADER = "epoch,step,lr,images_per_second,loss,loss_cls,loss_bbox,loss_centerness,AP,AP50,AP75,APs,APm,APl"


def gray(height: int, width: int) -> torch.Tensor:
    return torch.full((3, height, width), GRAY, dtype=torch.uint8)


def detections(*rows: tuple[list[float], float, int]) -> Detections:
    boxes = torch.tensor([row[0] for row in rows], dtype=torch.float32).reshape(-1, 4)
    return Detections(boxes, torch.tensor([row[1] for row in rows]), torch.tensor([row[2] for row in rows]).long())


def target(boxes: list[list[float]], labels: list[int], size: tuple[int, int]) -> Target:
    return Target(torch.tensor(boxes).reshape(-1, 4), torch.tensor(labels, dtype=torch.long), 7, size)


def test_the_outline_is_where_the_box_is() -> None:
    picture = draw_detections(gray(100, 120), detections(([20, 40, 60, 90], 0.9, 0)), ["cat"])
    assert picture.shape == (100, 120, 3)
    assert picture.dtype == np.uint8
    # Box [20, 60) x [40, 90): columns 20, 21, 58, 59 and rows 40, 41, 88, 89 are red, a dark pixel around, gray inside.
    for x in (20, 21, 58, 59):
        assert tuple(picture[60, x]) == RED
    for y in (40, 41, 88, 89):
        assert tuple(picture[y, 50]) == RED
    assert tuple(picture[60, 19]) == tuple(picture[60, 60]) == tuple(picture[90, 50]) == HALO
    assert (picture[42:88, 22:58] == GRAY).all()
    assert tuple(picture[60, 18]) == tuple(picture[60, 61]) == (GRAY, GRAY, GRAY)
    assert tuple(picture[30, 20]) == RED  # the tag sits above the box, from row 40 - 16 on
    assert (picture[:23] == GRAY).all()


def test_boxes_and_pixels_scale_together() -> None:
    image = gray(32, 32)
    image[:, 10, 12] = 0
    picture = draw_boxes(image, torch.tensor([[4.0, 20, 12, 28]]), torch.tensor([1]), ["a", "b"], side=128)
    assert picture.shape == (128, 128, 3)  # 4 times, sharp: one black pixel is a block of 4 x 4
    assert (picture[40:44, 48:52] == 0).all()
    assert (picture[:, :, 0] == 0).sum() == 16
    assert tuple(picture[96, 16]) == tuple(picture[96, 47]) == BLUE  # x from 4 * 4 = 16 to 12 * 4 = 48
    assert tuple(picture[111, 30]) == BLUE  # y ends at 28 * 4 = 112


@pytest.mark.parametrize(
    ("size", "shape"), [((480, 640), (288, 384)), ((300, 200), (384, 256)), ((100, 128), (300, 384))]
)
def test_pictures_fit_the_cell(size: tuple[int, int], shape: tuple[int, int]) -> None:
    none = torch.zeros(0)
    assert draw_boxes(gray(*size), none, none, [], side=384).shape[:2] == shape


def test_low_scores_and_broken_boxes_are_left_out() -> None:
    nan, inf = float("nan"), float("inf")
    found = detections(
        ([10, 30, 40, 60], 0.29, 0), ([nan, 0, 9, 9], 0.9, 0), ([0, 0, inf, 9], 0.9, 0), ([5, 5, 9, 9], nan, 0)
    )
    assert (draw_detections(gray(64, 64), found, ["cat"]) == GRAY).all()


def test_boxes_over_the_edge_are_clipped() -> None:
    picture = draw_detections(gray(50, 50), detections(([-20, -5, 90, 70], 0.9, 0)), ["x"])
    assert tuple(picture[25, 0]) == tuple(picture[25, 49]) == tuple(picture[49, 25]) == RED


def test_the_image_given_is_not_painted_on() -> None:
    image = gray(50, 50)
    draw_detections(image, detections(([5, 25, 40, 45], 0.9, 0)), ["x"])
    assert (image == GRAY).all()


def test_tags_never_hide_tags() -> None:
    # Four boxes on one place, the surest first: tags above at both ends, then below at both ends, each 16 high and
    # whole: the two columns at a tag's ends hold no letter.
    rows = [([30.0, 60, 150, 160], 0.9 - 0.1 * i, i) for i in range(4)]
    picture = draw_detections(gray(200, 200), detections(*rows), ["a", "b", "c", "d"])
    for label, (column, top) in enumerate([(30, 44), (149, 44), (30, 160), (149, 160)]):
        assert (picture[top : top + 16, column] == class_color(label)).all()


def test_tags_keep_off_tiny_boxes() -> None:
    # The tag of the large box would stand right above it, on the tiny one; it goes to the other end instead.
    rows = [([40.0, 60, 190, 160], 0.9, 0), ([42.0, 46, 54, 58], 0.8, 1)]
    picture = draw_detections(gray(200, 200), detections(*rows), ["a", "b"])
    assert tuple(picture[52, 42]) == tuple(picture[52, 53]) == BLUE
    assert tuple(picture[52, 48]) == (GRAY, GRAY, GRAY)
    assert (picture[44:60, 189] == RED).all()


def test_a_float_image_is_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        draw_boxes(torch.zeros(3, 8, 8), torch.zeros(0, 4), torch.zeros(0), [])


def test_colours_of_80_classes_differ() -> None:
    assert len({class_color(label) for label in range(80)}) == 80


def test_the_grid_has_truth_left_and_prediction_right(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "predictions.png"
    draw_predictions(
        [gray(128, 128)] * 3,
        [target([[32, 32, 96, 96]], [0], (128, 128))] * 3,
        [detections(([32, 32, 96, 96], 0.8, 1))] * 3,
        ["circle", "square"],
        path,
        max_images=2,
    )
    picture = np.asarray(Image.open(path))
    # One row of two pairs: margins 8 + 384 + 8 + 384 + gap 24 + 384 + 8 + 384 + 8; 8 + title 22 + 384 + 8 + legend 22.
    assert picture.shape == (444, 1592, 3)
    # In a cell the box is [96, 288); cells start at row 30 and columns 8, 400, 808, 1200.
    for left, color in ((8, RED), (400, BLUE), (808, RED), (1200, BLUE)):
        assert tuple(picture[30 + 192, left + 96]) == color
        assert tuple(picture[30 + 192, left + 287]) == color
        assert tuple(picture[30 + 287, left + 192]) == color
        assert tuple(picture[30 + 192, left + 192]) == (GRAY, GRAY, GRAY)


def test_images_without_boxes_make_a_grid(tmp_path: Path) -> None:
    draw_predictions([gray(64, 96)], [target([], [], (64, 96))], [detections()], ["a"], tmp_path / "p.png")
    # 96 * 4 = 384 wide, 64 * 4 = 256 high; one pair; no class, no legend.
    assert Image.open(tmp_path / "p.png").size == (8 + 384 + 8 + 384 + 8, 8 + 22 + 256 + 8)


def coloured(picture: np.ndarray, color: tuple[int, int, int]) -> int:
    return int((np.abs(picture[:, :, :3].astype(int) - color).max(axis=2) < 12).sum())


TAB_BLUE = (31, 119, 180)


def curves(tmp_path: Path, *rows: str) -> np.ndarray:
    (tmp_path / "metrics.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    draw_curves(tmp_path / "metrics.csv", tmp_path / "curves.png")
    picture = np.asarray(Image.open(tmp_path / "curves.png"))
    assert picture.shape[:2] == (420, 1500)  # 15 x 4.2 inches at 100 dots
    return picture


def test_curves_of_a_run(tmp_path: Path) -> None:
    rows = [f"{step // 10},{step},0.01,20,{3 - step / 40},1,1,1,,,,,," for step in range(40)]
    rows += [f"{epoch},{10 * epoch},,,,,,,{epoch / 10},0.5,0.3,,," for epoch in range(1, 5)]
    picture = curves(tmp_path, *rows)
    assert coloured(picture[:, :600], TAB_BLUE) > 500  # loss, left
    assert coloured(picture[:, 1050:], TAB_BLUE) > 300  # AP, right


def test_one_logged_step_and_one_evaluation_are_visible(tmp_path: Path) -> None:
    picture = curves(tmp_path, "0,0,0.01,20,3,1,1,1,,,,,,", "1,1,,,,,,,0.2,0.5,0.3,,,")
    assert coloured(picture[:, :350], TAB_BLUE) > 20  # left of the legend
    assert coloured(picture[100:, 1050:], TAB_BLUE) > 20


@pytest.mark.parametrize("rows", [[], ["0,0,0.01,20,nan,1,1,1,,,,,,"], ["1,1,,,,,,,,,,,,"]])
def test_curves_without_an_evaluation(tmp_path: Path, rows: list[str]) -> None:
    assert coloured(curves(tmp_path, *rows)[:, 1050:], TAB_BLUE) == 0


def grid(tmp_path: Path, count: int, max_images: int = 8, *, found: Detections | None = None) -> np.ndarray:
    """Of `count` images 64 high and 96 wide (in the cell 256 x 384), each with one true box of class 0."""
    truth = [target([[8, 8, 40, 40]], [0], (64, 96))] * count
    empty = detections() if found is None else found
    draw_predictions(
        [gray(64, 96)] * count, truth, [empty] * count, ["a", "b"], tmp_path / "p.png", max_images=max_images
    )
    return np.asarray(Image.open(tmp_path / "p.png"))


@pytest.mark.parametrize(
    ("count", "max_images", "rows", "pairs"),
    [(1, 8, 1, 1), (2, 8, 1, 2), (3, 8, 2, 2), (8, 8, 4, 2), (9, 8, 4, 2), (3, 1, 1, 1)],
)
def test_the_grid_is_as_large_as_its_images_need(
    tmp_path: Path, count: int, max_images: int, rows: int, pairs: int
) -> None:
    picture = grid(tmp_path, count, max_images)
    # A pair is 384 + 8 + 384 = 776, margins 8, gap 24; a row is title 22 + 256 + 8, then the legend's line of 22.
    assert picture.shape == (8 + 286 * rows + 22, 16 + 776 * pairs + 24 * (pairs - 1), 3)


def test_no_images_make_a_blank_page(tmp_path: Path) -> None:
    picture = grid(tmp_path, 0)
    assert (picture == 255).all() and picture.size > 0


def test_nothing_found_leaves_the_right_picture_plain(tmp_path: Path) -> None:
    for found in (detections(), detections(([8, 8, 40, 40], 0.29, 1))):
        picture = grid(tmp_path, 1, found=found)
        assert (picture[30 : 30 + 256, 400 : 400 + 384] == GRAY).all()
        assert tuple(picture[30 + 96, 8 + 32]) == RED  # the truth is there: x = 8 * 4
        assert coloured(picture, BLUE) == 0  # and class b is not in the legend


def test_nothing_true_leaves_the_left_picture_plain(tmp_path: Path) -> None:
    found = detections(([8, 8, 40, 40], 0.9, 1))
    draw_predictions([gray(64, 96)], [target([], [], (64, 96))], [found], ["a", "b"], tmp_path / "p.png")
    picture = np.asarray(Image.open(tmp_path / "p.png"))
    assert (picture[30 : 30 + 256, 8 : 8 + 384] == GRAY).all()
    assert tuple(picture[30 + 96, 400 + 32]) == BLUE
    assert coloured(picture, RED) == 0


def test_the_threshold_is_inclusive(tmp_path: Path) -> None:
    found = detections(([8.0, 30, 40, 60], 0.5, 0))
    assert (draw_detections(gray(64, 96), found, ["a"], 0.5) != GRAY).any()
    assert (draw_detections(gray(64, 96), found, ["a"], 0.51) == GRAY).all()


def test_lists_of_different_lengths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        draw_predictions([gray(8, 8)] * 2, [target([], [], (8, 8))], [detections()] * 2, ["a"], tmp_path / "p.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [(8, 8), (4, 600), (600, 4), (1, 1)])
def test_images_of_any_shape_are_drawn(tmp_path: Path, size: tuple[int, int]) -> None:
    height, width = size
    box = [0.0, 0.0, width, height]
    draw_predictions([gray(*size)], [target([box], [0], size)], [detections((box, 0.9, 0))], ["a"], tmp_path / "p.png")
    assert Image.open(tmp_path / "p.png").size[0] == 792


def test_many_classes_do_not_widen_the_page(tmp_path: Path) -> None:
    labels = list(range(80))
    boxes = [[float(i), 5.0, i + 9.0, 30.0] for i in labels]
    names = [f"a rather long class name {i}" for i in labels]
    draw_predictions([gray(64, 96)], [target(boxes, labels, (64, 96))], [detections()], names, tmp_path / "p.png")
    picture = np.asarray(Image.open(tmp_path / "p.png"))
    assert picture.shape[1] == 792
    assert (picture[:, -4:] == 255).all()  # nothing runs over the margin


def test_the_pictures_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid(tmp_path, 1)
    before = (tmp_path / "p.png").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        grid(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]
    assert (tmp_path / "p.png").read_bytes() == before


@pytest.mark.parametrize(
    "text",
    [
        "",  # a run that logged nothing
        "epoch,step\n0,1\n",
        "step,loss\n1,3.0\n2,2.0\n",  # no lr, no AP
        "epoch,AP\n1,0.2\n",  # an evaluation alone
        "epoch,step,lr,loss,AP\n0,1,0.1,inf,nan\n",
        "epoch,step,lr,loss,AP\n0,1,0.1,3.0,\n0,2,0.1\n",  # a line cut off by a crash
        "epoch,step,loss,VOC_AP\n0,1,3.0,\n1,2,,0.7\n",
    ],
)
def test_curves_of_what_there_is(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.csv").write_text(text)
    draw_curves(tmp_path / "metrics.csv", tmp_path / "curves.png")
    picture = np.asarray(Image.open(tmp_path / "curves.png"))
    assert picture.shape[:2] == (420, 1500)
    loss = "3.0" in text
    assert (coloured(picture[:, :550], TAB_BLUE) > 20) == loss
    evaluated = text.startswith("epoch,AP") or "VOC_AP" in text
    assert (coloured(picture[:, 1050:], TAB_BLUE) > 10) == evaluated


def test_many_evaluations_fill_their_panel(tmp_path: Path) -> None:
    rows = [f"{epoch},{epoch},,,,,,,{0.4 + 0.001 * epoch},,,,," for epoch in range(100)]
    picture = curves(tmp_path, *rows)
    blue = np.abs(picture[:, 1050:, :3].astype(int) - TAB_BLUE).max(axis=2) < 12
    columns = np.flatnonzero(blue.any(axis=0))
    assert columns[-1] - columns[0] > 300  # from end to end
    # It rises from 40 to 49.9 percent over an axis from 0 on: right is higher, and all in the panel's upper part.
    rows_of = [np.flatnonzero(blue[:, column]).mean() for column in (columns[3], columns[-4])]
    assert rows_of[1] < rows_of[0] < 200


def test_drawing_works_in_threads(tmp_path: Path) -> None:
    """Both pictures may be drawn while another thread draws: no global figure is shared."""
    (tmp_path / "m.csv").write_text("epoch,step,loss,AP\n0,1,3.0,\n1,2,,0.5\n")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: draw_curves(tmp_path / "m.csv", tmp_path / f"{i}.png"), range(4)))
    assert len({(tmp_path / f"{i}.png").read_bytes() for i in range(4)}) == 1
