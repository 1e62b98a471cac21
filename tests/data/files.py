"""Small data sets and image files, written byte by byte where no library writes such files."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from msil.data.annotations import AnnotatedImages
from msil.data.module import build_split

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"


def write_jpeg(path: Path, width: int, height: int, orientation: int = 1) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (90, 120, 200)).save(path, exif=exif, quality=100)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, color: int, rows: list[bytes], *chunks: bytes) -> bytes:
    """A PNG of unfiltered rows. color: 0 gray, 2 RGB, 3 palette, 4 gray + alpha, 6 RGBA. chunks: before the pixels."""
    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(chunks) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def coco_content() -> dict[str, Any]:
    """Three images of 40 x 30, the last without boxes; categories 3, 7, 90 listed out of order; one crowd."""
    return {
        "images": [
            {"id": 11, "file_name": "a.jpg", "width": 40, "height": 30},
            {"id": 5, "file_name": "sub/b.jpg", "width": 40, "height": 30},
            {"id": 8, "file_name": "c.jpg", "width": 40, "height": 30},
        ],
        "annotations": [
            {"id": 100, "image_id": 5, "category_id": 90, "bbox": [1, 2, 10, 20], "area": 150.5, "iscrowd": 0},
            {"id": 101, "image_id": 11, "category_id": 3, "bbox": [4.5, 5, 6, 7.25], "area": 40, "iscrowd": 0},
            {"id": 102, "image_id": 5, "category_id": 7, "bbox": [0, 0, 40, 30], "area": 900, "iscrowd": 1},
            {"id": 103, "image_id": 5, "category_id": 3, "bbox": [20, 10, 20, 20], "area": 400, "iscrowd": 0},
        ],
        "categories": [{"id": 90, "name": "zebra"}, {"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
    }


def write_coco(root: Path, content: Any, split: str = "train") -> Path:
    """The json and, unless they are there, a JPEG for every image whose entry is sound. Returns the json's path."""
    source = root / "annotations" / f"instances_{split}.json"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(content if isinstance(content, str) else json.dumps(content))
    (root / split).mkdir(exist_ok=True)
    for name in ("a.jpg", "sub/b.jpg", "c.jpg"):
        if not (root / split / name).exists():
            write_jpeg(root / split / name, 40, 30)
    return source


def voc_object(name: str, xmin: object, ymin: object, xmax: object, ymax: object, extra: str = "") -> str:
    return (
        f"<object><name>{name}</name>{extra}<bndbox><xmax>{xmax}</xmax><xmin>{xmin}</xmin>"
        f"<ymin>{ymin}</ymin><ymax>{ymax}</ymax></bndbox></object>"
    )


def voc_xml(*objects: str, size: str = "<size><width>40</width><height>30</height><depth>3</depth></size>") -> str:
    return f"<annotation><filename>elsewhere.jpg</filename>{size}{''.join(objects)}</annotation>"


def write_voc(root: Path, annotations: dict[str, str], split: str = "train") -> Path:
    """annotations: image name -> xml. Returns the split file's path."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, xml in annotations.items():
        (root / "Annotations" / f"{name}.xml").write_text(xml)
        if not (root / "JPEGImages" / f"{name}.jpg").exists():
            write_jpeg(root / "JPEGImages" / f"{name}.jpg", 40, 30)
    source = root / "ImageSets" / "Main" / f"{split}.txt"
    source.write_text("".join(f"{name}\n" for name in annotations))
    return source


def quadrants(height: int = 16, width: int = 32) -> np.ndarray:
    """(H, W, 3) uint8 quarters: red, green / blue, white. 16 x 32: made of whole 8 x 8 blocks, as JPEG stores them."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[: height // 2, : width // 2] = (255, 0, 0)
    pixels[: height // 2, width // 2 :] = (0, 255, 0)
    pixels[height // 2 :, : width // 2] = (0, 0, 255)
    pixels[height // 2 :, width // 2 :] = (255, 255, 255)
    return pixels


def read_coco(root: Path, split: str, **settings: Any) -> AnnotatedImages:
    return build_split({"name": "coco", "root": root, **settings}, split)


def read_voc(root: Path, split: str, **settings: Any) -> AnnotatedImages:
    """Of classes that need not occur, as of a validation split."""
    return build_split({"name": "voc", "root": root, **settings}, split, complete=False)


def boxes_of(dataset: AnnotatedImages) -> list[tuple[int, str, list[float], float, bool]]:
    """Image id, class, x y width height, area and ignored of every box that evaluation scores against."""
    truth = dataset.annotations
    columns = (truth.truth_boxes.tolist(), truth.truth_areas.tolist(), truth.truth_ignored.tolist())
    images = truth.image_ids[truth.truth_images].tolist()
    return list(zip(images, [truth.classes[label] for label in truth.truth_labels], *columns, strict=True))
