"""The shapes data set: made from a seed alone, sound under the strict reader, and never overwritten."""

from __future__ import annotations

import colorsys
import json
import os
import subprocess
import sys
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from msil.data.audit import DataWarning
from msil.data.coco import CocoDataset
from msil.data.shapes import CLASSES, draw_image, visible_masks, write_shapes
from msil.errors import ConfigError, DataError

SEED = 0
SIZE = 128
# An image depends on its split and index alone, so these are the default validation split and the default training
# split's first images.
NUM_TRAIN, NUM_VAL = 60, 100
SMALL = {"num_train": 3, "num_val": 2, "image_size": 32, "seed": 5}

# COCO's ranges of area in px^2.
AREAS = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, SIZE**2 + 1)}


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


def test_layout(tmp_path: Path) -> None:
    names = set(files(write_shapes(tmp_path / "a" / "deep", **SMALL)))
    fixed = {"shapes.json", "annotations/instances_train.json", "annotations/instances_val.json"}
    assert fixed < names
    assert Counter(name.split("/")[0] for name in names - fixed) == {"train": 3, "val": 2}
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["deep"]  # nothing temporary is left


def test_an_image_does_not_depend_on_how_many_there_are(root: Path, tmp_path: Path) -> None:
    less = write_shapes(tmp_path / "less", num_train=1, num_val=2, image_size=SIZE, seed=SEED)
    for split, count in (("train", 1), ("val", 2)):
        for index in range(count):
            assert np.array_equal(pixels(less, split, index), pixels(root, split, index))


def test_the_splits_share_no_image(root: Path) -> None:
    ids = {split: {image["id"] for image in content(root, split)["images"]} for split in ("train", "val")}
    assert not ids["train"] & ids["val"]
    assert (len(ids["train"]), len(ids["val"])) == (NUM_TRAIN, NUM_VAL)
    seen = {pixels(root, split, index).tobytes() for split in ids for index in range(40)}
    assert len(seen) == 80


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_strict_reader_finds_nothing_to_mend(root: Path, split: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        dataset = CocoDataset(root, split, strict=True)
    written = annotations_by_image(root, split)
    assert dataset.classes == CLASSES == ("circle", "square", "triangle", "cross")
    assert len(dataset.annotations.truth_boxes) == sum(map(len, written.values()))
    for index in range(len(dataset)):
        image, target = dataset[index]
        assert tuple(image.shape) == (3, SIZE, SIZE)
        # Every box is trained on, unclipped: x y w h -> x1 y1 x2 y2.
        boxes = [annotation["bbox"] for annotation in written[target.image_id]]
        assert target.boxes.tolist() == [[x, y, x + w, y + h] for x, y, w, h in boxes]


def test_ids_are_unique_and_categories_have_gaps(root: Path) -> None:
    val = content(root, "val")
    assert len({annotation["id"] for annotation in val["annotations"]}) == len(val["annotations"])
    assert min(annotation["id"] for annotation in val["annotations"]) >= 1  # pycocotools takes id 0 for "no match"
    ids = [category["id"] for category in val["categories"]]
    assert ids != list(range(ids[0], ids[0] + len(ids)))
    assert {annotation["category_id"] for annotation in val["annotations"]} == set(ids)


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


def test_the_pixels_show_the_boxes(root: Path) -> None:
    """An object stands out: over the objects, the colour step across the mask's rim exceeds that inside by far."""
    rims, insides = [], []
    for index in range(12):
        image, objects = draw_image("train", index, SIZE, SEED)
        values = image.astype(float)
        for item, mask in zip(objects, visible_masks(objects), strict=True):
            step = np.linalg.norm(values[:, 1:] - values[:, :-1], axis=2)
            wide = np.linalg.norm(values[:, 3:] - values[:, :-3], axis=2)  # across the anti-aliased pixel
            crossing = item.mask[:, 1:-2] != item.mask[:, 2:-1]
            visible = mask[:, 1:-2] | mask[:, 2:-1]
            if (crossing & visible).any():
                rims.append(wide[crossing & visible].mean())
                insides.append(step[mask[:, 1:] & mask[:, :-1]].mean())
    assert len(rims) > 20
    assert np.mean(rims) > 3 * np.mean(insides)


@pytest.mark.parametrize("split", ["train", "val"])
def test_all_of_cocos_area_ranges_occur(root: Path, split: str) -> None:
    areas = np.array([annotation["area"] for annotation in content(root, split)["annotations"]])
    counts = {name: int(((low <= areas) & (areas < high)).sum()) for name, (low, high) in AREAS.items()}
    assert min(counts.values()) >= 3, counts


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_class_occurs_about_equally_often(root: Path, split: str) -> None:
    counts = Counter(annotation["category_id"] for annotation in content(root, split)["annotations"])
    total = sum(counts.values())
    assert len(counts) == 4
    # Fair draws would give total / 4 with a deviation of sqrt(3 total) / 4; what finds no place is not quite fair.
    assert all(abs(count - total / 4) < 5 * np.sqrt(3 * total) / 4 for count in counts.values()), counts


def test_objects_overlap_but_none_is_mostly_hidden(root: Path) -> None:
    overlapping = 0
    for index in range(40):
        _, objects = draw_image("val", index, SIZE, SEED)
        for item, mask in zip(objects, visible_masks(objects), strict=True):
            overlapping += int(mask.sum() < item.mask.sum())
            assert 2 * mask.sum() >= item.mask.sum()
    assert overlapping >= 10


def test_a_few_images_are_empty(root: Path) -> None:
    empty = NUM_TRAIN + NUM_VAL - sum(len(annotations_by_image(root, split)) for split in ("train", "val"))
    assert 1 <= empty <= (NUM_TRAIN + NUM_VAL) // 10
    assert len(annotations_by_image(root, "val")) < NUM_VAL  # evaluation meets them too


def test_colours_do_not_tell_the_class(root: Path) -> None:
    """The test's oracle: were the colours drawn by class, the mean hue direction of a class (a vector of length 0..1)
    would be long. For n independent hues 2n times its squared length is distributed as chi-square with 2 degrees of
    freedom; over the 4 classes with 8, whose 99.9 % point is 26.1. Likewise the classes' mean brightness must agree
    within 4 standard errors."""
    hues: dict[int, list[float]] = defaultdict(list)
    brightness: dict[int, list[float]] = defaultdict(list)
    for split, count in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        for index in range(count):
            image, objects = draw_image(split, index, SIZE, SEED)
            for item, mask in zip(objects, visible_masks(objects), strict=True):
                red, green, blue = image[mask].mean(axis=0) / 255
                hue, _, value = colorsys.rgb_to_hsv(red, green, blue)
                hues[item.label].append(hue)
                brightness[item.label].append(value)
    assert sorted(hues) == [0, 1, 2, 3]
    everything = np.concatenate([brightness[label] for label in range(4)])
    statistic = 0.0
    for label in range(4):
        count = len(hues[label])
        assert count > 60
        direction = np.exp(2j * np.pi * np.array(hues[label])).mean()
        statistic += 2 * count * abs(direction) ** 2
        assert abs(np.mean(brightness[label]) - everything.mean()) < 4 * everything.std() / np.sqrt(count)
    assert statistic < 26.1


def test_a_second_call_leaves_the_files_alone(tmp_path: Path) -> None:
    root = write_shapes(tmp_path / "a", **SMALL)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert write_shapes(str(root), **SMALL) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert len(files(write_shapes(tmp_path / "a", **SMALL))) == 8


@pytest.mark.parametrize("change", [{"seed": 6}, {"num_train": 4}, {"num_val": 1}, {"image_size": 40}])
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


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("years of work")
    for path in (tmp_path / "a", tmp_path / "a" / "below"):
        with pytest.raises(DataError, match=r"data\.root"):
            write_shapes(path, **SMALL)
    assert (tmp_path / "a").read_text() == "years of work"


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(DataError, match=r"No space left on device.*data\.root"):
        write_shapes(tmp_path / "a", **SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change", [{"num_train": 0}, {"num_val": 0}, {"num_val": -1}, {"image_size": 31}, {"seed": -1}]
)
def test_impossible_parameters_are_refused(tmp_path: Path, change: dict[str, int]) -> None:
    [(name, value)] = change.items()
    with pytest.raises(ConfigError, match=rf"data\.{name}.*{value}"):
        write_shapes(tmp_path / "a", **{**SMALL, **change})
    assert list(tmp_path.iterdir()) == []


def test_the_smallest_images_work(tmp_path: Path) -> None:
    root = write_shapes(tmp_path / "a", num_train=20, num_val=1, image_size=32, seed=1)
    assert len(CocoDataset(root, "train", strict=True)) == 20


def test_processes_at_once_leave_one_complete_data_set(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from msil.data.shapes import write_shapes\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "write_shapes(sys.argv[1], num_train=3, num_val=2, image_size=32, seed=5)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    folder = tmp_path / "sets"
    command = [sys.executable, "-c", code, str(folder / "a")]
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        _, error = process.communicate(timeout=60)
        assert process.returncode == 0, error
    assert [path.name for path in folder.iterdir()] == ["a"]
    assert files(folder / "a") == files(write_shapes(tmp_path / "alone", **SMALL))


@pytest.mark.parametrize("winner", [SMALL, {**SMALL, "seed": 6}])
def test_who_comes_second_uses_the_winners_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, winner: dict[str, int]
) -> None:
    """The other process ends between our look at the folder and our rename, the worst moment."""
    rename = os.rename

    def rename_late(source: Path, destination: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        write_shapes(destination, **winner)
        rename(source, destination)

    monkeypatch.setattr(os, "rename", rename_late)
    if winner == SMALL:
        write_shapes(tmp_path / "a", **SMALL)
    else:
        with pytest.raises(DataError, match="seed=6"):
            write_shapes(tmp_path / "a", **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert json.loads((tmp_path / "a" / "shapes.json").read_text())["seed"] == winner["seed"]
