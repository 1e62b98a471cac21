"""COCO json and VOC xml spoiled at random: each loads to what the spoiled file itself says, or ends in an error of ours
that names file and entry. Never another exception, a hang, or a box under another class's name."""

from __future__ import annotations

import copy
import json
import math
import re
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from msil.data.annotations import AnnotatedImages
from msil.data.audit import short
from msil.errors import UserError

from . import mutations
from .files import boxes_of, coco_content, read_coco, read_voc, voc_object, voc_xml, write_coco, write_voc

TRIED = 500  # of each layout
SECONDS = 5.0  # an example may take; it takes some 2 ms
WIDTH, HEIGHT = 40, 30  # of every image
CLASSES = ("cat", "dog", "zebra")

CHOICE = st.integers(0, 10**6)
THOROUGH = settings(
    max_examples=TRIED, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)

Corners = tuple[float, float, float, float]
Box = tuple[str, str, Corners]  # file, class, x1 y1 x2 y2


class Hangs(BaseException):
    """Not caught by any `except Exception`."""


def outcome(load: Callable[[], AnnotatedImages]) -> AnnotatedImages | str:
    """The data set, or the sentence that refuses it; any other exception, and a hang, fail the test by themselves."""

    def stop(*_: Any) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load()
    except UserError as error:
        assert len(str(error).splitlines()) == 1
        return str(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def clipped(box: Corners) -> Corners:
    x1, y1, x2, y2 = box
    return max(x1, 0.0), max(y1, 0.0), min(x2, float(WIDTH)), min(y2, float(HEIGHT))


def shorter_side(box: Corners) -> float:
    return min(box[2] - box[0], box[3] - box[1])


def usable(box: Corners) -> bool:
    return shorter_side(box) > 0 and shorter_side(clipped(box)) > 0


def check_loaded(dataset: AnnotatedImages, scored: list[Box], trained: list[Box]) -> None:
    """scored, trained: what the file says is to be scored against, and trained on, by image and in its order."""
    files = [name.partition("/")[2] for name in dataset.annotations.file_names]
    file_of = dict(zip(dataset.annotations.image_ids.tolist(), files, strict=True))
    found = boxes_of(dataset)
    same([(file_of[image_id], name, (x, y, x + w, y + h)) for image_id, name, (x, y, w, h), *_ in found], scored)
    seen: list[Box] = []
    for index in range(len(dataset)):
        image, target = dataset[index]
        assert tuple(image.shape) == (3, HEIGHT, WIDTH)
        for box, label in zip(target.boxes.tolist(), target.labels.tolist(), strict=True):
            assert 0 <= box[0] < box[2] <= WIDTH and 0 <= box[1] < box[3] <= HEIGHT
            seen.append((files[index], dataset.classes[label], tuple(box)))
    same(seen, [(file, name, clipped(box)) for file, name, box in trained])


def same(ours: list[Box], theirs: list[Box]) -> None:
    assert [box[:2] for box in ours] == [box[:2] for box in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-4) for a, b in zip(one[2], other[2], strict=True))


def changes_of(kinds: tuple[Any, ...]) -> Any:
    return st.lists(st.tuples(st.sampled_from(kinds), CHOICE, CHOICE), min_size=1, max_size=3)


def bytewise_of(*kinds: mutations.Bytes) -> Any:
    return st.sampled_from((None, None, None, None, mutations.truncate, mutations.flip, mutations.nest, *kinds))


# COCO


def coco_says(content: dict[str, Any]) -> tuple[list[Box], list[Box]]:
    """What an accepted file says, worked out without arrays, labels or the reader's code."""
    names = {category["id"]: category["name"] for category in content["categories"]}
    assert len(names) == len(content["categories"])
    scored, trained = [], []
    for image in content["images"]:
        for entry in content["annotations"]:
            x, y, width, height = entry["bbox"]
            box = (x, y, x + width, y + height)
            if entry["image_id"] != image["id"] or not usable(box):
                continue
            scored.append((image["file_name"], names[entry["category_id"]], box))
            large = shorter_side(clipped(box)) >= 1 and entry.get("area", width * height) > 0
            if large and not entry.get("iscrowd", 0):
                trained.append(scored[-1])
    return scored, trained


# What is wrong with the file as a whole; every other error must name an entry of it. An image file that is at fault is
# named by its path.
COCO_AS_A_WHOLE = re.compile(
    "is not valid json|must be a json object with a list|is empty|lists no (categories|annotations)|holds no usable|"
    "categories are called"
)
COCO_ENTRIES = {
    "annotation": "annotations", "image": "images", "category": "categories", "category id": "categories",
}  # fmt: skip


def check_coco_sentence(sentence: str, source: Path) -> None:
    assert str(source.parents[1]) in sentence
    if sentence.startswith("image file ") or COCO_AS_A_WHOLE.search(sentence):
        return
    assert str(source) in sentence
    content = json.loads(source.read_bytes())
    entries = {key: content[key] for key in ("annotations", "images", "categories")}
    names = [f"{key}[{position}]" for key in entries for position in range(len(entries[key]))]
    for kind, key in COCO_ENTRIES.items():
        ids = [entry.get("id") for entry in entries[key] if isinstance(entry, dict)]
        whole = [int(own) if isinstance(own, float) and own.is_integer() else own for own in ids]
        names += [f"{kind} {short(own)}" for own in whole]
    assert any(re.search(rf"{re.escape(name)}(?!\d)", sentence) for name in names), sentence


def test_spoiled_coco_json_loads_rightly_or_is_refused_by_name(tmp_path: Path) -> None:
    source = write_coco(tmp_path, coco_content())
    counts = {"loaded": 0, "refused": 0}

    @THOROUGH
    @given(changes_of(mutations.JSON_CHANGES), bytewise_of(mutations.key_twice), CHOICE)
    def spoiled(changes: list[Any], bytewise: mutations.Bytes | None, how: int) -> None:
        content = copy.deepcopy(coco_content())
        for change, where, value in changes if bytewise is None else ():
            change(content, where, value)
        text = json.dumps(content).encode()
        source.write_bytes(text if bytewise is None else bytewise(text, how))
        result = outcome(lambda: read_coco(tmp_path, "train"))
        counts["refused" if isinstance(result, str) else "loaded"] += 1
        if isinstance(result, str):
            check_coco_sentence(result, source)
        else:
            content = json.loads(source.read_bytes())
            names = {category["id"]: category["name"] for category in content["categories"]}
            assert result.classes == tuple(names[number] for number in sorted(names))
            check_loaded(result, *coco_says(content))

    spoiled()
    assert min(counts.values()) >= TRIED // 20, "both ends should be met often"


# VOC


def voc_says(folder: Path, names: list[str]) -> list[Box]:
    """As coco_says; VOC counts pixels from 1, and xmax, ymax are inside."""
    boxes = []
    for name in names:
        for element in ElementTree.parse(folder / f"{name}.xml").getroot().findall("object"):
            (label,) = ["".join(found.itertext()).strip() for found in element.findall("name")]
            (bndbox,) = element.findall("bndbox")
            ((xmin,), (ymin,), (xmax,), (ymax,)) = (
                [float("".join(found.itertext())) for found in bndbox.findall(side)]
                for side in ("xmin", "ymin", "xmax", "ymax")
            )
            x1, y1 = xmin - 1, ymin - 1
            box = (x1, y1, x1 + (xmax - x1), y1 + (ymax - y1))  # a box is kept as x y width height, which may round
            if xmax > xmin and ymax > ymin and usable(box):
                boxes.append((f"{name}.jpg", label, box))
    return boxes


VOC_AS_A_WHOLE = re.compile(
    "is not safe and valid xml|must be a VOC file|size must be in whole|says width|is empty|elements size"
    r"|: (height|width) must|elements (height|width)"
)


def check_voc_sentence(sentence: str, folder: Path) -> None:
    if "train.txt holds no " in sentence:  # not a usable box in either file
        return
    file = next(path for path in folder.iterdir() if str(path) in sentence)
    if VOC_AS_A_WHOLE.search(sentence):
        return
    named = re.search(r"object (\d+)", sentence)
    assert named is not None, sentence
    assert 1 <= int(named.group(1)) <= len(ElementTree.parse(file).getroot().findall("object"))


def test_spoiled_voc_xml_loads_rightly_or_is_refused_by_name(tmp_path: Path) -> None:
    sound = voc_xml(
        voc_object("cat", 1, 2, 11, 21), voc_object("zebra", 5.5, 6, 40, 30, "<difficult>1</difficult>"),
        voc_object("dog", 20, 10, 35, 25, "<part><name>head</name><bndbox/></part>"),
    )  # fmt: skip
    write_voc(tmp_path, {"a": sound, "b": voc_xml(voc_object("dog", 3, 3, 20, 20))})
    folder = tmp_path / "Annotations"
    counts = {"loaded": 0, "refused": 0}

    @THOROUGH
    @given(changes_of(mutations.XML_CHANGES), bytewise_of(), CHOICE)
    def spoiled(changes: list[Any], bytewise: mutations.Bytes | None, how: int) -> None:
        tree = ElementTree.fromstring(sound)
        for change, where, value in changes if bytewise is None else ():
            change(tree, where, value)
        text = ElementTree.tostring(tree, encoding="unicode").encode("utf-8", "surrogatepass")
        (folder / "a.xml").write_bytes(text if bytewise is None else bytewise(text, how))
        result = outcome(lambda: read_voc(tmp_path, "train", classes=CLASSES))
        counts["refused" if isinstance(result, str) else "loaded"] += 1
        if isinstance(result, str):
            check_voc_sentence(result, folder)
        else:
            assert result.classes == CLASSES
            boxes = [box for box in voc_says(folder, ["a", "b"]) if box[1] in CLASSES]  # others are left out
            check_loaded(result, boxes, [box for box in boxes if shorter_side(clipped(box[2])) >= 1])

    spoiled()
    assert min(counts.values()) >= TRIED // 20, "both ends should be met often"
