"""`msil data show` on small sets whose counts are known."""

from __future__ import annotations

import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.files import coco_content, voc_object, voc_xml, write_coco, write_jpeg, write_voc
from msil.cli import main
from msil.data.annotations import AnnotatedImages
from msil.data.module import build_datasets, build_split
from msil.data.readers.layouts import auto_settings
from msil.errors import ConfigError, DataError
from msil.reporting.figures import dataset_sheet
from msil.reporting.figures.dataset_sheet import (
    classes_table,
    draw_sheet,
    labelled_alike,
    show_data,
    splits_of,
    splits_table,
)
from msil.reporting.figures.pictures import class_color


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """train as in coco_content: boxes of 150.5, 40, 900 (a crowd) and 400 px. val: boxes at COCO's limits, another
    order of categories, one box that leaves its image."""
    root = tmp_path / "set"
    write_coco(root, coco_content(), "train")
    val = coco_content() | {"categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]}
    val["annotations"] = [
        {"id": number, "image_id": 5, "category_id": 1, "bbox": [20, 0, width, 30], "area": area}
        for number, (width, area) in enumerate([(20, 1023.9), (20, 1024), (20, 9215.9), (21, 9216)])
    ]
    write_coco(root, val, "val")
    return root


@pytest.mark.filterwarnings("ignore::msil.data.audit.DataWarning")
def test_counts(coco: Path) -> None:
    found = {split: build_split({"name": "coco", "root": coco}, split).annotations for split in splits_of(coco)}
    truths = dict(zip(found, labelled_alike(list(found.values())), strict=True))
    assert [tuple(row.values()) for row in splits_table(truths).rows] == [
        ("train", 3, 1, 4, 1, 4, 0, 0),  # image c.jpg has no box
        ("val", 3, 2, 4, 0, 1, 2, 1),
    ]
    columns = ("class", "train_boxes", "train_images", "val_boxes", "val_images")
    assert [tuple(row[name] for name in columns) for row in classes_table(truths).rows] == [
        ("dog", 1, 1, 4, 1),  # all four in one image
        ("cat", 2, 2, 0, 0),
        ("zebra", 1, 1, 0, 0),
    ]
    assert truths["val"].classes == ("cat", "dog", "zebra") and set(truths["val"].truth_labels.tolist()) == {1}


def test_the_largest_classes_and_how_many_more(tmp_path: Path) -> None:
    counts = {f"c{label:02}": label % 5 for label in range(24)}  # c04, c09, ... have 4; c00, c05, ... none
    content = coco_content()
    content["categories"] = [{"id": label + 1, "name": name} for label, name in enumerate(counts)]
    owners = [label + 1 for label, count in enumerate(counts.values()) for _ in range(count)]
    content["annotations"] = [
        {"id": number, "image_id": 5, "category_id": owner, "bbox": [1, 1, 9, 9]} for number, owner in enumerate(owners)
    ]
    write_coco(tmp_path, content)
    table = classes_table({"train": build_split({"name": "coco", "root": tmp_path}, "train").annotations})
    order = sorted(counts, key=lambda name: (-counts[name], name))
    assert [row["class"] for row in table.rows] == order[:20]
    assert table.notes == (
        f"4 more classes with {sum(counts[name] for name in order[20:])} boxes",
        "without boxes: c00, c05, c10, c15, c20",
    )


def test_the_command(coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = []
    for name in ("a.png", "b.png"):
        assert main(["data", "show", str(coco), "--out", str(tmp_path / name)]) == 0
        pictures.append((tmp_path / name).read_bytes())
        lines = capsys.readouterr().out.splitlines()
    assert pictures[0] == pictures[1]
    warning = f"warning: {coco / 'annotations/instances_val.json'}: 1 box reaching out of the image, clipped"
    assert [line.startswith(warning) for line in lines[:3]] == [False, False, True]
    assert lines[-1] == f"{tmp_path / 'b.png'}: 6 images with their boxes, spread over the set"
    advice = next(at for at, line in enumerate(lines) if line.startswith("to train on it"))  # it names the folder
    assert max(map(len, lines[4:advice])) <= 80
    picture = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).reshape(-1, 3)
    for label in (0, 1, 2):  # cat, dog, zebra
        assert (picture == class_color(label)).all(axis=1).any()
    assert (picture == class_color(3 + 1)).all(axis=1).any()  # the crowd of dogs

    assert main(["data", "show", str(coco), "--split", "val", "--out", str(tmp_path / "a.png")]) == 0
    out = capsys.readouterr().out
    assert "3 images with their boxes" in out and "split train" not in out and "\ntrain " not in out


def test_classes_of_ones_own_in_vocs_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "set"
    write_voc(root, {"a": voc_xml(voc_object("red cell", 1, 1, 9, 9, "<difficult>1</difficult>"))}, "train")
    write_voc(root, {"b": voc_xml(voc_object("white", 1, 1, 9, 9)), "c": voc_xml()}, "val")
    for name in ("trainval", "white_val", "white_train"):
        (root / f"ImageSets/Main/{name}.txt").write_text("a -1\n")
    assert splits_of(root) == ["train", "val"]
    assert main(["data", "show", str(root), "--out", str(tmp_path / "a.png")]) == 0
    out = capsys.readouterr().out
    assert "\nred cell " in out and "\nwhite " in out and f"data=auto data.root={root}" in out
    assert "share" not in out
    (root / "ImageSets/Main/val.txt").write_text("b\na\nc\n")
    assert main(["data", "show", str(root), "--out", str(tmp_path / "a.png")]) == 0
    assert "warning: train and val share 1 image, such as JPEGImages/a.jpg" in capsys.readouterr().out


def test_difficult_boxes_are_ignored_without_lists_of_splits_too(tmp_path: Path) -> None:
    write_jpeg(tmp_path / "a.jpg", 40, 30)
    boxes = voc_object("cat", 1, 1, 9, 9), voc_object("cat", 1, 1, 9, 9, "<difficult>1</difficult>")
    (tmp_path / "a.xml").write_text(voc_xml(*boxes))
    (row,) = splits_table({"all": build_split({"name": "auto", "root": tmp_path}, "all").annotations}).rows
    assert (row["boxes"], row["ignored"]) == (2, 1)


def test_pictures_are_spread_over_the_set_and_none_is_drawn_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{number:02}" for number in range(34)]
    write_voc(tmp_path, {name: voc_xml(voc_object("cat", 1, 1, 9, 9)) for name in names}, "all")
    write_voc(tmp_path, {name: voc_xml(voc_object("cat", 1, 1, 9, 9)) for name in names[:9]}, "some")
    titles: list[str] = []
    monkeypatch.setattr(dataset_sheet, "draw_grid", lambda cells, out: titles.extend(title for title, _ in cells))
    found = {split: build_split({"name": "voc", "root": tmp_path}, split) for split in ("all", "some")}
    assert isinstance(found["all"], AnnotatedImages)
    assert draw_sheet(found, {split: one.annotations for split, one in found.items()}, tmp_path / "a.png") == 12
    assert [title.split(": ")[1] for title in titles] == [f"{3 * place:02}.jpg, 1 box" for place in range(12)]


def test_a_split_that_is_refused_ends_the_command_after_the_others(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jpeg(coco / "train/a.jpg", 41, 30)
    assert main(["data", "show", str(coco), "--out", str(tmp_path / "a.png")]) == 2
    said = capsys.readouterr()
    assert "a.jpg is 41 x 30" in said.err and len(said.err.splitlines()) == 1
    assert "a.png: 3 images with their boxes" in said.out
    assert "msil train" not in said.out
    (coco / "val/a.jpg").write_bytes(b"")
    write_jpeg(coco / "train/a.jpg", 40, 30)
    assert main(["data", "show", str(coco), "--out", str(tmp_path / "a.png")]) == 2
    assert f"msil train data=auto data.root={coco} data.val_fraction=0.2 \\\n" in capsys.readouterr().out


def test_refusals(coco: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not end in \.png"):
        list(show_data(coco, "sheet.jpg"))
    (tmp_path / "file").touch()
    (tmp_path / "runs").mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        list(show_data(coco, tmp_path / "file/a.png"))
    photo = coco / "train/a.png"
    Image.new("RGB", (8, 8)).save(photo)
    before = photo.read_bytes()
    with pytest.raises(ConfigError, match=r"a\.png is already there, and not by this command"):
        list(show_data(coco, photo))
    assert photo.read_bytes() == before
    with pytest.raises(DataError, match="there is no folder"):
        splits_of(tmp_path / "none")
    with pytest.raises(DataError, match=r"no data set is in \S+runs: looked for YOLO's .* json of COCO's form"):
        splits_of(tmp_path / "runs")
    with pytest.raises(DataError, match=rf"instances_val\.json is a file: give the folder that .*, {coco}$"):
        splits_of(coco / "annotations" / "instances_val.json")


def test_a_folder_without_a_data_set_is_refused_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from msil.cli import main\n"
        "assert main(['data', 'show', sys.argv[1]]) == 2\n"
        "assert not {'torch', 'lightning', 'matplotlib'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.startswith(f"error: no data set is in {tmp_path}: "), done.stderr


def test_the_command_to_train_holds_images_out_where_none_are_to_validate_on(tmp_path: Path) -> None:
    for splits, more in (
        (("train", "val"), ""), (("train", "valid"), ""), (("train", "test"), " data.val_fraction=0.2"),
        (("all",), " data.val_fraction=0.2"),
    ):  # fmt: skip
        root = tmp_path / "-".join(splits)
        for split in splits:
            write_coco(root, coco_content(), split)
        given = auto_settings(root, ["test"])
        assert given is not None
        words = shlex.split(given.replace("\\\n", ""))  # as a shell joins lines
        assert words[:3] == ["data=auto", f"data.root={root}", more.strip() or "data.min_size=256"]
        fraction = 0.5 if more else None
        data = {"name": "auto", "root": root, "train_split": "train", "val_split": "val", "val_fraction": fraction}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            build_datasets(data, "train", "val")
