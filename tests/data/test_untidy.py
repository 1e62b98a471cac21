"""Exports in which more lies than they hold, or less, or under other names."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
from tests.data.exports import BOXES, EXPORTS, VALID, auto, boxes_by_file, coco_json, voc_xml
from tests.data.files import coco_content, write_coco, write_jpeg

from msil.data.fingerprint import fingerprint
from msil.data.module import build_split
from msil.data.readers.layouts import auto_settings, splits_of
from msil.errors import DataError
from msil.finished import title
from msil.inference.predict import FORMATS
from msil.runs import CONFIG, DETECTIONS


@pytest.mark.parametrize("name", ["label_img_yolo", "label_studio_yolo"])
def test_pictures_that_the_program_wrote_are_no_data(tmp_path: Path, name: str) -> None:
    EXPORTS[name][0](tmp_path)
    before = fingerprint(auto(tmp_path), ["train"])
    place = tmp_path / "images" if name == "label_studio_yolo" else tmp_path
    for folder, file in (("drawn", DETECTIONS), ("runs/one", CONFIG), ("figures", "data.png")):
        write_jpeg(place / folder / "sub" / "img 00.jpg", 8, 8)
        (place / folder / file).write_text(f"{title({})}\n")
    write_jpeg(tmp_path / "photos" / "img 00.jpg", 8, 8)
    if name == "label_img_yolo":
        shutil.rmtree(tmp_path / "photos")  # its images lie in the folder itself
    assert fingerprint(auto(tmp_path), ["train"]) == before
    (place / "figures/data.png").unlink()
    (place / "runs/one" / CONFIG).write_text("min_size: 3\n")
    assert len(build_split(auto(tmp_path), "train")) == len(BOXES) + 2  # the user's own


def test_label_studios_own_place_of_images_is_its_folder_images(tmp_path: Path) -> None:
    EXPORTS["label_studio_coco"][0](tmp_path)
    coco_json(tmp_path / "result.json", list(BOXES), first=0, prefix="/data/upload/1/")
    assert boxes_by_file(build_split(auto(tmp_path), "train")) == BOXES
    coco_json(tmp_path / "result.json", list(BOXES), first=0, prefix="/data/elsewhere/")
    with pytest.raises(DataError, match=r"image 0: file_name is '/data/elsewhere/img 00\.jpg', which leaves"):
        build_split(auto(tmp_path), "train")


def test_names_of_splits_are_compared_without_case(tmp_path: Path) -> None:
    EXPORTS["cvat_yolo_splits"][0](tmp_path)
    for split in ("val", "Validation"):
        assert sorted(boxes_by_file(build_split({"name": "yolo", "root": tmp_path}, split))) == VALID
    assert splits_of(tmp_path) == ["train", "validation"]
    shutil.rmtree(tmp_path)
    EXPORTS["cvat_coco_splits"][0](tmp_path)
    assert splits_of(tmp_path) == ["Train", "Validation"]
    assert (auto_settings(tmp_path) or "").startswith(f"data=auto data.root={tmp_path} \\\n")
    with pytest.raises(DataError, match="no split 'test'"):
        build_split(auto(tmp_path), "test")


def test_to_hold_out_images_is_advised_where_it_helps(tmp_path: Path) -> None:
    empty = coco_content() | {"annotations": [], "images": []}
    write_coco(tmp_path / "set", empty, "val")
    voc = tmp_path / "voc"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (voc / name).mkdir(parents=True)
    (voc / "ImageSets/Main/other.txt").write_text("a\n")
    EXPORTS["cvat_yolo"][0](tmp_path / "yolo")
    for data in (
        {"name": "coco", "root": tmp_path / "set"},
        {"name": "voc", "root": voc},
        {"name": "yolo", "root": tmp_path / "yolo"},
        {"name": "auto", "root": tmp_path / "set"},
        {"name": "coco", "root": tmp_path / "set", "annotations": {}},
    ):
        data = {**data, "train_split": "learn", "val_split": "lost"}
        with pytest.raises(DataError, match=r"training images by data\.val_fraction=0\.2"):
            build_split(data, "lost", by_name=("cat",))
        for split, fraction in (("learn", None), ("learn", 0.2), ("lost", 0.2)):
            with pytest.raises(DataError, match="learn") as error:
                build_split({**data, "val_fraction": fraction}, split)
            assert "val_fraction" not in str(error.value)


@pytest.mark.parametrize("name", ["label_img", "kaggle_voc"])
def test_labelimgs_list_of_classes_beside_xml_files_makes_no_yolo_of_them(tmp_path: Path, name: str) -> None:
    EXPORTS[name][0](tmp_path)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert boxes_by_file(build_split(auto(tmp_path), "train")) == BOXES
    with pytest.raises(DataError, match="no image has a file of labels"):
        build_split({"name": "yolo", "root": tmp_path}, "all")


def test_of_several_yamls_none_is_guessed(tmp_path: Path) -> None:
    EXPORTS["darknet_yolo"][0](tmp_path)
    shutil.copy(tmp_path / "pets.yaml", tmp_path / "other.yml")
    with pytest.raises(DataError, match="not one other yaml that alone names classes and splits"):
        build_split({"name": "yolo", "root": tmp_path}, "train")


def warned(root: Path) -> list[str]:
    """What reading the training split says, without the source's name."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build_split(auto(root), "train")
    return [str(one.message).partition(": ")[2] for one in caught]


def test_labels_that_yolos_layout_does_not_read_are_counted(tmp_path: Path) -> None:
    EXPORTS["label_studio_yolo"][0](tmp_path)
    assert warned(tmp_path) == []
    (tmp_path / "labels/img 11.txt").rename(tmp_path / "labels/notes.txt")  # no boxes are in it
    (tmp_path / "images/img 05.jpg").unlink()
    (tmp_path / "labels/img 06.txt").unlink()
    voc_xml(tmp_path / "Annotations/img 06.xml", "img 06.jpg")
    voc_xml(tmp_path / "Annotations/img 07.xml", "img 07.jpg")  # its txt is read
    assert warned(tmp_path) == [
        f"1 label file without an image, such as {tmp_path / 'labels/img 05.txt'}",
        f"the labels are YOLO's, and 1 xml file not read, such as {tmp_path / 'Annotations/img 06.xml'}",
    ]
    shutil.rmtree(tmp_path)
    EXPORTS["label_img_yolo"][0](tmp_path)
    (tmp_path / "readme.txt").write_text("pets of 2024\n")
    for name in ("img 02", "img 03"):
        (tmp_path / f"{name}.jpg").unlink()
    assert warned(tmp_path) == [f"2 label files without an image, such as {tmp_path / 'img 02.txt'}"]


def test_a_list_of_some_images_leaves_the_labels_of_the_others_unsaid(tmp_path: Path) -> None:
    EXPORTS["cvat_yolo"][0](tmp_path)
    (tmp_path / "train.txt").write_text("data/images/train/img 00.jpg\n")
    assert warned(tmp_path) == []


def test_images_below_the_folder_of_xml_files_are_counted(tmp_path: Path) -> None:
    EXPORTS["label_img"][0](tmp_path)
    for name in ("img 00", "img 01"):
        for ending in ("jpg", "xml"):
            (tmp_path / "more").mkdir(exist_ok=True)
            (tmp_path / f"{name}.{ending}").rename(tmp_path / f"more/{name}.{ending}")
    assert warned(tmp_path) == [
        "folders below are not read, 2 images in more/: put them, and their xml files, beside the others"
    ]


@pytest.mark.parametrize("name", ["label_img", "label_studio_yolo"])
def test_jfif_is_an_image(tmp_path: Path, name: str) -> None:
    EXPORTS[name][0](tmp_path)
    (image,) = tmp_path.rglob("img 00.jpg")
    image.rename(image.with_suffix(".JFIF"))
    assert len(build_split(auto(tmp_path), "train")) == len(BOXES)
    assert warned(tmp_path) == [] and FORMATS[".jfif"] == "JPEG"
