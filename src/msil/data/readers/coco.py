"""COCO's layout: root/<split>/*.jpg and root/annotations/instances_<split>.json, or image_info_<split>.json for the
splits whose boxes are kept secret."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from msil.data.annotations import Annotations
from msil.data.audit import (
    check_images,
    inner_name,
    is_finite_number,
    is_text,
    own_id,
    relative_inside,
    short,
    side,
    warn,
)  # fmt: skip
from msil.data.readers.files import Listings, MissingSplit, read_file
from msil.errors import DataError, counted

Entry = dict[str, Any]
FILE_NAME = re.compile(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")')
Id = int | str
Row = tuple[Id, Id, Id, list[float], float, bool]  # id, image_id, category_id, bbox, area, iscrowd


@dataclass(frozen=True)
class JsonSplit:
    """A split of one COCO json. folder: of the images, root or below it. annotated: whether it has boxes; those that a
    file without may hold are not read. umbrella: leave out the category that Roboflow lists before the others, whose
    supercategory it names.

    Read: image id, file_name, width, height; annotation id, image_id, category_id, bbox [x, y, width, height], area
    (default width * height), iscrowd (default 0); category id and name. Labels are by rising category id. Crowds are
    never trained on. Polygons are dropped while reading: train2017 takes some 1 GB for a moment, 80 MB to keep.
    An image's width and height must be those of the file turned upright by its EXIF orientation. If they are those of
    the stored pixels instead, the boxes are meant for these, and the file is read without turning it.
    """

    layout: str
    root: Path
    source: Path
    folder: Path
    annotated: bool = True
    umbrella: bool = False

    def read(self) -> Annotations:
        """Ids of images or categories that are text, or beyond 64 bits, are numbered from 1 on."""
        source, folder = self.source, self.folder
        content = read_json(source, ("images", "categories", *(("annotations",) if self.annotated else ())))
        categories = _read_categories(content["categories"], source)
        image_ids, given, sizes = _read_images(content["images"], source)
        where = [f"{source}: image {short(own)}" for own in image_ids]
        names = self._below_root(given, where)
        read_as = check_images([self.root / name for name in names], folder, self.root, sizes, where)

        if twice := [name for name, count in Counter(names).items() if count > 1]:
            warn(source, f"{counted(len(twice), 'image file')} under several ids, such as {twice[0]}: each counts")
        position = {own: index for index, own in enumerate(image_ids)}
        entries = content["annotations"] if self.annotated else []
        if self.annotated and not entries:
            raise DataError(f"{source} lists no annotations, so no image has a box: list them")
        rows = _read_boxes(entries, position, given, categories, source)
        ids, owners, category_ids, boxes, areas, crowds = zip(*rows, strict=True) if rows else ((),) * 6
        if self.umbrella:
            parents = {entry.get("supercategory") for entry in content["categories"]} - {"none"}
            for own, name in list(categories.items()):
                if name in parents and own not in category_ids and len(categories) > 1:
                    del categories[own]
        for name, count in Counter(categories.values()).items():
            if count > 1:
                raise DataError(
                    f"{source}: {count} categories are called {short(name)}: give them one id, or names of their own"
                )
        label_of = {own: label for label, own in enumerate(categories)}
        numbers, own_categories = _numbers(image_ids), list(categories)
        numbered = _numbers(own_categories)
        return Annotations(
            root=self.root,
            source=source,
            classes=tuple(categories.values()),
            category_ids=tuple(numbered),
            image_ids=np.array(numbers, dtype=np.int64),
            file_names=names,
            sizes=read_as[0],
            orientations=read_as[1],
            truth_images=np.array([position[own] for own in owners], dtype=np.int64),
            truth_ids=np.array(ids, dtype=np.int64 if ids == tuple(_numbers(ids)) else object),
            truth_boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
            truth_labels=np.array([label_of[own] for own in category_ids], dtype=np.int64),
            truth_areas=np.array(areas, dtype=np.float64),
            truth_ignored=np.array(crowds, dtype=bool),
            annotated=self.annotated,
            layout=self.layout,
            own_image_ids=None if numbers == image_ids else tuple(image_ids),
            own_category_ids=None if numbered == own_categories else dict(zip(numbered, own_categories, strict=True)),
        )

    def files(self) -> tuple[list[Path], list[Path]]:
        """Without reading the file as json."""
        names = [json.loads(text) for text in FILE_NAME.findall(self.source.read_bytes())]
        try:
            return [self.source], [self.root / name for name in self._below_root(names, [""] * len(names))]
        except DataError:  # a name that the audit refuses
            return [self.source], [self.folder / name for name in names]

    def _below_root(self, names: list[Any], where: list[str]) -> list[str]:
        """Names in the images' folder -> below root, their endings in the case of the files."""
        listings = Listings()
        inner = self.folder.relative_to(self.root).as_posix()
        prefix = "" if inner == "." else f"{inner}/"
        found = []
        for name, image in zip(names, where, strict=True):
            placed = relative_inside(name, self.root)
            if isinstance(name, str) and name.startswith("/data/upload/"):  # Label Studio's own place of images/
                uploaded = f"{prefix}images/{name.rpartition('/')[2]}"
                placed = uploaded if listings.has(self.root, uploaded) else placed
            placed = prefix + inner_name(name, f"{image}: file_name") if placed is None else placed
            if not listings.has(self.root, placed):
                stem, ending = os.path.splitext(placed.replace("\\", "/"))  # Label Studio writes so on Windows
                placed = listings.find(self.root, stem, (ending.lower(),)) or placed
            found.append(placed)
        return found


def _numbers(ids: Sequence[int | str]) -> list[int]:
    """The ids themselves where each is a whole number of 64 bits, else 1, 2, ..."""
    whole = [own for own in ids if isinstance(own, int) and -(2**63) <= own < 2**63]
    return whole if len(whole) == len(ids) else list(range(1, len(ids) + 1))


def coco_splits(root: Path) -> list[str]:
    """Names of the splits in root/annotations."""
    kinds = ("instances_", "image_info_")
    return sorted({path.stem.removeprefix(kind) for kind in kinds for path in root.glob(f"annotations/{kind}*.json")})


def locate_coco(root: Path, split: str) -> JsonSplit:
    """COCO's own layout, and CVAT's, whose images are in root/images or root/images/<split>.

    A split without instances_<split>.json is one without boxes, as COCO's test sets are. It may be a part of another
    one, in whose folder its images are: those of test-dev2017 in test2017.
    """
    layout = (
        f"COCO's layout is <data.root>/{split}/*.jpg and <data.root>/annotations/instances_{split}.json, or "
        f"image_info_{split}.json for a split without boxes"
    )
    if not root.is_dir():
        raise DataError(f"the data set's folder {root} does not exist: put it there or set data.root; {layout}")
    source, own = root / "annotations" / f"instances_{split}.json", [root / split]
    annotated = source.is_file()
    if not annotated:
        missing, source = source, root / "annotations" / f"image_info_{split}.json"
        own.append(root / split.replace("-dev", "", 1))
        if not source.is_file():
            splits = coco_splits(root)
            there = f"the splits there are {', '.join(splits)}" if splits else "there is no instances_*.json at all"
            other = "name another split" if splits else "set data=auto, which reads a json of another name or place"
            raise MissingSplit(
                f"annotation file {missing} is missing ({there}): put it there, or {other}; {layout}", splits
            )
    folder = next((folder for folder in (*own, root / "images" / split, root / "images") if folder.is_dir()), None)
    if folder is None:
        names = " or ".join(dict.fromkeys(map(str, own)))
        raise DataError(
            f"image folder {names} is missing, as is {root / 'images'}: put the images of split {split!r} there; "
            f"{layout}"
        )
    return JsonSplit("COCO json in annotations/", root, source, folder, annotated)


def read_json(source: Path, lists: Sequence[str]) -> dict[str, list[Entry]]:
    """A COCO file, of which `lists` are lists of objects, polygons and masks left out."""
    text = read_file(source, "json", largest=math.inf)
    if not text.strip():
        raise DataError(f"{source} is empty: replace it with an intact copy")
    try:
        content = json.loads(text, object_pairs_hook=_entry)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source} is not valid json ({error}): correct it or replace it with an intact copy") from None
    for key in lists:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            kind = "instances" if "annotations" in lists else "image_info"
            found = "has none" if isinstance(content, dict) else f"is a {type(content).__name__}"
            raise DataError(
                f"{source} must be a json object with a list {key!r}, as COCO's {kind} files are, but {found}"
            )
        for index, entry in enumerate(content[key]):
            if not isinstance(entry, dict):
                raise DataError(f"{source}: {key}[{index}] must be a json object, but is {type(entry).__name__}")
    return content


def _entry(pairs: list[tuple[str, Any]]) -> Entry:
    """Frees the polygons, nine tenths of the file, as soon as they are parsed. Refuses a key that is given twice, of
    which json would take the last value."""
    entry = dict(pairs)
    if len(entry) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        which = f" of the entry with id {short(entry['id'])}" if "id" in entry else ""
        raise ValueError(f"the key {short(twice)}{which} is given twice")
    entry.pop("segmentation", None)
    return entry


def _read_categories(entries: list[Entry], source: Path) -> dict[Id, str]:
    """Category id -> name, by rising id, text after numbers."""
    categories: dict[Id, str] = {}
    for index, entry in enumerate(entries):
        category_id = own_id(entry.get("id"), f"{source}: id of categories[{index}]")
        name = entry.get("name")
        if not is_text(name):
            raise DataError(
                f"{source}: name of category {short(category_id)} must be text, but is {short(name)}: correct it"
            )
        if category_id in categories:
            raise DataError(
                f"{source}: category id {short(category_id)} is listed twice: give each category its own id"
            )
        categories[category_id] = name
    if not categories:
        raise DataError(f"{source} lists no categories, so no box has a class: list them")
    return dict(sorted(categories.items(), key=lambda item: (isinstance(item[0], str), item[0])))


def _read_images(entries: list[Entry], source: Path) -> tuple[list[Id], list[Any], list[tuple[int, int] | None]]:
    """Ids, file names, and (height, width), None where an entry gives neither."""
    sizes: dict[Id, tuple[int, int] | None] = {}
    names = []
    for index, entry in enumerate(entries):
        image_id = own_id(entry.get("id"), f"{source}: id of images[{index}]")
        where = f"{source}: image {short(image_id)}"
        if image_id in sizes:
            raise DataError(f"{where} is listed twice: give each image its own id")
        sizes[image_id] = None
        if entry.get("height") is not None or entry.get("width") is not None:
            height = side(entry.get("height"), f"{where}: height")
            sizes[image_id] = height, side(entry.get("width"), f"{where}: width")
        names.append(entry.get("file_name"))
    if not names:
        raise DataError(f"{source} is empty: it lists no images")
    return list(sizes), names, list(sizes.values())


def _read_boxes(
    entries: list[Entry], position: dict[Id, int], names: list[str], categories: dict[Id, str], source: Path
) -> list[Row]:
    """Every annotation, of whatever category."""
    rows: list[Row] = []
    seen: set[Id] = set()
    for index, entry in enumerate(entries):
        try:
            row = _read_box(entry, position, categories)
            if row[0] in seen:
                raise DataError("its id is listed twice: give each annotation its own id")
        except DataError as error:
            annotation_id, image_id = entry.get("id"), entry.get("image_id")
            name = (
                f"annotation {short(annotation_id)}" if type(annotation_id) in (int, str) else f"annotations[{index}]"
            )
            if type(image_id) in (int, str) and image_id in position:
                name += f" of {names[position[image_id]]}"
            raise DataError(f"{source}: {name}: {error}") from None
        seen.add(row[0])
        rows.append(row)
    return rows


def _read_box(entry: Entry, position: dict[Id, int], categories: dict[Id, str]) -> Row:
    """The caller puts the annotation's name before the errors; made for each of COCO's 860k, it would take a second."""
    annotation_id = own_id(entry.get("id"), "id")
    image_id = own_id(entry.get("image_id"), "image_id")
    if image_id not in position:
        raise DataError(f"image_id {short(image_id)} is not among the images: list the image or remove the annotation")
    category_id = own_id(entry.get("category_id"), "category_id")
    if category_id not in categories:
        raise DataError(
            f"category_id {short(category_id)} is not among the categories: list it or correct the annotation"
        )
    bbox = entry.get("bbox")
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(is_finite_number, bbox)):
        raise DataError(f"bbox must be a list of four finite numbers, but is {short(bbox)}: correct or remove it")
    if bbox[2] < 0 or bbox[3] < 0:
        raise DataError(f"bbox is inverted, {bbox} has a negative width or height: correct or remove it")
    area = entry.get("area", bbox[2] * bbox[3])
    if not is_finite_number(area) or area < 0:
        raise DataError(f"area must be a finite number of at least 0, but is {short(area)}: correct it")
    crowd = entry.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise DataError(f"iscrowd must be 0 or 1, but is {short(crowd)}: correct it")
    return annotation_id, image_id, category_id, bbox, area, bool(crowd)
