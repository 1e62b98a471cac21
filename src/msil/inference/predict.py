"""A detector on images and videos: drawn copies, and detections.json."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from msil.data.images import read_image
from msil.detection.structures import Detections
from msil.detection.torchvision_detector import AnyDetector
from msil.errors import ConfigError, DataError
from msil.inference import formats
from msil.inference.video import VIDEOS, describe, drawn_video, read_frames
from msil.reporting.figures.pictures import above, draw_boxes, image_bytes, readable_font_size
from msil.runs import DETECTIONS, write_bytes, write_json

SMALLEST_DRAWN = 640  # pixels of the long side: what is at most half of it is enlarged, or labels would hide it
# By the ending of the name: what is taken for an image, and what its drawn copy is written as.
FORMATS = {
    ".jpg": "JPEG", ".jpeg": "JPEG", ".jfif": "JPEG", ".png": "PNG", ".bmp": "BMP", ".webp": "WEBP", ".tif": "TIFF",
    ".tiff": "TIFF", ".gif": "GIF",
}  # fmt: skip
TAKEN = (*FORMATS, *VIDEOS)


@dataclass(frozen=True)
class Picture:
    """image: (3, H, W) uint8 RGB. frame, seconds: place in a video, from 0; None for an image."""

    name: str
    file: Path
    image: Tensor
    frame: int | None = None
    seconds: float | None = None


def predict_files(
    detector: AnyDetector,
    classes: Sequence[str],
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    checkpoint: str,
    threshold: float = 0.3,
    batch_size: int = 1,
    form: str | None = None,
    category_ids: Sequence[int] | None = None,
    bits: int = 16,
) -> dict[str, Any]:
    """Detect in images and videos: files, all that lie in a folder (not in folders below it; hidden files are left
    out), or all that a pattern such as photos/**/*.jpg matches.

    A file's name in what is written is its path below the deepest folder that holds all files. Each image's copy with
    boxes, class names and scores is written to `out` under that name and in its format, upright and in full resolution;
    images of up to 320 pixels a side are enlarged by a whole factor, to near 640. A video becomes an MP4 of the same
    number of frames, evenly spaced. out/detections.json, which replaces an earlier one, is
        {"checkpoint": ..., "threshold": 0.3, "classes": ["cat", ...], "highest_score": 0.93,
         "images": [{"file": "a.jpg", "width": 640, "height": 480,
                     "detections": [{"label": "cat", "score": 0.93, "box": [x1, y1, x2, y2]}, ...]},
                    {"file": "b.mp4", "frame": 0, "seconds": 0.0, "width": ...}, ...],
         "failed": [{"file": "c.jpg", "error": "..."}, ...]}
    with the images of a folder or a pattern by name, a video's frames in their order, detections by falling score, and
    boxes in pixels of the upright image from its top left corner. highest_score: also below the threshold, null where
    there is none. It is also written where the work is broken off, with the images done. Returns its content.

    classes: label i is classes[i]. checkpoint: what the json says of the detector's origin. threshold: only detections
    of at least this score are kept; the detector's own threshold holds as well. batch_size: images that the detector
    gets at a time; what a Detector finds in one does not depend on the others. form: "coco" or "yolo", to be written as
    well, see msil.inference.formats; category_ids: COCO's of the labels, by default 1 and up. bits: see read_image.

    Raises DataError if there is no such file or folder, it has no images, or the only file cannot be read (of several
    the others go on); ConfigError for a number outside its limits, a batch that the GPU's memory does not hold, or an
    `out` that cannot be written to, or where a file to be read, or one that is not ours, would be overwritten.
    """
    out = Path(out)
    if not 0 <= threshold <= 1:
        raise ConfigError(f"the score threshold must be from 0 to 1, but is {threshold:g}: choose another.")
    if batch_size < 1:
        raise ConfigError(f"a batch must hold 1 image or more, but is to hold {batch_size}: choose another size.")
    files = _named([file for source in sources for file in _files_of(source, out)])
    _check_out(out, files, form)
    images: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    content = {"checkpoint": checkpoint, "threshold": threshold, "classes": list(classes), "highest_score": None,
               "images": images, "failed": failed}  # fmt: skip
    total = _length(files)
    pictures = tqdm(_pictures(files, failed, bits), total=total, unit="image", disable=True if total == 1 else None)
    highest = 0.0
    try:
        try:
            with ExitStack() as video:
                for batch in _batches(pictures, batch_size):
                    for picture, found in zip(batch, detect(detector, [one.image for one in batch]), strict=True):
                        highest = max([highest, *above(found, highest).scores.tolist()])
                        content["highest_score"] = round(highest, 6) or None
                        found = above(found, threshold)
                        drawn = _drawn(picture, found, classes)
                        target = out / _drawn_name(picture.name)
                        if picture.frame is None:
                            write_bytes(target, image_bytes(drawn, FORMATS[target.suffix.lower()], quality=95))
                        else:
                            if picture.frame == 0:
                                video.close()  # the one before it
                                encode = video.enter_context(drawn_video(target, describe(picture.file)[1]))
                            encode(drawn)
                        images.append(_record(picture, found, classes))
        finally:
            if images or failed:
                write_json(out / DETECTIONS, content)
                if form is not None:
                    formats.write(form, out, content, category_ids or range(1, len(classes) + 1))
    except OSError as error:
        raise ConfigError(
            f"{out} cannot be written to ({error.strerror or error}): mend that or choose another."
        ) from error
    return content


def detect(detector: AnyDetector, images: Sequence[Tensor]) -> list[Detections]:
    """What the detector finds in images (3, H, W) uint8, on the CPU.

    Raises ConfigError where they do not fit into the GPU's memory.
    """
    device = next(detector.parameters()).device
    try:
        return [found.to("cpu") for found in detector.predict([image.to(device) for image in images])]
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the GPU's memory does not hold {len(images)} image{'s' * (len(images) > 1)} of up to "
            f"{max(image.shape[-1] * image.shape[-2] for image in images) / 1e6:.1f} million pixels: lower "
            "--batch-size, or free memory that others use."
        ) from error


def _files_of(source: str | Path, out: Path) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found, where = sorted(path.iterdir()), f"folder {path} holds"
        advice = "; folders below it are not looked into: give one that does, or a pattern such as '**/*.jpg'."
    elif glob.has_magic(str(path)):
        # What an earlier call has drawn is none of what is asked for.
        found = [one for one in map(Path, sorted(glob.glob(str(path), recursive=True))) if not _below(one, out)]
        where, advice = f"{path} matches", ": give another pattern."
    else:
        raise DataError(f"there is no file or folder {path}: give the path of one.")
    files = [one for one in found if one.suffix.lower() in TAKEN and not one.name.startswith(".") and one.is_file()]
    if not files:
        raise DataError(f"{where} no images or videos ({', '.join(TAKEN)}){advice}")
    return files


def _below(path: Path, folder: Path) -> bool:
    return folder.resolve() in path.resolve().parents


def _named(files: Sequence[Path]) -> dict[str, Path]:
    """By their paths below the deepest folder that holds all."""
    whole = [Path(os.path.abspath(file)) for file in files]
    common = os.path.commonpath([file.parent for file in whole])
    return {file.relative_to(common).as_posix(): given for file, given in zip(whole, files, strict=True)}


def _check_out(out: Path, files: Mapping[str, Path], form: str | None) -> None:
    """Raises ConfigError if what is written would take the place of an image, of another's file, or of each other."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file, not a folder to write to: choose another.")
    drawn = _drawn_before(out)
    owners = {out / name: "" for name in (DETECTIONS, *formats.written(form))}
    for target in owners:
        if target.exists() and drawn is None:
            raise ConfigError(f"{target} is already there, and not by this command: choose another folder to write to.")
    for name, file in files.items():
        target = out / _drawn_name(name)
        if target.exists() and (target not in (drawn or ()) or target.samefile(file)):
            what = "the image itself" if target.samefile(file) else "already there, and not by the last call"
            raise ConfigError(f"{target} would be overwritten, but is {what}: choose another folder to write to.")
        for one in (target, *([out / formats.YOLO / formats.yolo_name(name, None)] if form == "yolo" else [])):
            if owners.setdefault(one, name) != name:
                raise ConfigError(f"{owners[one]} and {name} would both be written to {one}: take one at a time.")


def _drawn_before(out: Path) -> set[Path] | None:
    """What the last call drew in that folder, by its detections.json; None where that is missing or another's."""
    try:
        content = json.loads((out / DETECTIONS).read_text(encoding="utf-8"))
        named = {out / _drawn_name(image["file"]) for image in content["images"]}
        return named if {"checkpoint", "classes"} <= content.keys() else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _drawn_name(name: str) -> str:
    """The file's own, so that no two are alike; a video becomes an MP4, an image of any other ending a JPEG."""
    ending = Path(name).suffix.lower()
    if ending in VIDEOS:
        return name if ending == ".mp4" else f"{name}.mp4"
    return name if ending in FORMATS else f"{name}.jpg"


def _is_video(file: Path) -> bool:
    return file.suffix.lower() in VIDEOS


def _length(files: Mapping[str, Path]) -> int | None:
    """Images and frames, as far as the files say; None where a video does not."""
    total = 0
    for file in files.values():
        if not _is_video(file):
            total += 1
            continue
        with suppress(DataError):  # said when it is read
            frames, _ = describe(file)
            if not frames:
                return None
            total += frames
    return total


def _pictures(files: Mapping[str, Path], failed: list[dict[str, str]], bits: int) -> Iterator[Picture]:
    """All images and frames. A file that cannot be read goes to `failed`; an only one raises its DataError, unless
    frames of it came before."""
    for name, file in files.items():
        frame = -1
        try:
            if _is_video(file):
                for frame, (seconds, image) in enumerate(read_frames(file)):
                    yield Picture(name, file, image, frame, seconds)
            else:
                yield Picture(name, file, read_image(file, bits=bits))
        except DataError as error:
            if len(files) == 1 and frame < 0:
                raise
            failed.append({"file": name, "error": str(error)})


def _batches(pictures: Iterable[Picture], size: int) -> Iterator[list[Picture]]:
    pictures = iter(pictures)
    while batch := list(islice(pictures, size)):
        yield batch


def _drawn(picture: Picture, found: Detections, classes: Sequence[str]) -> np.ndarray:
    height, width = picture.image.shape[1:]
    return draw_boxes(
        picture.image,
        found.boxes,
        found.labels,
        classes,
        scores=found.scores,
        side=SMALLEST_DRAWN if 2 * max(height, width) <= SMALLEST_DRAWN else None,
        font_size=readable_font_size(height, width),
    )


def _record(picture: Picture, found: Detections, classes: Sequence[str]) -> dict[str, Any]:
    """An image's or a frame's entry in detections.json."""
    rows = zip(found.labels.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True)
    place = {} if picture.seconds is None else {"frame": picture.frame, "seconds": round(picture.seconds, 4)}
    return {
        "file": picture.name,
        **place,
        "width": picture.image.shape[2],
        "height": picture.image.shape[1],
        "detections": [
            {"label": classes[label], "score": round(score, 4), "box": [round(value, 2) for value in box]}
            for label, score, box in rows
        ],
    }
