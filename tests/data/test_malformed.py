"""COCO json and VOC xml spoiled in thousands of ways: each loads to what the spoiled file itself says, or ends in an
error of ours that names file and entry. Never another exception, a hang, or a box under another class's name."""

from __future__ import annotations

import copy
import json
import math
import re
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from xml.etree import ElementTree

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from msil.data.annotations import AnnotatedImages
from msil.data.coco import CocoDataset
from msil.data.voc import VOCDataset
from msil.errors import UserError

from . import mutations
from .files import boxes_of, coco_content, voc_object, voc_xml, write_coco, write_voc

TRIED = 500  # of each layout
SECONDS = 5.0  # an example may take; it takes some 2 ms
WIDTH, HEIGHT = 40, 30  # of every image
CLASSES = ("cat", "dog", "zebra")

CHOICE = st.integers(0, 10**6)
THOROUGH = settings(
    max_examples=TRIED, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)

Box = tuple[str, str, tuple[float, ...]]  # file or image, class, x1 y1 x2 y2


class Hangs(BaseException):
    """Not caught by any `except Exception`."""


@contextmanager
def deadline() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(load: Callable[[], AnnotatedImages]) -> AnnotatedImages | str:
    """The data set, or the sentence that refuses it; any other exception fails the test by itself."""
    with warnings.catch_warnings(), deadline():
        warnings.simplefilter("ignore")
        try:
            return load()
        except UserError as error:
            return str(error)


def clipped(box: tuple[float, ...]) -> tuple[float, ...]:
    x1, y1, x2, y2 = box
    return max(x1, 0.0), max(y1, 0.0), min(x2, float(WIDTH)), min(y2, float(HEIGHT))


def overlaps(box: tuple[float, ...]) -> bool:
    x1, y1, x2, y2 = clipped(box)
    return x2 > x1 and y2 > y1 and box[2] > box[0] and box[3] > box[1]


def check_loaded(dataset: AnnotatedImages, scored: list[Box], trained: list[Box]) -> None:
    """scored, trained: what the file says is to be scored against, and trained on, by image and in its order."""
    file_of = dict(zip(dataset.annotations.image_ids.tolist(), dataset.annotations.file_names, strict=True))
    file_of = {image_id: name.partition("/")[2] for image_id, name in file_of.items()}
    found = [(file_of[image_id], name, corners(xywh)) for image_id, name, xywh, *_ in boxes_of(dataset)]
    assert [box[:2] for box in found] == [box[:2] for box in scored]
    assert all(near(ours[2], theirs[2]) for ours, theirs in zip(found, scored, strict=True))
    seen: list[Box] = []
    for index in range(len(dataset)):
        image, target = dataset[index]
        assert tuple(image.shape) == (3, HEIGHT, WIDTH)
        for box, label in zip(target.boxes.tolist(), target.labels.tolist(), strict=True):
            assert all(map(math.isfinite, box))
            assert 0 <= box[0] < box[2] <= WIDTH
            assert 0 <= box[1] < box[3] <= HEIGHT
            assert 0 <= label < len(dataset.classes)
            seen.append((file_of[dataset.image_id(index)], dataset.classes[label], tuple(box)))
    assert [box[:2] for box in seen] == [box[:2] for box in trained]
    assert all(near(ours[2], clipped(theirs[2])) for ours, theirs in zip(seen, trained, strict=True))


def corners(xywh: list[float]) -> tuple[float, ...]:
    return xywh[0], xywh[1], xywh[0] + xywh[2], xywh[1] + xywh[3]


def near(ours: tuple[float, ...], theirs: tuple[float, ...]) -> bool:
    return all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-4) for a, b in zip(ours, theirs, strict=True))


# COCO


def coco_says(content: dict[str, Any]) -> tuple[list[Box], list[Box]]:
    """What an accepted file says, worked out without arrays, labels or the reader's code."""
    names = {category["id"]: category["name"] for category in content["categories"]}
    assert len(names) == len(content["categories"])
    scored, trained = [], []
    for image in content["images"]:
        for entry in content["annotations"]:
            if entry["image_id"] != image["id"]:
                continue
            x, y, width, height = entry["bbox"]
            box = (image["file_name"], names[entry["category_id"]], (x, y, x + width, y + height))
            if not overlaps(box[2]):
                continue
            scored.append(box)
            x1, y1, x2, y2 = clipped(box[2])
            large = x2 - x1 >= 1 and y2 - y1 >= 1 and entry.get("area", width * height) > 0
            if large and not entry.get("iscrowd", 0):
                trained.append(box)
    return scored, trained


# What is wrong with the file as a whole; every other error must name an entry of it.
COCO_AS_A_WHOLE = re.compile("is not valid json|must be a json object with a list|is empty|lists no categories")
COCO_ENTRY = re.compile(r"(annotation|image|category|category id) (-?\d+)|(annotations|images|categories)\[(\d+)\]")
# An image file is at fault, not its entry: it is named by its path. Of a key given twice, the entry may have no id.
COCO_FILE = re.compile(r"image file |the key .* is given twice")


def check_coco_sentence(sentence: str, source: Path) -> None:
    assert len(sentence.splitlines()) == 1
    assert str(source.parents[1]) in sentence
    if sentence.startswith("image file "):
        return
    assert str(source) in sentence
    if COCO_AS_A_WHOLE.search(sentence) or COCO_FILE.search(sentence):
        return
    named = COCO_ENTRY.search(sentence)
    assert named is not None, sentence
    kind, number, plural, position = named.groups()
    content = json.loads(source.read_bytes())
    if plural:
        assert int(position) < len(content[plural])
    else:
        entries = {"annotation": "annotations", "image": "images"}.get(kind, "categories")
        assert any(entry.get("id") == int(number) for entry in content[entries])


json_changes = st.lists(st.tuples(st.sampled_from(mutations.JSON_CHANGES), CHOICE, CHOICE), min_size=1, max_size=3)
json_bytes = st.sampled_from(
    (None, None, None, None, mutations.key_twice, mutations.truncate, mutations.flip, mutations.flip, mutations.insert)
)  # fmt: skip


def test_spoiled_coco_json_loads_rightly_or_is_refused_by_name(tmp_path: Path) -> None:
    source = write_coco(tmp_path, coco_content())
    counts = {"tried": 0, "loaded": 0, "refused": 0}

    @THOROUGH
    @given(json_changes, json_bytes, CHOICE, st.booleans())
    def spoiled(changes: list[Any], bytewise: mutations.Bytes | None, how: int, inside: bool) -> None:
        counts["tried"] += 1
        content = copy.deepcopy(coco_content())
        for change, where, value in changes if inside or bytewise is None else ():
            change(content, where, value)
        text = mutations.json_text(content, depth=(3, 300, 960, 20000)[how % 4])
        source.write_bytes(text if bytewise is None else bytewise(text, how))
        result = outcome(lambda: CocoDataset(tmp_path, "train"))
        if isinstance(result, str):
            counts["refused"] += 1
            check_coco_sentence(result, source)
        else:
            counts["loaded"] += 1
            content = json.loads(source.read_bytes())
            names = {category["id"]: category["name"] for category in content["categories"]}
            assert result.classes == tuple(names[number] for number in sorted(names))
            check_loaded(result, *coco_says(content))

    report(spoiled, counts)


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
            box = (xmin - 1, ymin - 1, xmax, ymax)
            if xmax > xmin and ymax > ymin and overlaps(box):
                boxes.append((f"{name}.jpg", label, box))
    return boxes


VOC_AS_A_WHOLE = re.compile(
    "is not safe and valid xml|must be a VOC file|size must be in whole|says width|is empty|elements size"
    r"|: (height|width) must|elements (height|width)"
)


def check_voc_sentence(sentence: str, folder: Path) -> None:
    assert len(sentence.splitlines()) == 1
    if "train.txt is empty" in sentence:  # not a usable box in either file
        return
    file = next(path for path in folder.iterdir() if str(path) in sentence)
    if VOC_AS_A_WHOLE.search(sentence):
        return
    named = re.search(r"object (\d+)", sentence)
    assert named is not None, sentence
    assert 1 <= int(named.group(1)) <= len(ElementTree.parse(file).getroot().findall("object"))


xml_changes = st.lists(st.tuples(st.sampled_from(mutations.XML_CHANGES), CHOICE, CHOICE), min_size=1, max_size=3)
xml_bytes = st.sampled_from(
    (None, None, None, None, mutations.deep, mutations.truncate, mutations.flip, mutations.flip,
     mutations.insert)
)  # fmt: skip


def test_spoiled_voc_xml_loads_rightly_or_is_refused_by_name(tmp_path: Path) -> None:
    sound = voc_xml(
        voc_object("cat", 1, 2, 11, 21), voc_object("zebra", 5.5, 6, 40, 30, "<difficult>1</difficult>"),
        voc_object("dog", 20, 10, 35, 25, "<part><name>head</name><bndbox/></part>"),
    )  # fmt: skip
    write_voc(tmp_path, {"a": sound, "b": voc_xml(voc_object("dog", 3, 3, 20, 20))})
    folder = tmp_path / "Annotations"
    counts = {"tried": 0, "loaded": 0, "refused": 0}

    @THOROUGH
    @given(xml_changes, xml_bytes, CHOICE, st.booleans())
    def spoiled(changes: list[Any], bytewise: mutations.Bytes | None, how: int, inside: bool) -> None:
        counts["tried"] += 1
        tree = ElementTree.fromstring(sound)
        for change, where, value in changes if inside or bytewise is None else ():
            change(tree, where, value)
        text = mutations.xml_text(tree)
        (folder / "a.xml").write_bytes(text if bytewise is None else bytewise(text, how))
        result = outcome(lambda: VOCDataset(tmp_path, "train", classes=CLASSES))
        if isinstance(result, str):
            counts["refused"] += 1
            check_voc_sentence(result, folder)
        else:
            counts["loaded"] += 1
            assert result.classes == CLASSES
            boxes = voc_says(folder, ["a", "b"])
            trained = [box for box in boxes if all(side >= 1 for side in sides(clipped(box[2])))]
            check_loaded(result, boxes, trained)

    report(spoiled, counts)


def sides(box: tuple[float, ...]) -> tuple[float, float]:
    return box[2] - box[0], box[3] - box[1]


def report(run: Callable[[], None], counts: dict[str, int]) -> None:
    """Runs a property and sees to it that both of its ends were met often."""
    started = time.process_time()
    run()
    print(counts, f"{time.process_time() - started:.1f} CPU seconds")
    assert counts["tried"] >= TRIED
    assert min(counts["loaded"], counts["refused"]) >= TRIED // 20
