"""Which layout a data set has: the one that its settings name, or for data=auto what its folder holds."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from msil.data.readers.coco import FILE_NAME, JsonSplit, coco_splits, locate_coco, read_json
from msil.data.readers.files import MissingSplit, Split, names_in
from msil.data.readers.voc import VOC_CLASSES, locate_voc, locate_xml, voc_splits, xml_splits
from msil.data.readers.yolo import locate_yolo, yolo_splits
from msil.errors import ConfigError, DataError, listed, typed

ROBOFLOW = "_annotations.coco.json"
LABEL_STUDIO = "result.json"
_COCO_KEYS = [re.compile(rb'"%s"\s*:\s*\[' % key) for key in (b"images", b"annotations", b"categories")]


class Layout(NamedTuple):
    """signs: what tells it, for a message. splits: names of those in a folder; none: it is not of this layout."""

    signs: str
    splits: Callable[[Path], list[str]]
    locate: Callable[[Path, str], Split]


def located(data: Mapping[str, Any], split: str) -> Split:
    """Where a split lies. data: a run's settings under "data"; under val_fraction val_split is a part of train_split.

    Raises DataError for what is missing, ConfigError for an unknown name.
    """
    if data.get("val_fraction") is not None and split == data["val_split"]:
        split = data["train_split"]
    root, name = Path(data["root"]), data["name"]
    if data.get("annotations") is not None:
        return _given(root, data["annotations"], split)
    if root.is_file():
        folder = _folder_of(root)
        raise DataError(f"{root} is a file: set its folder, as in data=auto {typed('data.root', str(folder))}")
    if name in ("shapes", "coco"):
        return locate_coco(root, split)
    if name == "voc":
        return locate_voc(root, split, VOC_CLASSES if data.get("classes") is None else None)
    if name == "yolo":
        return locate_yolo(root, split)
    if name == "auto":
        return locate_auto(root, split)
    raise ConfigError(f"unknown data set {name!r}; known: shapes, coco, voc, yolo, auto.")


def locate_auto(root: Path, split: str) -> Split:
    """A split of whichever layout the folder has: that of the name, the only one whose name begins so (valid, val2017,
    Validation for val), or to train on the only one that there is."""
    if not root.is_dir():
        raise DataError(f"the data set's folder {root} does not exist: put it there or set data.root")
    layout, there = _layout_of(root)
    begin = _fitting(split, there)
    if len(begin) != 1:
        raise MissingSplit(
            f"{root} ({layout.signs}) has no split {split!r}; there: {listed(there, 10)}: name another one", there
        )
    return layout.locate(root, begin[0])


def splits_of(root: Path) -> list[str]:
    """The splits of whichever layout the folder has, train before val before others; trainval beside train and val is
    left out. Raises DataError where there are none."""
    if root.is_file():
        raise DataError(f"{root} is a file: give the folder that holds it and the images, {_folder_of(root)}")
    if not root.is_dir():
        raise DataError(f"there is no folder {root}: give that of a data set.")
    names = {*_layout_of(root)[1]}
    names -= {"trainval"} if {"train", "val"} <= names else set()
    return sorted(names, key=lambda name: (*(not name.lower().startswith(kind) for kind in ("train", "val")), name))


def _folder_of(file: Path) -> Path:
    """The data set's, one or two above the file."""
    return next((folder for folder in (file.parent.parent, file.parent) if _layout(folder)), file.parent)


def auto_settings(root: Path, refused: Collection[str] = ()) -> str | None:
    """What to type to train on a folder of data as the README does, in two lines, validation images held out where none
    are there; None where there is nothing to train on. refused: splits that the audit refuses."""
    train, val = (_fitting(split, _layout_of(root)[1]) for split in ("train", "val"))
    if len(train) != 1 or train[0] in refused:
        return None
    held_out = [] if len(val) == 1 and val[0] not in refused else [typed("data.val_fraction", 0.2)]
    own_data = " \\\n    data.min_size=256 data.max_size=416 schedule=transfer model.head.num_convs=2"
    return " ".join(["data=auto", typed("data.root", str(root)), *held_out]) + own_data


def _fitting(split: str, there: list[str]) -> list[str]:
    """The splits that match a name, case ignored: the same name, else those that begin with it."""
    if split in there:
        return [split]
    split = split.lower()
    begin = [name for name in there if name.lower().startswith(split)]
    begin = [name for name in begin if name.lower() == split] or begin
    alone = not begin and split.startswith("train") and not there[0].lower().startswith(("val", "test"))
    return there if alone else begin


def _layout_of(root: Path) -> tuple[Layout, list[str]]:
    """As `_layout`. Raises DataError where it is of none."""
    found = _layout(root)
    if found is None:
        inner = [folder for folder in sorted(root.glob("*/")) if _layout(folder) is not None]
        hint = f" One is in {inner[0]}: set {typed('data.root', str(inner[0]))}." if inner else ""
        jsons = () if inner else itertools.chain(*_jsons(root))
        for file in (file for file in jsons if "instances" in file.name):  # what is wrong with the one that is meant
            try:
                read_json(file, ("images", "annotations", "categories"))
            except DataError as error:
                raise DataError(f"no data set is in {root}: {error}") from None
        labels = next((file for place in ("", "*/") for file in root.glob(f"{place}labels/**/*.txt")), None)
        if labels and not inner:
            raise DataError(
                f"no data set is in {root}: YOLO's labels are there, as {labels}, but no names of their classes: add "
                f"{root / 'classes.txt'} with a name a line, label 0 first"
            )
        raise DataError(
            f"no data set is in {root}: looked for {'; '.join(layout.signs for layout in LAYOUTS)}; other files are "
            f"named by data=coco data.annotations=FILE data.images=FOLDER.{hint}"
        )
    return found


def _layout(root: Path) -> tuple[Layout, list[str]] | None:
    """The first layout that the folder has, and its splits."""
    return next(((layout, there) for layout in LAYOUTS if (there := layout.splits(root))), None)


def _plain_jsons(root: Path) -> dict[str, Path]:
    """The files of COCO's form in a folder, or in its annotations/, by their names, or `all` for the only one."""
    found: dict[str, Path] = {}
    for files in _jsons(root):
        found = found or {file.stem.removeprefix("instances_"): file for file in files if _is_coco(file)}
    alone = len(found) == 1 and not next(iter(found)).lower().startswith(("train", "val", "test"))
    return {"all": next(iter(found.values()))} if alone else found


def _jsons(root: Path) -> list[list[Path]]:
    """The json files of a folder, and of its annotations/."""
    return [[folder / name for name in names_in(folder, (".json",))] for folder in (root, root / "annotations")]


def _is_coco(file: Path) -> bool:
    try:
        content = file.read_bytes()
    except OSError:
        return False
    return all(key.search(content) for key in _COCO_KEYS)


def _locate_plain_json(root: Path, split: str) -> Split:
    """The images are in the first folder that holds one of the first that are listed: one of the split's, any in the
    root, or the root."""
    source = _plain_jsons(root)[split]
    found = itertools.islice(FILE_NAME.finditer(source.read_bytes()), 10)
    try:
        first = [json.loads(name[1]).replace("\\", "/") for name in found]
    except ValueError:  # not utf-8, or not json: its reader says so
        first = []
    images = root / "images"
    folders = [root / split, images / split, images, root, *sorted(root.glob("*/"))]
    holding = (folder for folder in folders if any((folder / name).is_file() for name in first))
    folder = next(holding, images if images.is_dir() else root)
    return JsonSplit(f"COCO json {source.name}", root, source, folder, umbrella=source.name == ROBOFLOW)


def _given(root: Path, annotations: str | Mapping[str, str], split: str) -> Split:
    """The file of data.annotations, or that of the split where it names one for each; images in root/<split> if there
    is such a folder, else in root."""
    if not root.is_dir():
        raise DataError(
            f"the folder of the images {root} does not exist: set data.images to it, from here or from data.root"
        )
    if isinstance(annotations, str):
        source: str | None = annotations
    else:
        alike = [key for key in annotations if split.lower().startswith(key.lower())]  # train, of train2017
        own = split if split in annotations or len(alike) != 1 else alike[0]
        source, split = annotations.get(own), own
    if source is None:
        raise MissingSplit(
            f"data.annotations names no file for the split {split!r}, only for {listed(list(annotations), 5)}: add it",
            list(annotations),
        )
    if not Path(source).is_file():
        raise DataError(
            f"annotation file {source} is missing: set data.annotations to a COCO json, from here or from data.root"
        )
    folder = root / split if (root / split).is_dir() else root
    return JsonSplit("COCO json of data.annotations", root, Path(source), folder)


# The first that fits is taken.
LAYOUTS: Sequence[Layout] = (
    Layout("YOLO's data.yaml, obj.data, or classes.txt with labels", yolo_splits, locate_yolo),
    Layout(
        f"Roboflow's train/{ROBOFLOW}",
        lambda root: sorted(path.parent.name for path in root.glob(f"*/{ROBOFLOW}")),
        lambda root, split: JsonSplit(
            "Roboflow's COCO json", root, root / split / ROBOFLOW, root / split, umbrella=True
        ),
    ),
    Layout(
        f"Label Studio's {LABEL_STUDIO}",
        lambda root: ["all"] if (root / LABEL_STUDIO).is_file() else [],
        lambda root, _: JsonSplit("Label Studio's COCO json", root, root / LABEL_STUDIO, root),
    ),
    Layout("COCO's or CVAT's annotations/instances_*.json", coco_splits, locate_coco),
    Layout("VOC's ImageSets/Main/*.txt", voc_splits, locate_voc),
    Layout("VOC xml beside images or in Annotations", xml_splits, locate_xml),
    Layout(
        "a json of COCO's form, here or in annotations, and images",
        lambda root: sorted(_plain_jsons(root)),
        _locate_plain_json,
    ),
)
