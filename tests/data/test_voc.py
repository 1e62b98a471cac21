"""VOC: the 1-based inclusive coordinates, its refusals, and the public BCCD."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from msil.data.audit import DataWarning
from msil.data.readers.voc import VOC_CLASSES
from msil.errors import DataError

from .files import SHARED, boxes_of, read_voc, voc_object, voc_xml, write_jpeg, write_voc

BCCD = SHARED / "bccd"
needs_bccd = pytest.mark.skipif(not BCCD.is_dir(), reason=f"the data set BCCD is not at {BCCD}")

CAT = voc_object("cat", 1, 1, 40, 30)
DIFFICULT_DOG = voc_object("dog", 11, 6, 20, 25, "<difficult>1</difficult>")
PART = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"


@pytest.fixture(autouse=True)
def no_warning_goes_unseen() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        yield


def test_boxes_are_1_based_and_inclusive(tmp_path: Path) -> None:
    write_voc(tmp_path, {"2008_1": voc_xml(CAT, DIFFICULT_DOG), "2008_0": voc_xml()})
    dataset = read_voc(tmp_path, "train")
    assert dataset.classes == VOC_CLASSES
    assert dataset.category_ids == tuple(range(1, 21))
    assert [dataset.image_id(index) for index in range(2)] == [1, 2]
    assert [dataset.has_boxes(index) for index in range(2)] == [True, False]
    image, target = dataset[0]
    assert image.shape == (3, *target.size) == (3, 30, 40)
    # the cat covers the whole image; the dog pixels 11..20 (10 of them) and 6..25 (20)
    assert target.boxes.tolist() == [[0, 0, 40, 30], [10, 5, 20, 25]]
    assert [VOC_CLASSES[label] for label in target.labels] == ["cat", "dog"]
    assert dataset[1][1].boxes.shape == (0, 4)

    assert boxes_of(dataset) == [(1, "cat", [0, 0, 40, 30], 1200, False), (1, "dog", [10, 5, 10, 20], 200, True)]
    assert dataset.annotations.file_names[0] == "JPEGImages/2008_1.jpg"


def test_classes_give_the_labels(tmp_path: Path) -> None:
    write_voc(tmp_path, {"a": voc_xml(CAT, DIFFICULT_DOG)})
    with pytest.warns(DataWarning, match="there is no box of bird"):
        dataset = read_voc(tmp_path, "train", classes=["dog", "bird", "cat"])
    assert dataset.classes == ("dog", "bird", "cat")
    assert dataset[0][1].labels.tolist() == [2, 0]
    assert (dataset.category_ids, boxes_of(dataset)[0][1]) == ((1, 2, 3), "cat")
    # VOC's twenty are no choice, so what is not among them may be a slip.
    write_voc(tmp_path, {"a": voc_xml(CAT, DIFFICULT_DOG), "b": voc_xml(voc_object("a yak", 1, 1, 9, 9))})
    with pytest.raises(DataError, match=r"b\.xml: object 1 is of class 'a yak'.*'data\.classes=\[cat,dog,'.*a yak"):
        read_voc(tmp_path, "train")


def test_mended_boxes(tmp_path: Path) -> None:
    # Drawn 0-based, so 1 px outside: clipped; a line: dropped.
    boxes = voc_object("cat", 0, 0, 10, 10), voc_object("cat", 5, 5, 5, 20)
    write_voc(tmp_path, {"a": voc_xml(*boxes)})
    told = r"clipped \(object 1 of JPEGImages/a\.jpg\); 1 box .* dropped \(object 2 of JPEGImages/a\.jpg\)"
    with pytest.warns(DataWarning, match=told):
        dataset = read_voc(tmp_path, "train")
    assert dataset[0][1].boxes.tolist() == [[0, 0, 10, 10]]
    assert dataset.annotations.truth_boxes.tolist() == [[-1, -1, 11, 11]]  # not clipped
    with pytest.raises(DataError, match=r"1 box reaching out .*data\.strict=false"):
        read_voc(tmp_path, "train", strict=True)
    write_voc(tmp_path, {"a": voc_xml(boxes[1])})
    with (
        pytest.warns(DataWarning, match="dropped"),
        pytest.raises(DataError, match=r"train\.txt holds no usable boxes of aeroplane, "),
    ):
        read_voc(tmp_path, "train")


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        (voc_xml(voc_object("cat", "nan", 1, 2, 3)), r"a\.xml: object 1 \(cat\): xmin must be a finite.*'nan'"),
        (voc_xml(voc_object("cat", 9, 1, 2, 3)), r"object 1 \(cat\) is inverted, xmin 9 ymin 1 xmax 2 ymax 3"),
        (voc_xml(voc_object("ca\nt", 1, 1, 2, 3)), r"object 1 has the name 'ca\\nt', which is not one line of text"),
        (voc_xml(voc_object("cat<b>fish</b>", 1, 1, 2, 3)), "object 1: name must hold text alone, .* element 'b'"),
        (voc_xml("<object><name>cat</name></object>"), r"object 1 \(cat\) has no bndbox"),
        (voc_xml(voc_object("cat", 1, 1, 2, 3, "<difficult>yes</difficult>")), "difficult must be 0 or 1"),
        (voc_xml(CAT, size="<size><width>30</width><height>40</height></size>"), "says width 30 .* is 40 x 30"),
        (voc_xml(), r"train\.txt holds no boxes of aeroplane, .* and 15 more: add some"),
        ("<?xml version='1.0' encoding='martian'?><annotation/>", r"a\.xml is not safe and valid xml"),
        ("<html/>", r"a\.xml must be a VOC file"),
    ],
)
def test_refused_always(tmp_path: Path, xml: str, message: str) -> None:
    write_voc(tmp_path, {"a": xml})
    with pytest.raises(DataError, match=message) as error:
        read_voc(tmp_path, "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", r"train\.txt is empty"),
        ("a\nb\na\n", "'a' stands in line 1 and in line 3"),
        ("a\n../JPEGImages/b\n", "line 2 is .* which leaves"),
        ("c\n", r"c\.xml is missing"),
        ("c\na\nd\n", r"c\.xml is missing.* \(1 more of the 3 xml files fails too\)"),
        ("b\n", r"b\.jpg is missing"),
        ("\udcff\n", "cannot be read"),
    ],
)
def test_wrong_split_files(tmp_path: Path, lines: str, message: str) -> None:
    source = write_voc(tmp_path, {"a": voc_xml(CAT), "b": voc_xml(CAT)})
    (tmp_path / "JPEGImages" / "b.jpg").unlink()
    source.write_bytes(lines.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=message):
        read_voc(tmp_path, "train")


def test_missing_parts_say_the_layout(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist.*<data\.root>/JPEGImages"):
        read_voc(tmp_path / "nowhere", "train")
    write_voc(tmp_path / "VOC2012", {"a": voc_xml(CAT)})
    with pytest.raises(DataError, match=r"JPEGImages is missing.*VOCdevkit/VOC2012"):
        read_voc(tmp_path, "train")
    with pytest.raises(DataError, match=r"val\.txt is missing \(there: train\)"):
        read_voc(tmp_path / "VOC2012", "val")


def test_floats_blank_lines_and_other_extensions(tmp_path: Path) -> None:
    source = write_voc(tmp_path, {"a.b": voc_xml(voc_object("cat", 1.5, 2.5, 10.5, 20, PART)), "c": voc_xml(size="")})
    source.write_text("\n  a.b \n\nc\n")
    (tmp_path / "JPEGImages" / "c.jpg").unlink()
    Image.new("L", (7, 5)).save(tmp_path / "JPEGImages" / "c.png")
    dataset = read_voc(tmp_path, "train")
    assert dataset[0][1].boxes.tolist() == [[0.5, 1.5, 10.5, 20]]
    assert (dataset.path(1).name, dataset.image_size(1)) == ("c.png", (5, 7))


def test_size_zero_means_unknown_and_stored_sizes_mean_stored_pixels(tmp_path: Path) -> None:
    write_jpeg(tmp_path / "JPEGImages" / "a.jpg", 40, 30, orientation=8)
    zero = "<size><width>0</width><height>0</height></size>"
    write_voc(tmp_path, {"a": voc_xml(voc_object("cat", 1, 1, 30, 40), size=zero)})
    assert read_voc(tmp_path, "train", strict=True)[0][0].shape == (3, 40, 30)
    write_voc(tmp_path, {"a": voc_xml(CAT)})
    assert read_voc(tmp_path, "train", strict=True)[0][0].shape == (3, 30, 40)


@needs_bccd
def test_bccd() -> None:
    # objects by class of the xml files (RBC, WBC, Platelets), counted with grep; the dropped box has xmin = xmax = 181,
    # ymin = ymax = 329
    split, images, counts = "train", 205, (2382, 214, 209)
    dropped = "object 4 of JPEGImages/BloodImage_00343.jpg"
    classes = ["RBC", "WBC", "Platelets"]
    with pytest.warns(DataWarning, match=rf"1 box without any area in the image, dropped \({dropped}\)$") as caught:
        dataset = read_voc(BCCD, split, classes=classes)
    assert len(caught) == 1
    assert len(dataset) == images
    found = dataset.annotations.truth_labels.tolist()
    assert len(found) == sum(counts) - 1
    lacking = [total - found.count(label) for label, total in enumerate(counts)]
    assert sorted(lacking) == [0, 0, 1]
    image, target = dataset[0]
    assert image.shape == (3, 480, 640)
    assert bool((target.boxes[:, 2:] > target.boxes[:, :2]).all())
    with pytest.raises(DataError, match=dropped):
        read_voc(BCCD, split, classes=classes, strict=True)
    with pytest.raises(DataError, match=r"BloodImage_\d+\.xml: object 1 .*data\.classes=\[Platelets,RBC,WBC\]"):
        read_voc(BCCD, split)
