"""Detections as other tools read them, made of the entries of detections.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msil.runs import write_bytes, write_json

FORMATS = ("coco", "yolo")
COCO_RESULTS, COCO_IMAGES, YOLO = "coco_results.json", "coco_images.json", "yolo"  # in the folder written to


def written(form: str | None) -> tuple[str, ...]:
    """What `write` makes in its folder."""
    return {None: (), "coco": (COCO_RESULTS, COCO_IMAGES), "yolo": (YOLO,)}[form]


def write(form: str, out: Path, content: Mapping[str, Any], category_ids: Sequence[int]) -> None:
    """coco: coco_results.json in COCO's results format; coco_images.json with the images that its ids, 1 and up, stand
    for (of a video's frame with its number), and the categories: together what pycocotools loads.
    yolo: a text file for each image or frame, empty where nothing is found, with lines `class cx cy w h score`, the
    class counted from 0, the rest in 0..1; classes.txt names the classes.
    """
    if form == "yolo":
        write_bytes(out / YOLO / "classes.txt", "".join(f"{name}\n" for name in content["classes"]).encode())
        for image in content["images"]:
            write_bytes(out / YOLO / yolo_name(image["file"], image.get("frame")), _yolo(image, content["classes"]))
        return
    numbers = dict(zip(content["classes"], category_ids, strict=True))
    images, entries = [], []
    for place, image in enumerate(content["images"], start=1):
        frame = {"frame": image["frame"]} if "frame" in image else {}
        images.append({"id": place, "file_name": image["file"], **frame,
                       "width": image["width"], "height": image["height"]})  # fmt: skip
        for found in image["detections"]:
            x1, y1, x2, y2 = found["box"]
            box = [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)]
            entries.append({"image_id": place, "category_id": numbers[found["label"]], "bbox": box,
                            "score": found["score"]})  # fmt: skip
    categories = [{"id": number, "name": name} for name, number in numbers.items()]
    write_json(out / COCO_IMAGES, {"images": images, "categories": categories})
    lines = ",\n".join(map(json.dumps, entries))
    write_bytes(out / COCO_RESULTS, f"[\n{lines}\n]\n".encode())


def yolo_name(file: str, frame: int | None) -> Path:
    """a/b.jpg -> a/b.txt; frame 12 of c.mp4 -> c_000012.txt."""
    stem = Path(file).with_suffix("")
    return stem.with_name(stem.name + ("" if frame is None else f"_{frame:06d}") + ".txt")


def _yolo(image: Mapping[str, Any], classes: Sequence[str]) -> bytes:
    width, height = image["width"], image["height"]
    lines = []
    for found in image["detections"]:
        x1, y1, x2, y2 = found["box"]
        values = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
        numbers = " ".join(f"{value:.6f}" for value in values)
        lines.append(f"{classes.index(found['label'])} {numbers} {found['score']:.4f}\n")
    return "".join(lines).encode()
