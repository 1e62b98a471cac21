"""The shapes data set: made from a seed alone, sound under the strict reader, and never overwritten."""

from __future__ import annotations

import json
import os
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from msil.data.audit import DataWarning
from msil.data.shapes import CLASSES, draw_image, write_shapes
from msil.errors import DataError

from .files import read_coco

SEED = 0
SIZE = 128
# An image depends on its split and index alone, so these are the default validation split and the default training
# split's first images.
NUM_TRAIN, NUM_VAL = 60, 100
SMALL = {"num_train": 3, "num_val": 2, "image_size": 32, "seed": 5}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(
        tmp_path_factory.mktemp("data") / "shapes", num_train=NUM_TRAIN, num_val=NUM_VAL, image_size=SIZE, seed=SEED
    )


def content(root: Path, split: str) -> dict[str, Any]:
    return json.loads((root / "annotations" / f"instances_{split}.json").read_text())


def pixels(root: Path, split: str, index: int) -> np.ndarray:
    name = content(root, split)["images"][index]["file_name"]
    with Image.open(root / split / name) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


def annotations_by_image(root: Path, split: str) -> dict[int, list[dict[str, Any]]]:
    grouped = defaultdict(list)
    for annotation in content(root, split)["annotations"]:
        grouped[annotation["image_id"]].append(annotation)
    return grouped


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_same_parameters_give_the_same_bytes_and_another_seed_other_ones(tmp_path: Path) -> None:
    first = files(write_shapes(tmp_path / "a", **SMALL))
    assert first == files(write_shapes(tmp_path / "b", **SMALL))
    other = files(write_shapes(tmp_path / "c", **{**SMALL, "seed": 6}))
    assert first.keys() == other.keys()
    assert {name for name in first if first[name] == other[name]} == set()


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_strict_reader_finds_nothing_to_mend(root: Path, split: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        dataset = read_coco(root, split, strict=True)
    written = annotations_by_image(root, split)
    assert dataset.classes == CLASSES == ("circle", "square", "triangle", "cross")
    assert len(dataset.annotations.truth_boxes) == sum(map(len, written.values()))
    for index in range(len(dataset)):
        image, target = dataset[index]
        assert tuple(image.shape) == (3, SIZE, SIZE)
        # Every box is trained on, unclipped: x y w h -> x1 y1 x2 y2.
        boxes = [annotation["bbox"] for annotation in written[target.image_id]]
        assert target.boxes.tolist() == [[x, y, x + w, y + h] for x, y, w, h in boxes]


def test_boxes_are_tight_and_areas_those_of_the_visible_pixels(root: Path) -> None:
    written = annotations_by_image(root, "val")
    images = content(root, "val")["images"]
    names = {category["id"]: category["name"] for category in content(root, "val")["categories"]}
    for index in range(25):
        drawn, objects = draw_image("val", index, SIZE, SEED)
        assert np.array_equal(drawn, pixels(root, "val", index))
        # Painter's order, worked out here: each pixel belongs to the last object painted on it.
        owner = np.full((SIZE, SIZE), -1)
        for number, item in enumerate(objects):
            owner[item.mask] = number
        annotations = written[images[index]["id"]]
        assert len(annotations) == len(objects)
        for number, (annotation, item) in enumerate(zip(annotations, objects, strict=True)):
            rows, columns = np.nonzero(owner == number)
            assert annotation["area"] == len(rows)
            x, y, width, height = annotation["bbox"]
            assert (x, y) == (columns.min(), rows.min())
            assert (x + width, y + height) == (columns.max() + 1, rows.max() + 1)  # a pixel is 1 wide
            assert names[annotation["category_id"]] == CLASSES[item.label]
            assert annotation["iscrowd"] == 0


@pytest.mark.parametrize("change", [{"seed": 6}, {"num_train": 4}])
def test_other_parameters_than_the_folder_holds_are_refused(tmp_path: Path, change: dict[str, int]) -> None:
    root = write_shapes(tmp_path / "a", **SMALL)
    before = files(root)
    [(name, value)] = change.items()
    with pytest.raises(DataError, match=rf"{name}={SMALL[name]}.*{name}={value}.*data\.root"):
        write_shapes(root, **{**SMALL, **change})
    assert files(root) == before


@pytest.mark.parametrize("stamp", [None, "{broken", "[]", "17", '{"format": 0}'])
def test_a_foreign_folder_is_refused(tmp_path: Path, stamp: str | None) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("years of work")
    if stamp is not None:
        (tmp_path / "a" / "shapes.json").write_text(stamp)
    before = files(tmp_path)
    with pytest.raises(DataError, match=r"data\.root"):
        write_shapes(tmp_path / "a", **SMALL)
    assert files(tmp_path) == before


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(DataError, match=r"No space left on device.*data\.root"):
        write_shapes(tmp_path / "a", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_who_comes_second_uses_the_winners_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process ends between our look at the folder and our rename, the worst moment."""
    rename = os.rename

    def rename_late(source: Path, destination: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        write_shapes(destination, **SMALL)
        rename(source, destination)

    monkeypatch.setattr(os, "rename", rename_late)
    write_shapes(tmp_path / "a", **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
