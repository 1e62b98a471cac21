"""COCO: labels, boxes and ground truth of small files, its refusals, and the public COCO128."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pycocotools.coco import COCO

from msil.data.audit import DataWarning
from msil.data.module import build_split
from msil.errors import DataError

from .files import SHARED, boxes_of, coco_content, read_coco, write_coco, write_jpeg

COCO128 = SHARED / "coco128"
needs_coco128 = pytest.mark.skipif(not COCO128.is_dir(), reason=f"the data set COCO128 is not at {COCO128}")


@pytest.fixture(autouse=True)
def no_warning_goes_unseen() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        yield


def test_labels_boxes_and_images(tmp_path: Path) -> None:
    write_coco(tmp_path, coco_content())
    dataset = read_coco(tmp_path, "train")
    assert dataset.classes == ("cat", "dog", "zebra")  # by category id, whatever the file's order
    assert dataset.category_ids == (3, 7, 90)
    assert len(dataset) == 3
    assert [dataset.image_id(index) for index in range(3)] == [11, 5, 8]
    assert [dataset.has_boxes(index) for index in range(3)] == [True, True, False]
    assert dataset.image_size(1) == (30, 40)
    assert dataset.path(1) == tmp_path / "train" / "sub" / "b.jpg"

    image, target = dataset[1]
    assert (image.shape, image.dtype) == ((3, 30, 40), torch.uint8)
    # annotations 100 (zebra) and 103 (cat); 102 is a crowd. x2 = x + width.
    assert target.boxes.tolist() == [[1, 2, 11, 22], [20, 10, 40, 30]]
    assert target.boxes.dtype == torch.float32
    assert target.labels.tolist() == [2, 0]
    assert target.labels.dtype == torch.int64
    assert (target.image_id, target.size) == (5, (30, 40))
    assert (dataset[2][1].boxes.shape, dataset[2][1].labels.shape) == ((0, 4), (0,))
    assert boxes_of(dataset) == [
        (11, "cat", [4.5, 5, 6, 7.25], 40, False),
        (5, "zebra", [1, 2, 10, 20], 150.5, False),
        (5, "dog", [0, 0, 40, 30], 900, True),
        (5, "cat", [20, 10, 20, 20], 400, False),
    ]
    write_jpeg(tmp_path / "train" / "a.jpg", 8, 8)  # after the audit
    with pytest.raises(DataError, match=r"a\.jpg is no longer of the size"):
        dataset[0]


def test_a_choice_of_classes_gives_their_order(tmp_path: Path) -> None:
    write_coco(tmp_path, coco_content())
    with pytest.warns(DataWarning, match="boxes of classes other than zebra, cat are left out: dog 1"):
        dataset = read_coco(tmp_path, "train", classes=["zebra", "cat"])
    assert (dataset.classes, dataset.category_ids) == (("zebra", "cat"), (90, 3))
    assert dataset[1][1].labels.tolist() == [0, 1]
    assert [name for _, name, *_ in boxes_of(dataset)] == ["cat", "zebra", "cat"]
    # The only dog is a crowd: nothing to train on, but something to score against.
    with pytest.warns(DataWarning, match="other than dog are left out: cat 2, zebra 1"):
        assert not any(read_coco(tmp_path, "train", classes=["dog"]).has_boxes(index) for index in range(3))
    with pytest.raises(DataError, match="nearest is 'zebra'"):
        read_coco(tmp_path, "train", classes=["zebre"])


def test_area_and_iscrowd_may_be_missing_and_whole_floats_are_ids(tmp_path: Path) -> None:
    content = coco_content()
    for annotation in content["annotations"]:
        del annotation["area"], annotation["iscrowd"]
        annotation["image_id"] = float(annotation["image_id"])
    write_coco(tmp_path, content)
    found = boxes_of(read_coco(tmp_path, "train"))
    assert [row[3:] for row in found] == [(6 * 7.25, False), (10 * 20, False), (40 * 30, False), (20 * 20, False)]


def test_mended_boxes_are_told_in_one_warning_and_refused_when_strict(tmp_path: Path) -> None:
    content = coco_content()
    boxes = {
        1: [-3, 4, 10, 10],  # leaves on the left: clipped to 0 4 7 14
        2: [35, 25, 10, 10],  # leaves at the lower right: clipped to 35 25 40 30
        3: [5, 5, 0, 8],  # no width: dropped
        4: [40, 3, 5, 5],  # touches the image from outside: dropped
        5: [-9, -9, 4, 4],  # outside: dropped
        6: [8, 8, 0.5, 9],  # below a pixel: only scored against
        7: [39.5, 3, 6, 6],  # half a pixel inside: clipped, and only scored against
        8: [1, 1, 5, 5],  # its area is 0: only scored against
        9: [30.01, 20, 10, 10.01],  # 0.01 px outside, by rounding: nothing to tell
    }
    content["annotations"] = [
        {"id": key, "image_id": 11, "category_id": 3, "bbox": box, "area": 0 if key == 8 else 9, "iscrowd": 0}
        for key, box in boxes.items()
    ]
    source = write_coco(tmp_path, content)
    with pytest.warns(DataWarning) as caught:
        dataset = build_split({"name": "coco", "root": tmp_path}, "train")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    told = str(caught[0].message)
    assert told.replace("train/", "") == (
        f"{source}: 3 boxes reaching out of the image, clipped (annotation 1 of a.jpg, annotation 2 of a.jpg, "
        "annotation 7 of a.jpg); 3 boxes without any area in the image, dropped (annotation 3 of a.jpg, annotation 4 "
        "of a.jpg, annotation 5 of a.jpg); 3 boxes below 1 pixel or of area 0, not trained on (annotation 6 of a.jpg, "
        "annotation 7 of a.jpg, annotation 8 of a.jpg)"
    )
    assert dataset[0][1].boxes.tolist() == [
        [0, 4, 7, 14],
        [35, 25, 40, 30],
        [pytest.approx(30.01), 20, 40, 30],
    ]
    kept = [boxes[key] for key in (1, 2, 6, 7, 8, 9)]  # as in the file
    assert dataset.annotations.truth_boxes.tolist() == kept
    with pytest.raises(DataError, match=r"3 boxes reaching out .*data\.strict=false"):
        read_coco(tmp_path, "train", strict=True)


@pytest.mark.parametrize(
    ("boxes", "told"),
    [
        ([[20, 15, 30, 25], [25, 2, 40, 30], [1, 2, 5, 9]], True),  # corners of boxes in 40 x 30 px
        ([[20, 15, 30, 25], [1, 2, 5, 9], [2, 3, 5, 9]], False),  # most lie inside as they are
        ([[20, 15, 30, 25], [25, 2, 40, 30], [30, 2, 8, 9]], False),  # as corners one would be inverted
        ([[20, 15, 30, 25], [25, 2, 41, 30]], False),  # as corners one would leave the image
    ],
)
def test_boxes_written_as_corners_are_told(tmp_path: Path, boxes: list[list[float]], told: bool) -> None:
    content = coco_content()
    content["annotations"] = [
        {"id": key, "image_id": 11, "category_id": 3, "bbox": box} for key, box in enumerate(boxes)
    ]
    write_coco(tmp_path, content)
    with pytest.warns(DataWarning, match="reaching out of the image, clipped") as caught:
        read_coco(tmp_path, "train")
    assert ("these look like corners x1, y1, x2, y2, but COCO's are" in str(caught[0].message)) == told


Change = Callable[[dict[str, Any]], object]


def in_annotation(**values: Any) -> Change:
    return lambda content: content["annotations"][1].update(values)


def in_image(**values: Any) -> Change:
    return lambda content: content["images"][1].update(values)


def in_category(**values: Any) -> Change:
    return lambda content: content["categories"][1].update(values)


ANNOTATION = r"instances_train\.json: annotation 101 of a\.jpg: "


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (in_annotation(bbox=[float("nan"), 1, 2, 3]), ANNOTATION + r"bbox must be .*finite.*nan"),
        (in_annotation(bbox=[1, 1, "2", 3]), ANNOTATION + "bbox must be a list of four"),
        (in_annotation(bbox=[20, 10, -5, 6]), ANNOTATION + "bbox is inverted"),
        (in_annotation(category_id=4), ANNOTATION + "category_id 4 is not among the categories"),
        (in_annotation(image_id=99), r"json: annotation 101: image_id 99 is not among the images"),
        (in_annotation(id=103), r"annotation 103 of sub/b\.jpg: its id is listed twice"),
        (in_annotation(id=None), r"annotations\[1\] of a\.jpg: id must be a whole number or text, but is None"),
        (in_image(id=11), "image 11 is listed twice"),
        (in_image(width=0), "image 5: width must be a whole number of at least 1, but is 0"),
        (in_image(width=41), r"image 5 says width 41 and height 30, but .*b\.jpg is 40 x 30"),
        (in_image(file_name="../train/a.jpg"), r"image 5: file_name is '\.\./train/a\.jpg', which leaves"),
        (in_image(file_name="/etc/passwd"), "image 5: file_name is '/etc/passwd', which leaves"),
        (in_image(file_name="a\nb.jpg"), r"image 5: file_name must be the name of a file, but is 'a\\nb\.jpg'"),
        (in_image(file_name="d.jpg"), r"image file .*d\.jpg is missing"),
        (in_category(id=7), "category id 7 is listed twice"),
        (lambda content: in_category(name=content["categories"][0]["name"])(content), "2 categories are called"),
        (lambda content: content["images"].clear(), "is empty: it lists no images"),
        (lambda content: content["annotations"].clear(), "json lists no annotations, so no image has a box: list them"),
        (lambda content: content.pop("annotations"), "list 'annotations'"),
    ],
)
def test_refused_always(tmp_path: Path, change: Change, message: str) -> None:
    content = coco_content()
    change(content)
    write_coco(tmp_path, content)
    with pytest.raises(DataError, match=message) as error:
        read_coco(tmp_path, "train")
    assert "\n" not in str(error.value)


def test_an_image_under_two_ids_is_told(tmp_path: Path) -> None:
    content = coco_content()
    content["images"].append(content["images"][0] | {"id": 12})  # without boxes there
    write_coco(tmp_path, content)
    with pytest.warns(DataWarning, match=r"json: 1 image file under several ids, such as train/a\.jpg: each counts"):
        assert len(read_coco(tmp_path, "train")) == 4


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    """Python's reader would take the last value: here, silently, the class dog instead of zebra."""
    text = json.dumps(coco_content()).replace('"category_id": 90', '"category_id": 90, "category_id": 7', 1)
    write_coco(tmp_path, text)
    with pytest.raises(
        DataError, match=r"train\.json is not valid json .the key 'category_id' of the entry with id 100 is given twice"
    ):
        read_coco(tmp_path, "train")


def test_missing_parts_say_the_layout(tmp_path: Path) -> None:
    layout = r"<data\.root>/val/\*\.jpg and <data\.root>/annotations/instances_val\.json"
    with pytest.raises(DataError, match=f"nowhere does not exist.*{layout}"):
        read_coco(tmp_path / "nowhere", "val")
    with pytest.raises(DataError, match=rf"there is no instances_\*\.json at all.*set data=auto, .*{layout}"):
        read_coco(tmp_path, "val")
    write_coco(tmp_path, coco_content())
    with pytest.raises(DataError, match=rf"instances_val\.json is missing \(the splits there are train\).*{layout}"):
        read_coco(tmp_path, "val")
    (tmp_path / "annotations" / "instances_val.json").write_text(json.dumps(coco_content()))
    with pytest.raises(DataError, match=f"image folder .*val is missing, as is .*images: .*{layout}"):
        read_coco(tmp_path, "val")


@needs_coco128
def test_coco128_is_what_pycocotools_reads() -> None:
    split, images, annotations, crowds = "train2017", 96, 682, 7
    dataset = read_coco(COCO128, split, strict=True)
    reference = COCO(COCO128 / "annotations" / f"instances_{split}.json")
    assert len(dataset) == images == len(reference.getImgIds())
    assert list(dataset.category_ids) == sorted(reference.getCatIds())
    assert (len(dataset.classes), dataset.category_ids[0], dataset.category_ids[-1]) == (80, 1, 90)
    found = boxes_of(dataset)
    assert len(found) == annotations and sum(row[4] for row in found) == crowds
    for index in range(len(dataset)):
        theirs = reference.loadAnns(reference.getAnnIds([dataset.image_id(index)]))
        names = [reference.loadCats(entry["category_id"])[0]["name"] for entry in theirs]
        expected = [
            (dataset.image_id(index), name, entry["bbox"], entry["area"], bool(entry["iscrowd"]))
            for name, entry in zip(names, theirs, strict=True)
        ]
        assert [row for row in found if row[0] == dataset.image_id(index)] == expected
        usable = [entry for entry in theirs if not entry["iscrowd"]]
        assert dataset.has_boxes(index) == bool(usable)
        if index % 8 == 0:
            image, target = dataset[index]
            assert tuple(image.shape[1:]) == target.size == dataset.image_size(index)
            names = [reference.loadCats(entry["category_id"])[0]["name"] for entry in usable]
            assert [dataset.classes[label] for label in target.labels] == names
            corners = [[x, y, x + w, y + h] for x, y, w, h in (entry["bbox"] for entry in usable)]
            torch.testing.assert_close(target.boxes, torch.tensor(corners).reshape(-1, 4))


# Splits without annotations, as COCO publishes its test sets


def write_image_info(root: Path, split: str, folder: str, content: dict[str, Any] | None = None) -> Path:
    """coco_content() as COCO publishes its test sets: no annotations, plain file names. Returns the json's path."""
    content = {key: value for key, value in (content or coco_content()).items() if key != "annotations"}
    content["info"] = {"description": "COCO 2017 Test Dataset", "year": 2017}
    for image in content.get("images", []):
        image["file_name"] = f"{image['id']:012d}.jpg"
        write_jpeg(root / folder / image["file_name"], 40, 30)
    source = root / "annotations" / f"image_info_{split}.json"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(json.dumps(content))
    return source


# COCO's test-dev2017 is a part of test2017, and its images lie there.
@pytest.mark.parametrize(
    ("split", "folder"), [("test2017", "test2017"), ("test-dev2017", "test2017"), ("test-dev2017", "test-dev2017")]
)
def test_a_split_without_annotations(tmp_path: Path, split: str, folder: str) -> None:
    write_image_info(tmp_path, split, folder)
    dataset = read_coco(tmp_path, split)
    assert not dataset.annotated
    assert (dataset.classes, dataset.category_ids) == (("cat", "dog", "zebra"), (3, 7, 90))
    assert [dataset.image_id(index) for index in range(len(dataset))] == [11, 5, 8]
    assert dataset.path(1) == tmp_path / folder / "000000000005.jpg"
    assert not any(dataset.has_boxes(index) for index in range(3))
    image, target = dataset[1]
    assert (image.shape, target.image_id, target.size) == ((3, 30, 40), 5, (30, 40))
    assert (target.boxes.shape, target.labels.shape) == ((0, 4), (0,))
    assert boxes_of(dataset) == []
    chosen = read_coco(tmp_path, split, classes=["zebra", "cat"], strict=True)
    assert (chosen.classes, chosen.category_ids) == (("zebra", "cat"), (90, 3))
    copy = pickle.loads(pickle.dumps(dataset))
    assert len(copy) == 3 and torch.equal(copy[1][0], image)
