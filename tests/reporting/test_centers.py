"""Figure 5 as a picture and a table."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from msil.errors import ConfigError
from msil.metrics.centers import Centers, quadrant_counts
from msil.reporting.centers import centers_csv, draw_centers, write_centers


def centers(**points: list[list[float]]) -> dict[str, Centers]:
    arrays = {name: np.array(rows).reshape(-1, 2) for name, rows in points.items()}
    return {name: Centers(array, quadrant_counts(array)) for name, array in arrays.items()}


def truth(names: list[str]) -> SimpleNamespace:
    """An image of 100 x 100 with one box of every class but the last, in the upper left."""
    boxes = len(names) - 1
    return SimpleNamespace(
        classes=names, image_ids=np.array([1]), sizes=np.array([[100, 100]]), truth_labels=np.arange(boxes),
        truth_images=np.zeros(boxes, dtype=int), truth_boxes=np.tile([5.0, 5, 10, 10], (boxes, 1)),
        truth_ignored=np.zeros(boxes, dtype=bool),
    )  # fmt: skip


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


def test_a_full_quarter_is_red_and_the_others_blue() -> None:
    picture = pixels(draw_centers(centers(cat=[[0.1, 0.1], [0.2, 0.3]]), ["cat"]))
    panel = picture[:, : int(picture.shape[1] * 0.6)]  # without the colour bar
    red = np.argwhere(panel[..., 0] - panel[..., 2] > 60)
    blue = np.argwhere(panel[..., 2] - panel[..., 0] > 60)
    assert len(blue) > 2.5 * len(red) > 0
    assert (red.max(axis=0) <= blue.max(axis=0)).all() and red.mean(axis=0)[0] < blue.mean(axis=0)[0]


def test_nine_three_and_one_class_and_names_that_mean_something_to_matplotlib() -> None:
    hostile = {r"$\frac{": [[0.3, 0.3]], "<b>": [], "日本" * 3: [[0.5, 0.5]]}
    found = centers(**hostile)
    one, three, nine = (
        pixels(draw_centers(found, names)) for names in ([*found][:1], [*found], [*found, *found, *found])
    )
    assert one.shape[1] < three.shape[1] == nine.shape[1]
    assert three.shape[0] < nine.shape[0]


def test_unknown_classes_and_none_are_refused() -> None:
    found = centers(cat=[[0.1, 0.1]], dog=[])
    with pytest.raises(ConfigError, match="no class 'cow'; its classes are cat, dog"):
        draw_centers(found, ["cat", "cow"])
    with pytest.raises(ConfigError, match="no object"):
        draw_centers(found, [])


def test_table_of_all_classes() -> None:
    found = centers(**{"a, b": [[0.1, 0.1], [0.9, 0.9], [0.5, 0.2]], "c": []})
    # 1 upper left, half of the third point left and right above, 1 lower right.
    assert centers_csv(found) == (
        'class,objects,upper_left,upper_right,lower_left,lower_right\n"a, b",3,0.5000,0.1667,0.0000,0.3333\nc,0,,,,\n'
    )


def test_files(tmp_path: Path) -> None:
    out = tmp_path / "new" / "centers.png"
    lines = write_centers(truth([f"class {i}" for i in range(12)]), out)
    assert lines == [
        f"{out}: classes {', '.join(f'class {i}' for i in range(9))}",
        f"{out.with_suffix('.csv')}: of all classes, 12; 11 objects, 1 images",
    ]
    assert Image.open(out).format == "PNG"
    assert out.with_suffix(".csv").read_text().count("\n") == 13
    assert sorted(path.name for path in out.parent.iterdir()) == ["centers.csv", "centers.png"]
    for place, words in ((tmp_path / "a.jpg", "does not end in .png"), (out / "b.png", "cannot be written")):
        with pytest.raises(ConfigError, match=words):
            write_centers(truth(["a", "b"]), place)
