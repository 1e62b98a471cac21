"""YOLO's layout: a data.yaml that names splits and classes, images/ and beside it labels/ with one txt an image; or a
classes.txt with the names alone, as Label Studio and labelImg write it; or Darknet's obj.data, CVAT's YOLO 1.1."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from msil.data.annotations import Annotations
from msil.data.audit import check_images, check_inside, finite_number, is_text, relative_inside, short, warn
from msil.data.readers.files import (
    IMAGES,
    LARGEST_LIST,
    Listings,
    MissingSplit,
    Split,
    images_below,
    names_in,
    read_text,
)
from msil.errors import DataError, counted

SPLITS = ("train", "val", "valid", "validation", "test")
SOURCES = ("data.yaml", "data.yml", "dataset.yaml", "obj.data")
CLASSES = ("classes.txt", "labels/classes.txt")
SLACK = 0.01  # of a share of the image: what exporters leave outside by rounding


@dataclass(frozen=True)
class YoloSplit:
    """source: the data.yaml, obj.data or classes.txt. names: label -> class. images: below root, in order.

    A box is a line of its image's txt: class cx cy width height, or class x1 y1 x2 y2 x3 y3 ... of a polygon, which
    counts as the box around it; all but the class are shares of the image's width and height, turned upright by its
    EXIF orientation. keypoints: numbers of a pose, not read, behind each box; above 0 there are no polygons. An image
    without a txt has no boxes. Image ids: places in the list, from 1.
    """

    layout: str
    root: Path
    source: Path
    names: tuple[str, ...]
    images: list[str]
    keypoints: int = 0

    def read(self) -> Annotations:
        labels = self._labels()
        if not any(file.is_file() for file in labels):
            raise DataError(
                f"{self.source}: no image has a file of labels, such as {labels[0]}: put them into labels/ "
                "beside images/"
            )
        check_inside(labels, self.root, self.root)
        self._warn_of_lost(labels)
        rows = [_read_labels(file, len(self.names), self.keypoints) for file in labels]
        paths = [self.root / name for name in self.images]
        sizes, orientations = check_images(paths, self.root, self.root, [None] * len(paths), [str(p) for p in paths])
        owners = np.repeat(np.arange(len(rows)), [len(own) for own in rows])
        numbers, classes, shares = zip(*(row for own in rows for row in own), strict=True) if len(owners) else ((),) * 3
        boxes = np.array(shares, dtype=np.float64).reshape(-1, 4) * sizes[owners][:, [1, 0, 1, 0]]
        return Annotations(
            root=self.root,
            source=self.source,
            classes=self.names,
            category_ids=tuple(range(len(self.names))),
            image_ids=np.arange(1, len(rows) + 1),
            file_names=self.images,
            sizes=sizes,
            orientations=orientations,
            truth_images=owners,
            truth_ids=np.array(numbers, dtype=np.int64),
            truth_boxes=boxes,
            truth_labels=np.array(classes, dtype=np.int64),
            truth_areas=boxes[:, 2] * boxes[:, 3],
            truth_ignored=np.zeros(len(boxes), dtype=bool),
            layout=self.layout,
            unit="line",
        )

    def files(self) -> tuple[list[Path], list[Path]]:
        labels = [file for file in self._labels() if file.is_file()]
        return [self.source, *labels], [self.root / name for name in self.images]

    def _labels(self) -> list[Path]:
        return [_label_file(self.root, name) for name in self.images]

    def _warn_of_lost(self, labels: list[Path]) -> None:
        """Of label files without an image, and of xml files of images without a label file."""
        listings, images = Listings(), [self.root / name for name in self.images]
        places = {file.parent: image.parent for file, image in zip(labels, images, strict=True)}
        stray = [
            file
            for folder, beside in places.items()
            for file in map(folder.joinpath, names_in(folder, (".txt",)))
            if listings.find(beside, file.stem, IMAGES) is None and _holds_boxes(file)
        ]
        if stray:
            warn(self.source, f"{counted(len(stray), 'label file')} without an image, such as {stray[0]}")
        xmls = [
            folder / name
            for file, image in zip(labels, images, strict=True)
            if not file.is_file()
            for folder in dict.fromkeys(
                (image.parent, file.parent, self.root / "Annotations", self.root / "annotations")
            )
            if (name := listings.find(folder, file.stem, (".xml",)))
        ]
        if xmls:
            count = counted(len(xmls), "xml file")
            warn(self.source, f"the labels are YOLO's, and {count} not read, such as {xmls[0]}")


def yolo_splits(root: Path) -> list[str]:
    """Those that data.yaml names; "all" for a classes.txt alone, which labelImg leaves beside xml files too, and an
    image with its txt."""
    if (source := _source_of(root)) is None:
        return []
    if source.suffix == ".txt":
        images = images_below(root, _images_of_classes(root))
        return ["all"] if any(_label_file(root, name).is_file() for name in images) else []
    content = _read_source(source, root)
    return [name for name in SPLITS if content.get(name)]


def locate_yolo(root: Path, split: str) -> Split:
    """A split of `yolo_splits`; val, valid and validation are one name, and of classes.txt every name is "all"."""
    if (source := _source_of(root)) is None:
        raise DataError(
            f"{root} has no data.yaml, not one other yaml that alone names classes and splits, and no classes.txt: "
            "set data.root to YOLO's folder"
        )
    content = _read_source(source, root)
    split = "all" if source.suffix == ".txt" else split.lower()
    same = SPLITS[1:4] if split in SPLITS[1:4] else (split,)
    places = next((content[name] for name in same if content.get(name)), None)
    if places is None:
        there = [name for name in SPLITS if content.get(name)]
        raise MissingSplit(
            f"{source} names no split {split} (there: {', '.join(there) or 'none'}): add it, or name another split",
            there,
        )
    places = places if isinstance(places, list) else [places]
    images = [name for place in places for name in _images_at(place, root, content.get("path"), f"{source}: {split}")]
    if twice := [image for image, count in Counter(images).items() if count > 1]:
        raise DataError(f"{source}: {split} holds {short(twice[0])} more than once: name it, or its folder, once")
    names, keypoints = _names(content.get("names"), source), math.prod(content.get("kpt_shape") or [0])
    return YoloSplit(f"YOLO txt with {source.name}", root, source, names, images, keypoints)


def _label_file(root: Path, image: str) -> Path:
    """An image's txt: in labels/ in the place of the last images/, or beside it."""
    folder, file = os.path.split(os.path.splitext(image)[0])
    parts = folder.split("/")
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    own, beside = root.joinpath(*parts, f"{file}.txt"), root / folder / f"{file}.txt"
    return beside if beside.is_file() and not own.is_file() else own


def _source_of(root: Path) -> Path | None:
    """data.yaml, or the only yaml of another name that names classes and a split, or a classes.txt."""
    known = [root / name for name in SOURCES if (root / name).is_file()]
    if known:
        return known[0]
    others = [root / name for name in names_in(root, (".yaml", ".yml")) if _names_splits(root / name)]
    if len(others) == 1:
        return others[0]
    return next((root / name for name in CLASSES if (root / name).is_file()), None)


def _names_splits(file: Path) -> bool:
    try:
        content = yaml.safe_load(read_text(file, "file"))
    except (DataError, yaml.YAMLError, ValueError, RecursionError):  # it is about something else
        return False
    return isinstance(content, dict) and "names" in content and any(str(key).lower() in SPLITS for key in content)


def _images_of_classes(root: Path) -> str:
    """The folder of the images of a classes.txt."""
    return "images" if (root / "images").is_dir() else "."


def _images_at(place: Any, root: Path, base: Any, where: str) -> list[str]:
    """The images of a folder, or of a txt file that lists them."""
    bases = [name for name in (_inside(base, root), "") if name is not None]
    name = _found(place, root, bases, where)
    if not name.lower().endswith(".txt"):
        if not (images := images_below(root, name)):
            raise DataError(f"{where} is {short(place)}, but {root / name} has no images: put them there")
        return images
    lines = read_text(root / name, "list of images", LARGEST_LIST).splitlines()
    bases = [*bases, os.path.dirname(name)]
    images = [
        _found(line.strip(), root, bases, f"{root / name}: line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not images:
        raise DataError(f"{root / name} is empty: it names no images")
    return images


def _found(place: Any, root: Path, bases: list[str], where: str) -> str:
    """A path of data.yaml or of a list -> below root. Leading ../ and a first folder that is not here are left out, of
    an absolute path as many as need be: exporters write paths of the machine or the folder that they ran in."""
    if not is_text(place):
        raise DataError(f"{where} must name a folder or file of the data set, but is {short(place)}: correct it")
    inside = _inside(place, root)
    if inside is None:
        parts = os.path.normpath(place.replace("\\", "/")).split("/")
        tails = ["/".join(parts[start:]) for start in range(1, len(parts))]
    else:
        tails = [inside, inside.partition("/")[2]]
    for name in (os.path.normpath(os.path.join(base, tail)) for tail in tails if tail for base in bases):
        if os.path.exists(root / name):
            return Path(name).as_posix()
    raise DataError(f"{where} is {short(place)}, which is not in {root}: put it there or correct the path")


def _inside(place: Any, root: Path) -> str | None:
    """A path below root, which need not be there; None for an absolute one elsewhere, and for what is no path."""
    if not is_text(place):
        return None
    place = place.replace("\\", "/")
    if os.path.isabs(place) or place[1:3] == ":/":
        return relative_inside(place, root)
    parts = os.path.normpath(place).split("/")
    return "/".join(part for part in parts if part != "..")


def _read_source(source: Path, root: Path) -> Mapping[str, Any]:
    """Of obj.data, lines of key = value, names is a file with a class a line. Splits are in lower case."""
    if source.suffix == ".txt":
        return {"names": _class_names(source), "all": _images_of_classes(root)}
    if source.suffix == ".data":
        pairs = [line.partition("=") for line in read_text(source, "file").splitlines()]
        content: dict[str, Any] = {key.strip(): value.strip() for key, _, value in pairs}
        file = root / _found(content.get("names"), root, [""], f"{source}: names")
        return content | {"names": _class_names(file)}
    given = _read_yaml(source)
    return {**{str(key).lower(): value for key, value in given.items() if str(key).lower() in SPLITS}, **given}


def _read_yaml(source: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(read_text(source, "file"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{source} is not valid yaml ({short(reason)}): correct it") from None
    if not isinstance(content, dict) or "names" not in content:
        raise DataError(f"{source} must name the classes under names: and the images under train:, as YOLO's files do")
    if isinstance(content.get("nc"), int) and content["nc"] != len(_names(content["names"], source)):
        raise DataError(f"{source}: nc is {content['nc']}, but names are {len(content['names'])}: correct one of them")
    shape = content.get("kpt_shape") or [0, 0]
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(size) is int and size >= 0 for size in shape):
        raise DataError(f"{source}: kpt_shape must be two numbers, such as [17, 3], but is {short(shape)}: correct it")
    return content


def _class_names(file: Path) -> list[str]:
    return [line.strip() for line in read_text(file, "file of class names").splitlines() if line.strip()]


def _names(names: Any, source: Path) -> tuple[str, ...]:
    if isinstance(names, dict):
        names = {int(own) if isinstance(own, str) and own.isdecimal() else own: name for own, name in names.items()}
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise DataError(f"{source}: names must be numbered 0, 1, 2, but are {short(list(names))}: correct them")
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DataError(f"{source}: names must be a list of classes, or {{0: cat, 1: dog}}, but is {short(names)}")
    names = [str(name) if type(name) in (int, float) else name for name in names]  # yaml takes 5 for a number
    for number, name in enumerate(names):
        if not is_text(name):
            raise DataError(f"{source}: name {number} must be text, but is {short(name)}: put it in quotes")
        if name in names[:number]:
            raise DataError(f"{source} names {short(name)} more than once: name each class once")
    return tuple(names)


def _read_labels(file: Path, count: int, keypoints: int) -> list[tuple[int, int, list[float]]]:
    """Line number, class, and x y width height as shares of the image, of each box."""
    if not os.path.lexists(file):
        return []
    rows = []
    for number, line in enumerate(read_text(file, "file of labels").splitlines(), start=1):
        if not (words := line.split()):
            continue
        where = f"{file}: line {number}"
        values = [value for word in words if (value := finite_number(word)) is not None]
        if len(values) < len(words):
            wrong = next(word for word in words if finite_number(word) is None)
            raise DataError(f"{where}: {short(wrong)} must be a finite number: correct or remove the line")
        if len(values) != 5 + keypoints and (keypoints or len(values) < 7 or len(values) % 2 == 0):
            other = f"and {keypoints} of keypoints (kpt_shape)" if keypoints else "nor a polygon's"
            raise DataError(
                f"{where} has {len(values)} numbers, not the five of a box, class cx cy width height, {other}: "
                "correct it"
            )
        if keypoints:
            del words[5:], values[5:]
        label, shares = values[0], values[1:]
        if label not in range(count):
            raise DataError(f"{where}: class {words[0]} is not one of the {count}, 0 to {count - 1}: correct it")
        if not all(-SLACK <= share <= 1 + SLACK for share in shares):
            raise DataError(
                f"{where}: {short(' '.join(words[1:]))} must be shares of the image's width and height, from 0 to 1: "
                "divide pixels by them"
            )
        if len(shares) > 4:
            xs, ys = shares[::2], shares[1::2]
            box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
        else:
            cx, cy, width, height = shares
            if width < 0 or height < 0:
                raise DataError(f"{where} is inverted, width {width:g} height {height:g}: correct or remove it")
            box = [cx - width / 2, cy - height / 2, width, height]
        rows.append((number, int(label), box))
    return rows


def _holds_boxes(file: Path) -> bool:
    try:
        words = read_text(file, "file of labels").partition("\n")[0].split()
    except DataError:
        return False
    return len(words) >= 5 and all(finite_number(word) is not None for word in words)
