"""A detector on image files: drawn copies, and detections.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from msil.data.images import read_image
from msil.detection.structures import Detections
from msil.detection.torchvision_detector import AnyDetector
from msil.errors import ConfigError, DataError
from msil.reporting.pictures import above, draw_boxes, image_bytes, readable_font_size
from msil.runs import write_bytes, write_json

SMALLEST_DRAWN = 640  # pixels of the long side: what is at most half of it is enlarged, or labels would hide it
RESULT = "detections.json"
# By the ending of the name: what is taken for an image, and what its drawn copy is written as.
FORMATS = {
    ".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF",
    ".gif": "GIF",
}  # fmt: skip


def predict_folder(
    detector: AnyDetector,
    classes: Sequence[str],
    source: str | Path,
    out: str | Path,
    *,
    checkpoint: str,
    score_thresh: float = 0.3,
) -> dict[str, Any]:
    """Detect in an image, or in every image that lies in a folder (not in folders below it; hidden files are left out).

    Each image's copy with boxes, class names and scores is written to `out` under the image's own name and in its
    format, upright and in full resolution; images of up to 320 pixels a side are enlarged by a whole factor, to near
    640. out/detections.json, which replaces an earlier one, is
        {"checkpoint": ..., "score_thresh": 0.3, "classes": ["cat", ...],
         "images": [{"file": "a.jpg", "width": 640, "height": 480,
                     "detections": [{"label": "cat", "score": 0.93, "box": [x1, y1, x2, y2]}, ...]}, ...],
         "failed": [{"file": "b.jpg", "error": "..."}, ...]}
    with images by name, detections by falling score, and boxes in pixels of the upright image from its top left corner.
    It is also written where the work is broken off, with the images done. Returns its content.

    classes: label i is classes[i]. checkpoint: what the json says of the detector's origin. score_thresh: only
    detections of at least this score are kept; the detector's own threshold holds as well. Images are taken one at a
    time, so what is found in one does not depend on the others.

    Raises DataError if there is no such image or folder, the folder has no images, or the only image cannot be read
    (in a folder the others go on); ConfigError for a threshold outside [0, 1], or an `out` that cannot be written to,
    or where an image to be read, or a picture of the same name that is not ours, would be overwritten.
    """
    source, out = Path(source), Path(out)
    if not 0 <= score_thresh <= 1:
        raise ConfigError(f"the score threshold must be from 0 to 1, but is {score_thresh:g}: choose another.")
    files = _image_files(source)
    _check_out(out, files)
    images: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    content = {"checkpoint": checkpoint, "score_thresh": score_thresh, "classes": list(classes), "images": images,
               "failed": failed}  # fmt: skip
    try:
        try:
            for file in tqdm(files, unit="image", disable=None if len(files) > 1 else True):
                try:
                    image = read_image(file)
                except DataError as error:
                    if source == file:
                        raise
                    failed.append({"file": file.name, "error": str(error)})
                    continue
                found = detect(detector, image, score_thresh)
                height, width = image.shape[1:]
                drawn = draw_boxes(
                    image,
                    found.boxes,
                    found.labels,
                    classes,
                    scores=found.scores,
                    side=SMALLEST_DRAWN if 2 * max(height, width) <= SMALLEST_DRAWN else None,
                    font_size=readable_font_size(height, width),
                )
                name = _drawn_name(file)
                write_bytes(out / name, image_bytes(drawn, FORMATS[Path(name).suffix.lower()], quality=95))
                images.append(_record(file, image, found, classes))
        finally:
            if images or failed:
                write_json(out / RESULT, content)
    except OSError as error:
        raise ConfigError(
            f"{out} cannot be written to ({error.strerror or error}): mend that or choose another."
        ) from error
    return content


def detect(detector: AnyDetector, image: Tensor, score_thresh: float) -> Detections:
    """What the detector finds in an image (3, H, W) uint8 with at least this score, on the CPU."""
    device = next(detector.parameters()).device
    return above(detector.predict([image.to(device)])[0].to("cpu"), score_thresh)


def _image_files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise DataError(f"there is no image or folder {source}: give the path of one.")
    files = sorted(
        path
        for path in source.iterdir()
        if path.suffix.lower() in FORMATS and not path.name.startswith(".") and path.is_file()
    )
    if not files:
        raise DataError(
            f"folder {source} holds no images ({', '.join(FORMATS)}); folders below it are not looked into: give one"
            " that does."
        )
    return files


def _check_out(out: Path, files: Sequence[Path]) -> None:
    """Raises ConfigError if a drawn copy would take the place of an image, or of a picture that may not be ours."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file, not a folder to write to: choose another.")
    ours = (out / RESULT).is_file()
    for file in files:
        target = out / _drawn_name(file)
        if target.exists() and (not ours or target.samefile(file)):
            what = "the image itself" if target.samefile(file) else "already there, and not by this command"
            raise ConfigError(f"{target} would be overwritten, but is {what}: choose another folder to write to.")


def _drawn_name(file: Path) -> str:
    """The image's own, so that no two are alike; an only image may have any ending and becomes a JPEG."""
    return file.name if file.suffix.lower() in FORMATS else f"{file.name}.jpg"


def _record(file: Path, image: Tensor, found: Detections, classes: Sequence[str]) -> dict[str, Any]:
    """An image's entry in detections.json."""
    rows = zip(found.labels.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True)
    return {
        "file": file.name,
        "width": image.shape[2],
        "height": image.shape[1],
        "detections": [
            {"label": classes[label], "score": round(score, 4), "box": [round(value, 2) for value in box]}
            for label, score, box in rows
        ],
    }
