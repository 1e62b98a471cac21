"""PASCAL VOC's layout: root/JPEGImages, root/Annotations/*.xml and root/ImageSets/Main/<split>.txt."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element, ParseError

import numpy as np
from defusedxml import ElementTree

from msil.data.annotations import AnnotatedImages, Annotations, Classes
from msil.data.audit import check_classes, check_images, check_inside, inner_name, is_finite_number, is_text, short
from msil.errors import DataError, typed

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".JPG", ".JPEG", ".PNG")
SIDES = ("xmin", "ymin", "xmax", "ymax")
LARGEST_XML = 8 * 2**20  # bytes, some 40,000 objects; parsed, a file takes ten times its size of memory


class VOCDataset(AnnotatedImages):
    """A split of a VOC data set: one image name a line in root/ImageSets/Main/split.txt, without extension; the image
    root/JPEGImages/name.jpg (or another usual extension) and its boxes root/Annotations/name.xml.

    VOC counts pixels from 1 and xmax, ymax are the last pixels inside, so a box is read as
        x1 = xmin - 1, y1 = ymin - 1, x2 = xmax, y2 = ymax
    (a box over a whole 640 x 480 image, 1 1 640 480, becomes 0 0 640 480). xmax = xmin or ymax = ymin, one pixel by
    that convention, is a slip of the hand in practice: it counts as a box of zero size and is dropped.

    classes: see Annotations.of_classes; None: the 20 of VOC, and an object of any other class is refused.
    image ids: the line's number among the split's names, from 1. category_ids: label + 1.
    Read: size (may be missing or 0, otherwise compared with the file, EXIF as in CocoDataset), object/name, bndbox,
        difficult (default 0). The xml's own filename, stale in many sets, is not. Difficult objects are trained on, but
        neither to be found nor wrong to find.
    strict: refuse boxes that would be clipped, dropped or left out of training (see msil.data.audit).

    Raises DataError, naming file and object, for whatever is missing or malformed, also of the image files. Warns once
    (DataWarning) about mended boxes.
    """

    def __init__(self, root: str | Path, split: str, *, classes: Classes | None = None, strict: bool = False) -> None:
        super().__init__(read_voc(Path(root), split, classes), strict)


class _Object(NamedTuple):
    name: str
    xywh: list[float]
    difficult: bool


class _Record(NamedTuple):
    """One annotation file. size: (height, width), or None where it gives none."""

    file: Path
    size: tuple[int, int] | None
    objects: list[_Object]


def read_voc(root: Path, split: str, classes: Classes | None = None, *, complete: bool = False) -> Annotations:
    """See VOCDataset, and Annotations.of_classes; the boxes are not audited yet. No file lists all classes, so those of
    `classes` without an object are not missing."""
    check_classes(classes)
    source = _locate(root, split)
    stems = _read_split(source)
    files = [root / "Annotations" / f"{stem}.xml" for stem in stems]
    check_inside(files, root / "Annotations", root)
    records = [_read_xml(file) for file in files]
    if classes is None:
        _check_names(records, VOC_CLASSES)
        names = VOC_CLASSES
    else:
        names = tuple(sorted({found.name for record in records for found in record.objects}))

    folder = root / "JPEGImages"
    file_names = [_image_name(folder, stem) for stem in stems]
    sizes, where = [record.size for record in records], list(map(str, files))
    read_as = check_images([folder / name for name in file_names], folder, root, sizes, where)

    label_of = {name: label for label, name in enumerate(names)}
    counts = [len(record.objects) for record in records]
    objects = [found for record in records for found in record.objects]
    boxes = np.array([found.xywh for found in objects], dtype=np.float64).reshape(-1, 4)
    found = Annotations(
        root=root,
        source=source,
        classes=names,
        category_ids=tuple(range(1, len(names) + 1)),
        image_ids=np.arange(1, len(stems) + 1),
        file_names=[f"JPEGImages/{name}" for name in file_names],
        sizes=read_as[0],
        orientations=read_as[1],
        truth_images=np.repeat(np.arange(len(stems)), counts),
        truth_ids=np.array([number for count in counts for number in range(1, count + 1)], dtype=np.int64),
        truth_boxes=boxes,
        truth_labels=np.array([label_of[found.name] for found in objects], dtype=np.int64),
        truth_areas=boxes[:, 2] * boxes[:, 3],
        truth_ignored=np.array([found.difficult for found in objects], dtype=bool),
        unit="object",
        train_on_ignored=True,
    )
    if classes is None:
        return found
    chosen = found.of_classes(classes, complete=complete)
    return replace(chosen, category_ids=tuple(range(1, len(chosen.classes) + 1)))


def voc_files(root: Path, split: str) -> tuple[list[Path], list[Path]]:
    """A split's list and annotation files, and its image files."""
    source = _locate(root, split)
    stems = _read_split(source)
    folder = root / "JPEGImages"
    annotations = [root / "Annotations" / f"{stem}.xml" for stem in stems]
    return [source, *annotations], [folder / _image_name(folder, stem) for stem in stems]


def voc_classes(root: Path, split: str) -> list[str]:
    """The classes that a split's objects are of, sorted. Raises DataError as `read_voc` does."""
    (_, *files), _ = voc_files(root, split)
    check_inside(files, root / "Annotations", root)
    return sorted({found.name for file in files for found in _read_xml(file).objects})


def _locate(root: Path, split: str) -> Path:
    """The split's list of names."""
    source = root / "ImageSets" / "Main" / f"{split}.txt"
    layout = "VOC's layout is <data.root>/JPEGImages, <data.root>/Annotations and <data.root>/ImageSets/Main"
    if not root.is_dir():
        raise DataError(f"the data set's folder {root} does not exist: put it there or set data.root; {layout}")
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        if not (root / part).is_dir():
            raise DataError(
                f"folder {root / part} is missing: put it there, or set data.root to the folder that holds it "
                f"(such as VOCdevkit/VOC2012); {layout}"
            )
    if not source.is_file():
        there = ", ".join(sorted(path.stem for path in source.parent.glob("*.txt"))[:10]) or "none"
        raise DataError(
            f"split file {source} is missing (there: {there}): name another split or put it there; {layout}"
        )
    return source


def _read_split(source: Path) -> list[str]:
    try:
        lines = source.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"split file {source} cannot be read ({error}): replace it with a list of names") from None
    stems: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not (stem := line.strip()):
            continue
        inner_name(stem, f"{source}: line {number}")
        if stem in stems:
            raise DataError(f"{source}: {stem!r} stands in line {stems[stem]} and in line {number}: name it once")
        stems[stem] = number
    if not stems:
        raise DataError(f"{source} is empty: it names no images")
    return list(stems)


def _image_name(folder: Path, stem: str) -> str:
    """The name with the extension that is there; .jpg, which the audit then misses, if none is."""
    # os.path's: the method of a Path raises where a name is too long
    found = (f"{stem}{extension}" for extension in EXTENSIONS if os.path.isfile(folder / f"{stem}{extension}"))
    return next(found, f"{stem}.jpg")


def _read_xml(file: Path) -> _Record:
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would block
            raise DataError(f"{file} is not a regular file: put the annotation there or take its name out of the split")
        if status.st_size > LARGEST_XML:
            raise DataError(
                f"{file} is {status.st_size / 2**20:.0f} MB large, more than the {LARGEST_XML / 2**20:.0f} MB that an "
                "annotation file may have: replace it with an intact copy"
            )
        tree = ElementTree.parse(file).getroot()
    except FileNotFoundError:
        raise DataError(f"annotation file {file} is missing: put it there or take its name out of the split") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from None
    # ValueError: defusedxml's refusals of entities and DTDs are ones; LookupError: an unknown encoding
    except (ParseError, ValueError, LookupError) as error:
        raise DataError(f"{file} is not safe and valid xml ({error}): replace it with an intact copy") from None
    if tree is None or tree.tag != "annotation":
        raise DataError(f"{file} must be a VOC file, with <annotation> outermost, but is not: replace it")
    elements = enumerate(tree.findall("object"), start=1)
    objects = [_read_object(element, f"{file}: object {number}") for number, element in elements]
    return _Record(file, _read_size(tree, str(file)), objects)


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
    try:
        value = float("nan" if "_" in text else text)  # float takes 1_0 for 10
    except ValueError:
        value = float("nan")
    if not is_finite_number(value):
        raise DataError(f"{where}: {tag} must be a finite number, but is {short(text)}: correct it")
    return value


def _check_names(records: list[_Record], classes: tuple[str, ...]) -> None:
    """Refuses an object of an unlisted class, naming a list that holds every class of the split."""
    for record in records:
        for number, found in enumerate(record.objects, start=1):
            if found.name not in classes:
                every = {item.name for other in records for item in other.objects}
                needed = [name for name in classes if name in every] + sorted(every - set(classes))
                raise DataError(
                    f"{record.file}: object {number} is of class {short(found.name)}, which data.classes does not "
                    f"list; to read all that this split holds, set {typed('data.classes', needed)}"
                )
