"""predict_files: which files it takes and writes, what the json says, and what it never overwrites."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor

from msil.detection import Detections, Detector
from msil.errors import ConfigError, DataError
from msil.inference.predict import predict_files

RED = (255, 45, 45)  # the colour of class 0
GRAY = 128
CLASSES = ["cat", "dog"]


class Fixed(torch.nn.Module):
    """Finds the same in every image: a cat of score 0.9, a dog of 0.3 and a cat of 0.29."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Tensor] = []

    def predict(self, images: list[Tensor]) -> list[Detections]:
        self.seen += images
        boxes = torch.tensor([[40.0, 60, 200.123456, 180], [300, 100, 350, 200], [0, 0, 20, 20]])
        return [Detections(boxes, torch.tensor([0.9, 0.3, 0.29]), torch.tensor([0, 1, 0])) for _ in images]


def predict(source: Path | str | list[Path], out: Path, *, detector: Any = None, **changes: Any) -> dict[str, Any]:
    detector = cast(Detector, Fixed() if detector is None else detector)
    sources = source if isinstance(source, list) else [source]
    return predict_files(detector, CLASSES, sources, out, checkpoint="best.ckpt", **changes)


def write(path: Path, width: int = 400, height: int = 300, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (GRAY, GRAY, GRAY)).save(path, **options)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def content(out: Path) -> dict[str, Any]:
    return json.loads((out / "detections.json").read_text())


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


CAT = {"label": "cat", "score": 0.9, "box": [40.0, 60.0, 200.12, 180.0]}
DOG = {"label": "dog", "score": 0.3, "box": [300.0, 100.0, 350.0, 200.0]}


def test_one_image(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in" / "a.png"), tmp_path / "new" / "out"
    returned = predict(source, out)
    assert names(out) == ["a.png", "detections.json"]
    images = [{"file": "a.png", "width": 400, "height": 300, "detections": [CAT, DOG]}]
    about = {"checkpoint": "best.ckpt", "threshold": 0.3, "classes": CLASSES, "highest_score": 0.9}
    assert returned == content(out) == {**about, "images": images, "failed": []}
    drawn = pixels(out / "a.png")
    assert drawn.shape == (300, 400, 3)
    # the cat's box: columns 40 and 199, rows 60 and 179; nothing where the cat of score 0.29 would be
    assert tuple(drawn[120, 40]) == tuple(drawn[120, 199]) == tuple(drawn[60, 120]) == tuple(drawn[179, 120]) == RED
    assert (drawn[:40, :30] == GRAY).all()
    assert (pixels(source) == GRAY).all()


def test_a_folder(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    for name in ("b.jpg", "a.png", "a.jpg", "c.JPEG", "d.bmp", "e.webp", "f.tif", "g.gif", ".hidden.jpg", "sub/h.jpg"):
        write(source / name)
    (source / "labels.txt").write_text("cat")
    (source / "folder.jpg").mkdir()
    taken = ["a.jpg", "a.png", "b.jpg", "c.JPEG", "d.bmp", "e.webp", "f.tif", "g.gif"]
    predict(source, out, threshold=0.31)
    assert names(out) == sorted([*taken, "detections.json"])
    assert [(image["file"], image["detections"]) for image in content(out)["images"]] == [
        (name, [CAT]) for name in taken
    ]
    kinds = ["JPEG", "PNG", "JPEG", "JPEG", "BMP", "WEBP", "TIFF", "GIF"]
    for name, kind in zip(taken, kinds, strict=True):
        with Image.open(out / name) as picture:
            assert (picture.format, picture.size) == (kind, (400, 300))
        # the colour stays within what lossy formats do to a line of two pixels
        assert np.abs(pixels(out / name)[120, 40:42].astype(int) - RED).max() < 60, name


# at most 320 pixels: times 640 // 320 = 2 and 640 // 100 = 6; boxes of the json stay in the image's own pixels
@pytest.mark.parametrize(("size", "drawn"), [((320, 240), (640, 480)), ((100, 50), (600, 300)), ((321, 1), (321, 1))])
def test_small_images_are_enlarged(tmp_path: Path, size: tuple[int, int], drawn: tuple[int, int]) -> None:
    write(tmp_path / "a.png", *size)
    predict(tmp_path / "a.png", tmp_path / "out")
    assert Image.open(tmp_path / "out" / "a.png").size == drawn
    image = content(tmp_path / "out")["images"][0]
    assert (image["width"], image["height"], image["detections"][0]) == (*size, CAT)


def test_exif_rotation_counts_for_the_sizes_and_the_drawing(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter: 400 x 300 as stored is 300 wide and 400 high
    (image,) = predict(write(tmp_path / "a.jpg", exif=exif), tmp_path / "out")["images"]
    with Image.open(tmp_path / "out" / "a.jpg") as picture:
        assert picture.size == (image["width"], image["height"]) == (300, 400) and 0x0112 not in picture.getexif()


def test_a_picture_of_fewer_than_16_bits(tmp_path: Path) -> None:
    Image.fromarray(np.full((40, 40), 2049, dtype=np.uint16)).save(tmp_path / "a.tif")  # 2049 = 128 * 16 + 1
    predict(tmp_path / "a.tif", tmp_path / "out", detector=(detector := Fixed()), bits=12)
    assert detector.seen[0].unique().tolist() == [128]


def test_unreadable_images_do_not_stop_the_others(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    for name in ("a.jpg", "c.jpg", "d.png"):
        write(source / name)
    (source / "b.jpg").write_bytes(b"no image")
    whole = (source / "d.png").read_bytes()
    (source / "d.png").write_bytes(whole[: len(whole) // 2])
    predict(source, out)
    assert names(out) == ["a.jpg", "c.jpg", "detections.json"]
    assert [image["file"] for image in content(out)["images"]] == ["a.jpg", "c.jpg"]
    assert [(entry["file"], entry["file"] in entry["error"]) for entry in content(out)["failed"]] == [
        ("b.jpg", True), ("d.png", True),
    ]  # fmt: skip


def test_what_is_done_is_kept_when_the_work_is_broken_off(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        write(tmp_path / name)

    class Tired(Fixed):
        def predict(self, images: list[Tensor]) -> list[Detections]:
            if len(self.seen) == 2:
                raise KeyboardInterrupt
            return super().predict(images)

    with pytest.raises(KeyboardInterrupt):
        predict(tmp_path, tmp_path / "out", detector=Tired())
    assert [image["file"] for image in content(tmp_path / "out")["images"]] == ["a.jpg", "b.jpg"]
    assert len(predict(tmp_path, tmp_path / "out")["images"]) == 3  # and can be done anew in the same folder


def test_no_image_and_no_other_picture_is_overwritten_but_earlier_results_are(tmp_path: Path) -> None:
    source = write(tmp_path / "in" / "a.png")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.png").symlink_to(source)
    own = {"checkpoint": "best.ckpt", "classes": CLASSES, "images": [{"file": "a.png"}]}
    (tmp_path / "in" / "detections.json").write_text(json.dumps(own))
    for given, out in ((source, "in"), (source.parent, "link"), (source, "links")):
        with pytest.raises(ConfigError, match=r"a\.png would be overwritten, but is the image itself: choose another"):
            predict(given, tmp_path / out)
    assert (pixels(source) == GRAY).all()
    out = tmp_path / "out"
    other = write(out / "a.png", 30, 20)
    with pytest.raises(ConfigError, match=r"out/a\.png would be overwritten, but is already there"):
        predict(source, out)
    assert Image.open(other).size == (30, 20) and names(out) == ["a.png"]
    other.unlink()
    predict(source, out)
    predict(source, out, threshold=1.0)
    assert content(out)["images"][0]["detections"] == []
    assert (pixels(out / "a.png") == GRAY).all()


def test_a_file_called_detections_json_makes_no_file_ours(tmp_path: Path) -> None:
    """Nor does a call's own, of files that it does not name."""
    source, out = write(tmp_path / "in" / "a.png"), tmp_path / "out"
    other = write(out / "a.png", 30, 20)
    for text in ("no json", "[1]", '{"images": [{"file": "a.png"}]}', '{"checkpoint": "", "classes": [], "images": 1}'):
        (out / "detections.json").write_text(text)
        with pytest.raises(ConfigError, match=r"out/detections\.json is already there, and not by this command"):
            predict(source, out)
        assert (out / "detections.json").read_text() == text
    (out / "detections.json").unlink()
    predict(write(tmp_path / "in" / "b.png"), out)
    with pytest.raises(ConfigError, match=r"out/a\.png would be overwritten, .* not by the last call"):
        predict(source, out)
    assert Image.open(other).size == (30, 20)


def test_several_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a/1.png", "a/b/1.png", "a/.c.png", "a/d.txt", "e/1.png", "e/2.JPG"):
        write(tmp_path / name, format="PNG")
    predict([Path("a/b/1.png"), tmp_path / "a", "a/*.png", "e/*"], Path("out"))  # a/1.png is taken once
    taken = ["a/b/1.png", "a/1.png", "e/1.png", "e/2.JPG"]
    assert [image["file"] for image in content(tmp_path / "out")["images"]] == taken
    assert all((tmp_path / "out" / name).is_file() for name in taken)
    # Below a/, and without what lies in the folder that is written to.
    for _ in range(2):
        predict("**/1.png", Path("a/drawn"))
        assert [image["file"] for image in content(tmp_path / "a" / "drawn")["images"]] == [
            "a/1.png", "a/b/1.png", "e/1.png", "out/a/1.png", "out/a/b/1.png", "out/e/1.png",
        ]  # fmt: skip


def test_batches(tmp_path: Path) -> None:
    sizes = []

    class Counting(Fixed):
        def predict(self, images: list[Tensor]) -> list[Detections]:
            sizes.append(len(images))
            return [Detections(one.boxes * len(images), one.scores, one.labels) for one in super().predict(images)]

    for place in range(5):
        write(tmp_path / f"{place}.png", 401 + place)
    found = predict(tmp_path, tmp_path / "out", detector=Counting(), batch_size=3)["images"]
    assert sizes == [3, 2]
    assert [(image["width"], image["detections"][0]["box"][0]) for image in found] == [
        (401, 120), (402, 120), (403, 120), (404, 80), (405, 80),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="1 image or more"):
        predict(tmp_path, tmp_path / "out", batch_size=0)

    class Full(Fixed):
        def predict(self, images: list[Tensor]) -> list[Detections]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ConfigError, match=r"does not hold 2 images of up to 0\.1 million pixels: lower --batch-size"):
        predict(tmp_path, tmp_path / "out", detector=Full(), batch_size=2)


def test_coco(tmp_path: Path) -> None:
    source = [write(tmp_path / "in" / name) for name in ("b.png", "a.png")]
    predict([*source], tmp_path / "out", form="coco", category_ids=(17, 18))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(tmp_path / "out" / "coco_images.json")
        found = truth.loadRes(str(tmp_path / "out" / "coco_results.json"))
    assert [(image["id"], image["file_name"]) for image in truth.loadImgs([1, 2])] == [(1, "b.png"), (2, "a.png")]
    assert [category["name"] for category in truth.loadCats([17, 18])] == CLASSES
    of_a = found.loadAnns(found.getAnnIds(imgIds=[2]))
    # x1 y1 x2 y2 of CAT and DOG as x y width height
    assert [(one["category_id"], one["bbox"], one["score"]) for one in of_a] == [
        (17, [40, 60, 160.12, 120], 0.9), (18, [300, 100, 50, 100], 0.3),
    ]  # fmt: skip


def test_yolo(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in" / "a.png"), tmp_path / "out"
    predict(source, out, form="yolo")
    assert (out / "yolo" / "classes.txt").read_text() == "cat\ndog\n"
    # centre and size over 400 x 300: (40 + 200.12) / 2 / 400, (60 + 180) / 2 / 300, 160.12 / 400, 120 / 300
    assert (out / "yolo" / "a.txt").read_text().splitlines() == [
        "0 0.300150 0.400000 0.400300 0.400000 0.9000",
        "1 0.812500 0.500000 0.125000 0.333333 0.3000",
    ]
    predict(source, out, form="yolo", threshold=1.0)
    assert (out / "yolo" / "a.txt").read_text() == ""  # not the boxes of before
    write(tmp_path / "in" / "a.jpg")
    with pytest.raises(ConfigError, match=r"a\.jpg and a\.png would both be written to .*yolo/a\.txt"):
        predict(tmp_path / "in", out, form="yolo")
    (tmp_path / "theirs" / "yolo").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"yolo is already there, and not by this command"):
        predict(source, tmp_path / "theirs", form="yolo")


def test_a_video_without_pyav_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").touch()
    with pytest.raises(DataError, match=r'a\.mp4 is a video, which needs PyAV: pip install -e "\.\[video\]"'):
        predict(tmp_path / "a.mp4", tmp_path / "out")
    write(tmp_path / "b.png")
    predict(tmp_path, tmp_path / "out")  # the others go on
    assert names(tmp_path / "out") == ["b.png", "detections.json"]
    assert [one["file"] for one in content(tmp_path / "out")["failed"]] == ["a.mp4"]


def test_mistakes(tmp_path: Path) -> None:
    source = write(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.jpg").write_bytes(b"no image")
    for given, out, words in (
        (tmp_path / "nowhere", "out", r"there is no file or folder .*nowhere"),
        (tmp_path / "in" / "c*", "out", r"c\* matches no images or videos .*another pattern"),
        (tmp_path, "out", r"holds no images or videos \(.jpg, .*below it are not looked into"),
        (tmp_path / "in" / "b.jpg", "out", r"image file .*b\.jpg has no valid header"),
        (tmp_path / "in", "in/a.png", r"a\.png is a file, not a folder"),
        (tmp_path / "in", "in/a.png/out", "cannot be written to"),
    ):
        with pytest.raises((DataError, ConfigError), match=words):
            predict(given, tmp_path / out)
    for wrong in (-0.1, float("nan")):
        with pytest.raises(ConfigError, match="from 0 to 1"):
            predict(source, tmp_path / "out", threshold=wrong)
    assert names(tmp_path) == ["in"] and names(tmp_path / "in") == ["a.png", "b.jpg"]
