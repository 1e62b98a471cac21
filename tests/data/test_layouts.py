"""Every tool's export reads to the same boxes, by hand; a folder's layout is found out; malformed ones are refused."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.exports import (
    BOXES,
    EXPORTS,
    NAMES,
    VALID,
    auto,
    boxes_by_file,
    label_studio_coco,
    plain_coco,
    ultralytics_yolo,
    voc_xml,
    write_images,
)
from tests.data.files import coco_content, write_coco, write_jpeg
from tests.metrics.cases import random_record

from msil.config import Config
from msil.data.audit import DataWarning
from msil.data.fingerprint import differing, fingerprint
from msil.data.module import build_datasets, build_split
from msil.data.readers.coco import locate_coco
from msil.data.readers.holdout import hold_out
from msil.errors import DataError
from msil.metrics.upload import upload_entries
from msil.training.build import metrics


@pytest.mark.parametrize("name", EXPORTS)
def test_every_tools_export_reads_to_the_same_boxes(tmp_path: Path, name: str) -> None:
    write, has_val = EXPORTS[name]
    write(tmp_path / "set")
    data = auto(tmp_path / "set", val_fraction=None if has_val else 0.25)
    train, val = build_datasets(data, "train", "val")
    assert train.classes == val.classes == NAMES
    assert {**boxes_by_file(train), **boxes_by_file(val)} == BOXES
    assert len(train) + len(val) == len(BOXES)
    assert sorted(boxes_by_file(val)) == VALID if has_val else len(val) == 3
    assert len(metrics(Config(), val)) == (2 if "voc" in name or name == "label_img" else 1)  # VOC AP of xml files
    image, target = train[0]
    assert image.shape == (3, 48, 64) and len(target.boxes) > 0
    before = fingerprint(data, ["train", "val"])
    assert fingerprint(data, ["train", "val"]) == before
    os.truncate(train.path(0), 100)
    assert "the images of train" in differing(before, fingerprint(data, ["train", "val"]))
    if not has_val:
        with pytest.raises(
            DataError, match=r"has no split 'val'; there: (all|default|train): .*data\.val_fraction=0\.2"
        ):
            build_split({**data, "val_fraction": None}, "val", by_name=NAMES)
        with pytest.raises(DataError, match=r"mode=test scores another one by data\.split=(all|default|train)$"):
            build_split({**data, "val_fraction": None}, "val")


@pytest.mark.parametrize(
    "name", ["cvat_coco", "roboflow_coco", "plain_coco", "roboflow_yolo", "label_img_yolo", "cvat_voc"]
)
def test_a_validation_split_that_is_not_used_is_said(tmp_path: Path, name: str) -> None:
    write, has_val = EXPORTS[name]
    write(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train, val = build_datasets(auto(tmp_path, val_fraction=0.25), "train", "val")
    said = [str(one.message) for one in caught if "not used" in str(one.message)]
    count = f"{tmp_path}: a split val of {len(VALID)} images of its own is not used: leave out "
    assert said == ([count + "data.val_fraction to use it"] if has_val else [])
    assert len(train) + len(val) == (len(BOXES) - len(VALID) if has_val else len(BOXES))


def test_a_plain_json_that_cannot_be_read_is_refused_by_its_reader(tmp_path: Path) -> None:
    plain_coco(tmp_path)
    file = tmp_path / "annotations.json"
    file.write_bytes(file.read_bytes().replace(b"img 00", b"img \xff"))
    with pytest.raises(DataError, match=r"annotations\.json"):
        build_split(auto(tmp_path), "train")


def test_a_folder_of_no_layout_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist: put it there or set data\.root"):
        build_split(auto(tmp_path / "nowhere"), "train")
    with pytest.raises(
        DataError, match=r"looked for YOLO's data\.yaml, .*instances_\*\.json.*data\.annotations=FILE"
    ) as e:
        build_split(auto(tmp_path), "train")
    assert "\n" not in str(e.value)
    (tmp_path / "info.json").write_text("{}")  # of something else
    with pytest.raises(DataError, match="looked for"):
        build_split(auto(tmp_path), "train")
    plain_coco(tmp_path)
    file = (tmp_path / "annotations.json").rename(tmp_path / "instances.json")
    for text, reason in (
        ("", "is empty: replace it"),
        (file.read_text()[:200], r"is not valid json \(.*\): correct it"),
        ("[1]", "must be a json object with a list 'images', as COCO's instances files are, but is a list"),
        ('{"images": []}', "must be .* with a list 'annotations', .*, but has none"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=rf"^no data set is in {tmp_path}: {file} {reason}"):
            build_split(auto(tmp_path), "train")
    for name in ("auto", "coco", "voc"):
        with pytest.raises(DataError, match=rf"instances\.json is a file: .* data=auto data\.root={tmp_path}$"):
            build_split({"name": name, "root": file}, "train")
    (tmp_path / "instances.json").unlink()
    (tmp_path / "labels" / "train").mkdir(parents=True)
    (tmp_path / "labels" / "train" / "a.txt").touch()
    with pytest.raises(
        DataError, match=rf"labels/train/a\.txt, but no names.*: add {tmp_path}/classes\.txt with a name"
    ):
        build_split(auto(tmp_path), "train")
    label_studio_coco(tmp_path / "my export")
    with pytest.raises(DataError, match=r"One is in .*my export: set 'data\.root=.*my export"):
        build_split(auto(tmp_path), "train")


# COCO json of many makers


def test_ids_of_any_size_and_text_are_numbered_and_named_as_they_are(tmp_path: Path) -> None:
    content = coco_content()
    own: dict[int, Any] = {11: "left/7", 5: 2**70, 8: "8"}
    for image in content["images"]:
        image["id"] = own[image["id"]]
    for number, annotation in enumerate(content["annotations"]):
        annotation["image_id"] = own[annotation["image_id"]]
        annotation["id"] = f"box-{number}"
        annotation["category_id"] = {3: "c", 7: "d", 90: "z"}[annotation["category_id"]]
    for category, name in zip(content["categories"], "zcd", strict=True):
        category["id"] = name
    content["annotations"][0]["bbox"][2] = 400
    write_coco(tmp_path, content)
    with pytest.warns(DataWarning, match=r"clipped \(annotation 'box-0' of train/sub/b\.jpg\)"):
        dataset = build_split({"name": "coco", "root": tmp_path}, "train")
    truth = dataset.annotations
    assert truth.image_ids.tolist() == [1, 2, 3] and truth.own_image_ids == ("left/7", 2**70, "8")
    assert (truth.classes, truth.category_ids) == (("cat", "dog", "zebra"), (1, 2, 3))
    assert truth.own_category_ids == {1: "c", 2: "d", 3: "z"}
    assert [truth.classes[label] for label in truth.truth_labels] == ["cat", "zebra", "dog", "cat"]
    content["annotations"][1]["image_id"] = "8 "
    write_coco(tmp_path, content)
    with pytest.raises(DataError, match="annotation 'box-1': image_id '8 ' is not among the images"):
        build_split({"name": "coco", "root": tmp_path}, "train")


def test_sizes_may_be_missing_paths_absolute_and_endings_in_capitals(tmp_path: Path) -> None:
    content = coco_content()
    for image in content["images"]:
        del image["width"], image["height"]
    content["images"][0]["file_name"] = str(tmp_path / "train" / "a.jpg")
    content["images"][1]["file_name"] = "sub/b.JPEG"
    (tmp_path / "elsewhere").mkdir()
    write_jpeg(tmp_path / "train/sub/b.jpeg", 20, 70)
    write_coco(tmp_path, content)
    dataset = build_split({"name": "coco", "root": tmp_path}, "train")
    assert dataset.annotations.file_names == ["train/a.jpg", "train/sub/b.jpeg", "train/c.jpg"]
    assert dataset.image_size(1) == (70, 20)
    content["images"][0]["width"] = 40
    write_coco(tmp_path, content)
    with pytest.raises(DataError, match="image 11: height must be a whole number"):
        build_split({"name": "coco", "root": tmp_path}, "train")


def test_a_json_of_any_name_with_its_folder_of_images(tmp_path: Path) -> None:
    write_coco(tmp_path, coco_content())
    source = (tmp_path / "annotations/instances_train.json").rename(tmp_path / "labels.json")
    data = {"name": "coco", "root": str(tmp_path / "train"), "annotations": str(source)}
    assert len(build_split(data, "any")) == 3
    for split in ("train", "train2017"):  # the split of data=coco
        assert len(build_split({**data, "annotations": {"train": str(source)}}, split)) == 3
    with pytest.raises(DataError, match=r"no file for the split 'val', only for train: .*data\.val_fraction=0\.2"):
        build_datasets({**data, "annotations": {"train": str(source)}}, "train", "val")
    with pytest.raises(DataError, match=r"lost\.json is missing: set data\.annotations"):
        build_split({**data, "annotations": "lost.json"}, "train")


def test_detections_go_under_the_ids_of_the_users_file() -> None:
    record = random_record(0)
    images = {number: f"image-{number}" for number in record.image_ids.tolist()}
    categories = {number: f"class-{number}" for number in record.category_ids.tolist()[1:]}
    plain, own = upload_entries(record), upload_entries(record, own_images=images, own_categories=categories)
    assert [entry["image_id"] for entry in own] == [f"image-{entry['image_id']}" for entry in plain]
    found = [categories.get(entry["category_id"], entry["category_id"]) for entry in plain]
    assert [entry["category_id"] for entry in own] == found


# VOC's lists


def test_lists_of_names_with_endings_or_a_second_column(tmp_path: Path) -> None:
    names = list(BOXES)[:4]
    write_images(tmp_path / "JPEGImages", names)
    for name in names:
        voc_xml(tmp_path / "Annotations" / f"{Path(name).stem}.xml", name)
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "ending.txt").write_text("img 00.jpg\nimg 01.JPG\n")
    (lists / "column.txt").write_text("img 00  1\nimg 01 -1\nimg 02\t0\n")
    data = {"name": "voc", "root": tmp_path, "classes": ["cat", "dog"]}
    assert sorted(boxes_by_file(build_split(data, "ending"))) == names[:2]
    assert sorted(boxes_by_file(build_split(data, "column"))) == ["img 00.jpg", "img 02.jpg"]
    for name, other in (("img 03.jpg", "img 03.PNG"), ("img 03.xml", "img 03.XML")):
        folder = tmp_path / ("JPEGImages" if name.endswith("jpg") else "Annotations")
        (folder / name).rename(folder / other)
    (lists / "capitals.txt").write_text("img 03\n")
    assert sorted(boxes_by_file(build_split(data, "capitals"))) == ["img 03.PNG"]


def test_images_without_an_xml_are_left_out_with_a_warning(tmp_path: Path) -> None:
    EXPORTS["label_img"][0](tmp_path)
    (tmp_path / "img 03.xml").unlink()
    with pytest.warns(DataWarning, match=r"1 image without an xml file left out: img 03\.jpg"):
        assert len(build_split(auto(tmp_path), "train")) == len(BOXES) - 1


# YOLO


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0.5 0.5 0.1 0.1", "class 2 is not one of the 2, 0 to 1"),
        ("0.5 0.5 0.5 0.1 0.1", "class 0.5 is not one of the 2"),
        ("0 0.5 0.5 0.1", "has 4 numbers, not the five of a box"),
        ("0 0.5 0.5 0.1 0.1 0.9", "has 6 numbers"),
        ("0 32 24 20 16", "must be shares of the image's width and height"),
        ("0 0.5 0.5 -0.1 0.1", r"must be shares|is inverted"),
        ("0 0.5 0.5 -0.005 0.1", "is inverted, width -0.005"),
        ("0 0.5 nan 0.1 0.1", "'nan' must be a finite number"),
        ("cat 0.5 0.5 0.1 0.1", "'cat' must be a finite number"),
    ],
)
def test_malformed_labels_are_refused_by_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    ultralytics_yolo(tmp_path)
    file = tmp_path / "labels/train/img 01.txt"
    file.write_text(f"0 0.5 0.5 0.1 0.1\n\n{line}\n")
    with pytest.raises(DataError, match=rf"img 01\.txt: line 3.*{message}") as error:
        build_split({"name": "yolo", "root": tmp_path}, "train")
    assert "\n" not in str(error.value)


def test_names_may_be_numbered_in_quotes(tmp_path: Path) -> None:
    ultralytics_yolo(tmp_path)
    source = tmp_path / "data.yaml"
    content = yaml.safe_load(source.read_text())
    numbered = {str(number): name for number, name in content["names"].items()}
    source.write_text(yaml.safe_dump({**content, "names": numbered}))
    assert build_split({"name": "yolo", "root": tmp_path}, "train").classes == tuple(content["names"].values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ["cat", "cat"]}, "names 'cat' more than once"),
        ({"names": {1: "cat", 2: "dog"}}, "names must be numbered 0, 1, 2"),
        ({"names": ["cat", True]}, "name 1 must be text, but is True: put it in quotes"),
        ({"names": "cat"}, "names must be a list of classes"),
        ({"nc": 3}, "nc is 3, but names are 2"),
        ({"train": None}, r"names no split train \(there: val\)"),
        ({"train": "images/lost"}, "train is 'images/lost', which is not in"),
        ({"train": 5}, "train must name a folder or file of the data set, but is 5"),
        ({"train": "/etc"}, "train is '/etc', which is not in"),
        ({"train": "/"}, "train is '/', which is not in"),
        ({"train": "empty"}, "empty has no images"),
        ({"train": ["images/train", "images"]}, r"train holds 'images/train/img 00\.jpg' more than once"),
        ({"kpt_shape": 17}, "kpt_shape must be two numbers"),
    ],
)
def test_a_malformed_data_yaml_is_refused_by_key(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    ultralytics_yolo(tmp_path)
    (tmp_path / "empty").mkdir()
    source = tmp_path / "data.yaml"
    source.write_text(yaml.safe_dump({**yaml.safe_load(source.read_text()), **change}))
    with pytest.raises(DataError, match=rf"data\.yaml.*{message}"):
        build_split({"name": "yolo", "root": tmp_path}, "train")
    source.write_text("names: [cat\ntrain: images")
    with pytest.raises(DataError, match=r"data\.yaml is not valid yaml"):
        build_split({"name": "yolo", "root": tmp_path}, "train")


def test_polygons_count_as_the_boxes_around_them_and_links_inside_are_followed(tmp_path: Path) -> None:
    ultralytics_yolo(tmp_path)
    (tmp_path / "labels/train/img 01.txt").write_text("1 0.25 0.5 0.75 0.25 0.5 1\n")
    (tmp_path / "labels/train").rename(tmp_path / "pool")
    (tmp_path / "labels/train").symlink_to(tmp_path / "pool")
    dataset = build_split({"name": "yolo", "root": tmp_path}, "train")
    assert boxes_by_file(dataset)["img 01.jpg"] == [("dog", 16, 12, 32, 36)]
    (tmp_path / "pool").rename(tmp_path.parent / f"{tmp_path.name}-outside")
    (tmp_path / "labels/train").unlink()
    (tmp_path / "labels/train").symlink_to(tmp_path.parent / f"{tmp_path.name}-outside")
    with pytest.raises(DataError, match=r"leads by a symbolic link to .*, outside the data set's folder"):
        build_split({"name": "yolo", "root": tmp_path}, "train")


def test_of_pose_labels_the_boxes_are_read(tmp_path: Path) -> None:
    ultralytics_yolo(tmp_path)
    with (tmp_path / "data.yaml").open("a") as file:
        file.write("kpt_shape: [2, 3]\n")
    for labels in (tmp_path / "labels/train").iterdir():
        labels.write_text("1 0.5 0.5 0.25 0.5 0.1 0.2 2 0 0 0\n")  # the second one is not visible
    dataset = build_split({"name": "yolo", "root": tmp_path}, "train")
    # Of 64 x 48 pixels, about the middle
    assert boxes_by_file(dataset)["img 01.jpg"] == [("dog", 24, 12, 16, 24)]
    (tmp_path / "labels/train/img 01.txt").write_text("1 0.5 0.5 0.25 0.5 0.1 0.2\n")
    with pytest.raises(DataError, match=r"line 1 has 7 numbers, not the five of a box, .*, and 6 of keypoints"):
        build_split({"name": "yolo", "root": tmp_path}, "train")


# Validation images of the training split


def annotated(root: Path, counts: dict[str, int]) -> Path:
    """A COCO split of so many images with one box of each class; "" for none."""
    names = [f"{name}{number}" for name, count in counts.items() for number in range(count)]
    categories = [name for name in counts if name]
    images = [{"id": number, "file_name": f"{name}.jpg"} for number, name in enumerate(names)]
    labels = [categories.index(name) if name else None for name, count in counts.items() for _ in range(count)]
    boxes = [
        {"id": number, "image_id": number, "bbox": [1, 1, 5, 5], "category_id": label}
        for number, label in enumerate(labels)
        if label is not None
    ]
    for name in names:
        write_jpeg(root / "train" / f"{name}.jpg", 8, 8)
    listed = [{"id": number, "name": name} for number, name in enumerate(categories)]
    write_coco(root, {"images": images, "annotations": boxes, "categories": listed})
    return root


def test_validation_images_are_the_same_ones_whatever_else_changes(tmp_path: Path) -> None:
    root = annotated(tmp_path, {"cat": 20, "dog": 10, "": 10})
    data = {"name": "coco", "root": root, "train_split": "train", "val_split": "held", "val_fraction": 0.2}
    train, val = build_datasets(data, "train", "held")
    held = set(boxes_by_file(val))
    assert (len(train), len(val)) == (32, 8) and not held & set(boxes_by_file(train))
    assert [sum(name.startswith(kind) for name in held) for kind in NAMES] == [4, 2]
    source = root / "annotations/instances_train.json"
    with pytest.warns(DataWarning) as said:
        build_datasets({**data, "classes": ["dog"]}, "train", "held")
    left = "boxes of classes other than dog are left out: cat"
    assert [str(one.message) for one in said] == [f"{source}: {left} 16", f"{source}, images held out: {left} 4"]
    chosen = build_split({**data, "classes": ["dog", "cat"]}, "held")
    assert set(boxes_by_file(chosen)) == held and chosen.classes == ("dog", "cat")
    content = json.loads(source.read_text())
    content["images"].reverse()
    source.write_text(json.dumps(content))
    assert set(boxes_by_file(build_split(data, "held"))) == held
    with pytest.raises(DataError, match=r"data\.val_fraction=0\.01 of 40 images leaves a part without any"):
        build_split({**data, "val_fraction": 0.01}, "held")


def test_every_stratum_gives_its_share_to_within_one_image(tmp_path: Path) -> None:
    truth = locate_coco(annotated(tmp_path, {"cat": 17, "dog": 9, "": 4}), "train").read()

    @given(st.floats(0.05, 0.9))
    @settings(max_examples=50, deadline=None, derandomize=True)
    def shares(fraction: float) -> None:
        val, train = (hold_out(truth, fraction, held=held) for held in (True, False))
        assert sorted([*val.file_names, *train.file_names]) == sorted(truth.file_names)
        for label, count in enumerate((17, 9)):
            assert abs((val.truth_labels == label).sum() - fraction * count) < 1
        assert abs(len(val.image_ids) - fraction * 30) <= 0.5

    shares()
