"""The gallery: scores counted by hand, a choice that flatters nobody, pictures, and files that stay below the root."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.metrics.cases import Found, Truth, make

from msil.errors import DataError
from msil.metrics.record import EvaluationRecord
from msil.reporting.figures.gallery import gallery_picture, image_scores, most_different, read_gallery_image
from msil.reporting.figures.pictures import class_color

CAT: Truth = (0, 0, [0, 0, 10, 10])
HIT: Found = (0, 0, [0, 0, 10, 10], 0.9)
AWAY: Found = (0, 0, [50, 50, 60, 60], 0.9)


@pytest.mark.parametrize(
    ("truths", "found", "ignored", "score"),
    [
        ([], [], (), 1.0),  # nothing to find, nothing found
        ([CAT], [], (), 0.0),
        ([CAT], [HIT, AWAY], (), 2 / 3),  # 2 * 1 / (2 + 1)
        ([CAT], [HIT, HIT], (), 2 / 3),  # the second of the same is one too many
        ([CAT, (0, 1, [30, 30, 10, 10])], [HIT], (), 2 / 3),  # 2 * 1 / (1 + 2)
        ([CAT], [(0, 1, [0, 0, 10, 10], 0.9)], (), 0.0),  # a dog at the cat's place
        ([CAT], [(0, 0, [0, 0, 10, 10], 0.29)], (), 0.0),  # below the threshold
        ([CAT], [(0, 0, [0, 0, 20, 10], 0.9)], (), 1.0),  # IoU 100 / 200 is enough
        ([CAT], [(0, 0, [0, 0, 21, 10], 0.9)], (), 0.0),  # IoU 100 / 210 is not
        ([CAT], [], (0,), 1.0),  # an ignored cat need not be found,
        ([CAT], [HIT, HIT], (0,), 1.0),  # and may be, any number of times,
        ([CAT], [(0, 0, [0, 0, 2, 2], 0.9)], (0,), 1.0),  # also by a part of it,
        ([CAT], [(0, 0, [0, 0, 30, 10], 0.9)], (0,), 0.0),  # but not with two thirds elsewhere
        ([CAT], [(0, 1, [0, 0, 10, 10], 0.9)], (0,), 0.0),  # nor by a dog
        ([CAT, CAT], [HIT, HIT], (0,), 1.0),  # the one that counts is taken, the other detection is the ignored one's
    ],
)
def test_scores_of_one_image(truths: list[Truth], found: list[Found], ignored: tuple[int, ...], score: float) -> None:
    assert image_scores(make(truths, found, ignored=ignored)).tolist() == pytest.approx([score])


def comparison(plain: list[int], msil: list[int], truths: list[int]) -> tuple[EvaluationRecord, EvaluationRecord]:
    """Two records of one image an entry: how many of its truths each finds, and how many there are."""
    boxes = [(i, 0, [20.0 * k, 0, 10, 10]) for i, count in enumerate(truths) for k in range(count)]

    def found(counts: list[int]) -> list[Found]:
        return [(i, 0, [20.0 * k, 0, 20.0 * k + 10, 10], 0.9) for i, count in enumerate(counts) for k in range(count)]

    first, second = (make(boxes, found(counts), images=len(truths)) for counts in (plain, msil))
    return first, second


def test_half_of_the_choice_is_where_msil_is_worse() -> None:
    # F1 of h hits among t truths is 2h / (h + t). msil - plain: 1, 1, 2/3, -1, -1/3, 0, 1
    plain, msil = comparison([0, 0, 0, 1, 2, 1, 0], [1, 1, 1, 0, 1, 1, 2], [1, 1, 2, 1, 2, 1, 2])
    assert image_scores(msil) - image_scores(plain) == pytest.approx([1, 1, 2 / 3, -1, -1 / 3, 0, 1])
    # Two of each: better 6 (two truths) then 0 (before 1); worse 3 and 4. By size, then truths, then order.
    assert most_different(plain, msil, 4).tolist() == [6, 0, 3, 4]
    assert most_different(plain, msil, 2).tolist() == [6, 3]
    # Worse in two only: the better ones do not fill the other half.
    assert most_different(plain, msil, 12).tolist() == [6, 0, 1, 3, 2, 4]
    assert most_different(plain, plain).tolist() == []


def test_pictures_hold_truths_and_the_detections_of_each() -> None:
    truths = [(0, 0, [0, 0, 9, 9]), (1, 0, [20, 40, 40, 50]), (1, 1, [70, 10, 20, 20])]
    plain = make(truths, [(0, 0, [1, 1, 9, 9], 0.9), (1, 1, [10, 30, 50, 90], 0.31)], images=2, ignored=(2,))
    msil = make(truths, [(1, 0, [22, 42, 62, 92], 0.29), (1, 0, [5, 60, 30, 95], 0.8)], images=2, ignored=(2,))
    image = np.full((3, 100, 100), 128, dtype=np.uint8)
    picture = gallery_picture(1, image, plain, msil)
    assert picture.shape == (300, 3 * 312, 3)  # three times: the most below 384; and a gap
    truth, first, second = np.split(picture, 3, axis=1)
    # left edges, at three times the boxes' x, in rows that no tag covers
    assert tuple(truth[220, 61]) == class_color(0)  # the cat at x 20
    assert tuple(truth[75, 211]) == class_color(3)  # the ignored dog, at x 70, in a colour of its own
    assert tuple(first[200, 31]) == class_color(1) and tuple(first[220, 61]) == (128, 128, 128)
    assert tuple(second[220, 16]) == class_color(0)
    assert tuple(second[220, 67]) == (128, 128, 128)  # below the threshold


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "val").mkdir(parents=True)
    Image.new("RGB", (40, 30), "red").save(folder / "val" / "a.png")
    Image.new("RGB", (40, 30), "blue").save(tmp_path / "secret.png")
    return folder


@pytest.mark.parametrize(
    "name", ["../secret.png", "val/../../secret.png", "{outside}", "{inside}", "val/link.png",
             "out/secret.png", "loop", "", "val", "a\0b.png", "x" * 5000, "pipe"],
)  # fmt: skip
def test_nothing_else_is_read(root: Path, tmp_path: Path, name: str) -> None:
    (root / "val" / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "out").symlink_to(tmp_path)
    (root / "loop").symlink_to(root / "loop")
    os.mkfifo(root / "pipe")  # opening it would wait for ever
    with pytest.raises(DataError):
        read_gallery_image(root, name.format(outside=tmp_path / "secret.png", inside=root / "val" / "a.png"), (30, 40))


def test_the_pixels_are_those_that_the_boxes_are_in(root: Path) -> None:
    image = Image.new("RGB", (40, 30), "black")
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(root / "turned.jpg", exif=exif)
    assert read_gallery_image(root, "turned.jpg", (40, 30)).shape == (3, 40, 30)
    assert read_gallery_image(root, "turned.jpg", (30, 40)).shape == (3, 30, 40)  # boxes drawn on the stored pixels
    Image.fromarray(np.full((30, 40), 2049, dtype=np.uint16)).save(root / "12bits.tif")  # 2049 = 128 * 16 + 1
    assert read_gallery_image(root, "12bits.tif", (30, 40), 12).unique().tolist() == [128]
    with pytest.raises(DataError, match="30 x 40 pixels, but was 40 x 31"):
        read_gallery_image(root, "turned.jpg", (31, 40))
