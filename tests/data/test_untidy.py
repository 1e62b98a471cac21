"""Exports in which more lies than they hold, or less, or under other names."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.data.exports import BOXES, EXPORTS, VALID, auto, boxes_by_file, coco_json
from tests.data.files import coco_content, write_coco, write_jpeg

from msil.data.fingerprint import fingerprint
from msil.data.module import build_split
from msil.data.readers.layouts import auto_settings, splits_of
from msil.errors import DataError
from msil.finished import title
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
    assert auto_settings(tmp_path) == f"data=auto data.root={tmp_path}"
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
            build_split(data, "lost")
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
