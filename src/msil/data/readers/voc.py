"""PASCAL VOC's layout: root/JPEGImages, root/Annotations/*.xml and root/ImageSets/Main/<split>.txt; and folders of its
xml files without lists of splits, as labelImg leaves them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element, ParseError

import numpy as np
from defusedxml import ElementTree

from msil.data.annotations import Annotations
from msil.data.audit import (
    all_sound,
    check_images,
    check_inside,
    finite_number,
    inner_name,
    is_text,
    short,
    tried,
    warn,
)  # fmt: skip
from msil.data.readers.files import (
    IMAGES,
    LARGEST_LIST,
    Listings,
    MissingSplit,
    images_below,
    names_in,
    read_file,
    read_text,
)
from msil.errors import DataError, counted, listed, typed

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

SIDES = ("xmin", "ymin", "xmax", "ymax")


class _Object(NamedTuple):
    name: str
    xywh: list[float]
    difficult: bool


@dataclass(frozen=True)
class XmlSplit:
    """A split of one xml file an image. source: the list of names, or the folder of the xml files.
    xmls, images: of each image, below xml_folder and image_folder. names: all classes that there may be, or None.
    left_out: images without an xml file, or in a folder of image_folder, for a warning.

    VOC counts pixels from 1 and xmax, ymax are the last pixels inside, so a box is read as
        x1 = xmin - 1, y1 = ymin - 1, x2 = xmax, y2 = ymax
    (a box over a whole 640 x 480 image, 1 1 640 480, becomes 0 0 640 480). xmax = xmin or ymax = ymin, one pixel by
    that convention, is a slip of the hand in practice: it counts as a box of zero size and is dropped.

    Read: size (may be missing or 0, otherwise compared with the file, EXIF as in JsonSplit), object/name, bndbox,
    difficult (default 0). The xml's own filename, stale in many sets, is not. Difficult objects are trained on, but
    neither to be found nor wrong to find. Image ids: places in the list, from 1. category_ids: label + 1.
    """

    layout: str
    root: Path
    source: Path
    xml_folder: Path
    image_folder: Path
    xmls: list[Path]
    images: list[Path]
    names: tuple[str, ...] | None = None
    left_out: Sequence[str] = ()

    def read(self) -> Annotations:
        if deeper := [name for name in self.left_out if "/" in name]:
            folders = listed(sorted({name.partition("/")[0] + "/" for name in deeper}), 3)
            what = f"folders below are not read, {counted(len(deeper), 'image')} in {folders}"
            warn(self.image_folder, f"{what}: put them, and their xml files, beside the others")
        if beside := [name for name in self.left_out if "/" not in name]:
            what = f"{counted(len(beside), 'image')} without an xml file left out"
            warn(self.image_folder, f"{what}: {listed(beside, 3)}")
        check_inside(self.xmls, self.xml_folder, self.root)
        records = all_sound([tried(_read_xml, file) for file in self.xmls], "xml files")
        if self.names is not None:
            self._check_names([own for _, own in records], self.names)
        objects = [found for _, own in records for found in own]
        names = self.names or tuple(sorted({found.name for found in objects}))
        sizes, where = [size for size, _ in records], list(map(str, self.xmls))
        read_as = check_images(self.images, self.image_folder, self.root, sizes, where)
        if not names:
            raise DataError(f"{self.source} holds no boxes: not one of the xml files has an object; add some")

        label_of = {name: label for label, name in enumerate(names)}
        counts = [len(own) for _, own in records]
        boxes = np.array([found.xywh for found in objects], dtype=np.float64).reshape(-1, 4)
        return Annotations(
            root=self.root,
            source=self.source,
            classes=names,
            category_ids=tuple(range(1, len(names) + 1)),
            image_ids=np.arange(1, len(records) + 1),
            file_names=[image.relative_to(self.root).as_posix() for image in self.images],
            sizes=read_as[0],
            orientations=read_as[1],
            truth_images=np.repeat(np.arange(len(records)), counts),
            truth_ids=np.array([number for count in counts for number in range(1, count + 1)], dtype=np.int64),
            truth_boxes=boxes,
            truth_labels=np.array([label_of[found.name] for found in objects], dtype=np.int64),
            truth_areas=boxes[:, 2] * boxes[:, 3],
            truth_ignored=np.array([found.difficult for found in objects], dtype=bool),
            unit="object",
            train_on_ignored=True,
            layout=self.layout,
            numbered=True,
        )

    def _check_names(self, objects: list[list[_Object]], classes: tuple[str, ...]) -> None:
        """Refuses an object of an unlisted class, naming a list that holds every class of the split."""
        every = {found.name for own in objects for found in own}
        needed = [name for name in classes if name in every] + sorted(every - set(classes))
        for file, own in zip(self.xmls, objects, strict=True):
            for number, found in enumerate(own, start=1):
                if found.name not in classes:
                    raise DataError(
                        f"{file}: object {number} is of class {short(found.name)}, which data.classes does not list; "
                        f"to read all that this split holds, set {typed('data.classes', needed)}"
                    )

    def files(self) -> tuple[list[Path], list[Path]]:
        return [*([self.source] if self.source.is_file() else []), *self.xmls], self.images


def voc_splits(root: Path) -> list[str]:
    """Names of the lists in ImageSets/Main, those of one class, cat_train beside train, left out."""
    names = sorted(path.stem for path in root.glob("ImageSets/Main/*.txt"))
    return [name for name in names if not any(name.endswith(f"_{other}") for other in names)]


def locate_voc(root: Path, split: str, names: tuple[str, ...] | None = None) -> XmlSplit:
    """names: all classes that there may be; None: those that the split has."""
    layout = "VOC's layout is <data.root>/JPEGImages, <data.root>/Annotations and <data.root>/ImageSets/Main"
    if not root.is_dir():
        raise DataError(f"the data set's folder {root} does not exist: put it there or set data.root; {layout}")
    xml_folder, image_folder, lists = root / "Annotations", root / "JPEGImages", root / "ImageSets/Main"
    for folder in (image_folder, xml_folder, lists):
        if not folder.is_dir():
            raise DataError(
                f"folder {folder} is missing: put it there, set data.root to the folder that holds it (such as "
                f"VOCdevkit/VOC2012), or data=auto, which reads xml files without lists of splits; {layout}"
            )
    source = lists / f"{split}.txt"
    if not source.is_file():
        there = voc_splits(root)
        raise MissingSplit(
            f"split file {source} is missing (there: {listed(there, 10) or 'none'}): name another split, or put it "
            f"there; {layout}",
            there,
        )
    listings = Listings()
    stems = _read_split(source, xml_folder, listings)
    xmls = [xml_folder / (listings.find(xml_folder, stem, (".xml",)) or f"{stem}.xml") for stem in stems]
    images = [image_folder / (listings.find(image_folder, stem, IMAGES) or f"{stem}.jpg") for stem in stems]
    return XmlSplit("VOC xml with lists of splits", root, source, xml_folder, image_folder, xmls, images, names)


def xml_splits(root: Path) -> list[str]:
    """Folders train, valid, ... with xml files beside images, as Roboflow's VOC export has; else "all", where root
    itself, or its folder Annotations or annotations, has xml files."""
    folders = sorted(path.name for path in root.glob("*/") if names_in(path, (".xml",)))
    splits = [name for name in folders if name.lower().startswith(("train", "val", "test"))]
    beside = [name for name in splits if names_in(root / name, IMAGES)]
    return beside or (["all"] if names_in(root, (".xml",)) or {"Annotations", "annotations"} & {*folders} else [])


def locate_xml(root: Path, split: str) -> XmlSplit:
    """A split of `xml_splits`: every xml file there, with its image beside it, in JPEGImages or in images."""
    places = [root, root / "Annotations", root / "annotations"] if split == "all" else [root / split]
    xml_folder = next((folder for folder in places if names_in(folder, (".xml",))), places[0])
    places = [xml_folder, root / "JPEGImages", root / "images"]
    image_folder = next((folder for folder in places if names_in(folder, IMAGES)), places[0])
    listings = Listings()
    names = names_in(xml_folder, (".xml",))
    stems = [os.path.splitext(name)[0] for name in names]
    images = [listings.find(image_folder, stem, IMAGES) or f"{stem}.jpg" for stem in stems]
    return XmlSplit(
        "VOC xml without lists of splits",
        root,
        xml_folder,
        xml_folder,
        image_folder,
        [xml_folder / name for name in names],
        [image_folder / name for name in images],
        left_out=sorted({*images_below(image_folder)} - {*images}),
    )


def _read_split(source: Path, xml_folder: Path, listings: Listings) -> list[str]:
    """The names, without an image's ending or the second column of a list of one class, whose -1 leaves an image out;
    neither is taken from a name that is an xml file's as it stands."""
    stems: dict[str, int] = {}
    lines = read_text(source, "list of names", LARGEST_LIST).splitlines()
    for number, line in enumerate(lines, start=1):
        if not (stem := line.strip()):
            continue
        column = []
        if listings.find(xml_folder, stem, (".xml",)) is None:
            name, *column = stem.rsplit(None, 1)
            if column in (["1"], ["0"], ["-1"]):
                stem = name
            if stem.lower().endswith(IMAGES):
                stem = os.path.splitext(stem)[0]
        inner_name(stem, f"{source}: line {number}")
        if stem in stems:
            raise DataError(f"{source}: {stem!r} stands in line {stems[stem]} and in line {number}: name it once")
        if column != ["-1"]:
            stems[stem] = number
    if not stems:
        raise DataError(f"{source} is empty: it names no images")
    return list(stems)


def _read_xml(file: Path) -> tuple[tuple[int, int] | None, list[_Object]]:
    """(height, width), or None where the file gives none, and its objects."""
    content = read_file(file, "annotation file")
    try:
        tree = ElementTree.fromstring(content)
    # ValueError: defusedxml's refusals of entities and DTDs are ones; LookupError: an unknown encoding
    except (ParseError, ValueError, LookupError) as error:
        raise DataError(f"{file} is not safe and valid xml ({error}): replace it with an intact copy") from None
    if tree.tag != "annotation":
        raise DataError(f"{file} must be a VOC file, with <annotation> outermost, but is not: replace it")
    elements = enumerate(tree.findall("object"), start=1)
    objects = [_read_object(element, f"{file}: object {number}") for number, element in elements]
    return _read_size(tree, str(file)), objects


def _read_size(tree: Element, where: str) -> tuple[int, int] | None:
    """(height, width), or None where the file gives none: labelling tools leave it out, or write 0."""
    size = _child(tree, "size", where)
    if size is None:
        return None
    height, width = _number(size, "height", where), _number(size, "width", where)
    if height == width == 0:
        return None
    if height < 1 or width < 1 or height != int(height) or width != int(width):
        raise DataError(f"{where}: size must be in whole pixels, but is {width:g} x {height:g}: correct it")
    return int(height), int(width)


def _read_object(element: Element, where: str) -> _Object:
    name = _text(element, "name", where)
    if not name:
        raise DataError(f"{where} has no name: add its class")
    if not is_text(name):
        raise DataError(f"{where} has the name {short(name)}, which is not one line of text: correct it")
    where += f" ({name})"
    bndbox = _child(element, "bndbox", where)
    if bndbox is None:
        raise DataError(f"{where} has no bndbox: add or remove it")
    xmin, ymin, xmax, ymax = (_number(bndbox, side, where) for side in SIDES)
    if xmax < xmin or ymax < ymin:
        raise DataError(
            f"{where} is inverted, xmin {xmin:g} ymin {ymin:g} xmax {xmax:g} ymax {ymax:g}: correct or remove it"
        )
    width = xmax - xmin + 1 if xmax > xmin else 0.0
    height = ymax - ymin + 1 if ymax > ymin else 0.0
    difficult = _text(element, "difficult", where) or "0"
    if difficult not in ("0", "1"):
        raise DataError(f"{where}: difficult must be 0 or 1, but is {short(difficult)}: correct it")
    return _Object(name, [xmin - 1, ymin - 1, width, height], difficult == "1")


def _child(parent: Element, tag: str, where: str) -> Element | None:
    """The one child of that tag, or None. Raises DataError where there are several."""
    found = parent.findall(tag)
    if len(found) > 1:
        raise DataError(f"{where} has {len(found)} elements {tag}: keep the right one")
    return found[0] if found else None


def _text(parent: Element, tag: str, where: str) -> str:
    """What the child of that tag holds, blanks around it left out; '' where there is none or it is empty."""
    child = _child(parent, tag, where)
    if child is None:
        return ""
    if len(child):
        raise DataError(f"{where}: {tag} must hold text alone, but holds an element {short(child[0].tag)}: correct it")
    return (child.text or "").strip()


def _number(parent: Element, tag: str, where: str) -> float:
    text = _text(parent, tag, where)
    value = finite_number(text)
    if value is None:
        raise DataError(f"{where}: {tag} must be a finite number, but is {short(text)}: correct it")
    return value
