"""CocoDataset on splits without annotations, as COCO publishes its test sets."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from msil.data.coco import CocoDataset
from msil.errors import DataError

from .files import boxes_of, coco_content, write_coco, write_jpeg


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
    dataset = CocoDataset(tmp_path, split)
    assert not dataset.annotated
    assert (dataset.classes, dataset.category_ids) == (("cat", "dog", "zebra"), (3, 7, 90))
    assert [dataset.image_id(index) for index in range(len(dataset))] == [11, 5, 8]
    assert dataset.path(1) == tmp_path / folder / "000000000005.jpg"
    assert not any(dataset.has_boxes(index) for index in range(3))
    image, target = dataset[1]
    assert (image.shape, target.image_id, target.size) == ((3, 30, 40), 5, (30, 40))
    assert (target.boxes.shape, target.labels.shape) == ((0, 4), (0,))
    assert boxes_of(dataset) == []
    chosen = CocoDataset(tmp_path, split, classes=["zebra", "cat"], strict=True)
    assert (chosen.classes, chosen.category_ids) == (("zebra", "cat"), (90, 3))
    pickle.loads(pickle.dumps(dataset))


def test_what_an_image_info_file_must_have(tmp_path: Path) -> None:
    source = write_image_info(tmp_path, "test2017", "test2017")
    (tmp_path / "test2017" / "000000000005.jpg").unlink()
    with pytest.raises(DataError, match=r"000000000005\.jpg is missing"):
        CocoDataset(tmp_path, "test2017")
    for key in ("images", "categories"):
        content = coco_content()
        del content[key]
        source.write_text(json.dumps(content))
        with pytest.raises(DataError, match=f"image_info_test2017.json must be .* a list '{key}', .*image_info"):
            CocoDataset(tmp_path, "test2017")


def test_missing_parts_of_a_split_without_annotations(tmp_path: Path) -> None:
    write_coco(tmp_path, coco_content(), "train")
    (tmp_path / "annotations" / "image_info_test2017.json").write_text(json.dumps(coco_content()))
    (tmp_path / "annotations" / "image_info_test-dev2017.json").write_text(json.dumps(coco_content()))
    layouts = r"annotations/instances_test\.json, or image_info_test\.json for a split without boxes"
    there = r"\(the splits there are test-dev2017, test2017, train\)"
    with pytest.raises(DataError, match=rf"instances_test\.json is missing {there}.*{layouts}"):
        CocoDataset(tmp_path, "test")
    with pytest.raises(DataError, match=r"image folder \S*test-dev2017 or \S*test2017 is missing"):
        CocoDataset(tmp_path, "test-dev2017")
    with pytest.raises(DataError, match=r"image folder \S*test2017 is missing"):
        CocoDataset(tmp_path, "test2017")


def test_annotated_splits_say_so_and_need_their_own_folder(tmp_path: Path) -> None:
    write_coco(tmp_path, coco_content(), "train")
    assert CocoDataset(tmp_path, "train").annotated
    content = {**coco_content(), "annotations": []}
    write_coco(tmp_path, content, "val")
    with pytest.raises(DataError, match="no image has a usable box"):  # empty annotations are not a test set
        CocoDataset(tmp_path, "val")
    (tmp_path / "annotations" / "instances_train-dev.json").write_text(json.dumps(coco_content()))
    with pytest.raises(DataError, match=r"image folder \S*train-dev is missing"):
        CocoDataset(tmp_path, "train-dev")
