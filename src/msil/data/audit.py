"""The checks that every data set passes before training starts.

Always refused, with a DataError naming file and id: what has no sound meaning (NaN, wrong types, inverted boxes,
unknown or duplicate ids, missing or truncated images, names and links that leave the data set). Boxes that real sets
are full of are mended, counted and named in one DataWarning, or refused under `strict`:
- a box that leaves its image by more than ROUNDING is clipped to it for training;
- a degenerate box (no width or no height, or nothing of it inside the image) is dropped altogether;
- a box of which less than 1 pixel in width or height is inside the image, or whose area is given as 0, is not trained
  on, but stays in the ground truth that evaluation scores against (the reference's rule for training).
"""

from __future__ import annotations

import os
import re
import reprlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import numpy as np
from numpy.typing import NDArray

from msil.data.images import ImageHeader, read_header, read_image
from msil.errors import DataError, listed

if TYPE_CHECKING:
    from msil.data.annotations import Annotations

Array = NDArray[Any]
T = TypeVar("T")
Size = tuple[int, int]

ROUNDING = 0.02  # px: COCO rounds x and width to 0.01 each, so their sum may leave the image by that much
MIN_SIDE = 1.0  # px, of a box to train on
LARGEST = 1e15  # px or px^2: beyond it no number is a measure of an image
NAMED = 3  # boxes named in the warning, of each kind
THREADS = 4  # they wait for the disk
PART = 256  # images a thread takes at a time

# Control characters, line separators and lone surrogates: a message is one printable line of UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_PLAIN = re.compile(r"[^/\\:]+")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlevel = 3


class DataWarning(UserWarning):
    """Something in a data set was mended; the message says what and how often."""


def warn(place: object, what: str) -> None:
    """One DataWarning; place: the file or folder that it is about."""
    warnings.warn(f"{place}: {what}", DataWarning, stacklevel=5)  # of check_boxes: the caller of build_split


def side(value: object, what: str) -> int:
    """An image's width or height: whole floats pass (spreadsheets write 640.0), strings and booleans do not.

    Raises DataError for anything else; `what` names it.
    """
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number < 2**63:
        raise DataError(f"{what} must be a whole number of at least 1, but is {short(value)}: correct it")
    return number


def own_id(value: object, what: str) -> int | str:
    """An id as the user's file has it: a whole number of any size (whole floats pass) or text.

    Raises DataError for anything else; `what` names it.
    """
    if type(value) is int or is_text(value):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise DataError(f"{what} must be a whole number or text, but is {short(value)}: correct it")


def is_finite_number(value: object) -> bool:
    """An int or float between -LARGEST and LARGEST; NaN is not."""
    return type(value) in (int, float) and -LARGEST < value < LARGEST  # pyright: ignore[reportOperatorIssue]


def finite_number(text: str) -> float | None:
    """The number that a text is, or None where it is none, or not finite; float() alone takes 1_0 for 10."""
    try:
        value = float("nan" if "_" in text else text)
    except ValueError:
        return None
    return value if is_finite_number(value) else None


def is_text(value: object) -> TypeGuard[str]:
    """A string of more than blanks, in one line, without control characters."""
    return isinstance(value, str) and bool(value.strip()) and _UNPRINTABLE.search(value) is None


def short(value: object) -> str:
    """`value` for a message: in one line, of bounded length and depth."""
    text = repr(value) if isinstance(value, str | int | float | None) else _SHORT.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def inner_name(value: object, what: str) -> str:
    """A file name, maybe with folders, that stays below the folder it is looked up in; its links: `check_inside`.

    Raises DataError if it is no text, is empty, absolute, or climbs up by `..`.
    """
    if not is_text(value):
        raise DataError(f"{what} must be the name of a file, but is {short(value)}: correct it")
    if value != ".." and _PLAIN.fullmatch(value):  # a second faster for COCO's 118,287 names
        return value
    for flavour in (PurePosixPath, PureWindowsPath):
        name = flavour(value)
        if name.is_absolute() or name.drive or name.root or ".." in name.parts:
            raise DataError(f"{what} is {short(value)}, which leaves the data set's folder: name a file inside it")
    return value


def relative_inside(value: object, root: Path) -> str | None:
    """An absolute path to a file inside the data set's folder, relative to that; None for any other name."""
    if not isinstance(value, str) or not os.path.isabs(value) or not is_text(value):
        return None
    path = os.path.normpath(value)
    tops = (os.path.abspath(root), os.path.realpath(root))
    top = next((top for top in tops if path.startswith(top.rstrip(os.sep) + os.sep)), None)
    return None if top is None else os.path.relpath(path, top)


def check_inside(paths: Iterable[Path], folder: Path, root: Path) -> None:
    """Raises DataError for the first of the paths, all below `folder`, that is or lies below a symbolic link to a place
    outside both `root`, the data set's folder, and `folder`. These two may themselves be links.

    118k images take half a second: folders are resolved once each, and files only if they are links.
    """
    tops = [os.path.realpath(top) for top in (root, folder)]
    checked: set[str] = set()
    for path in map(os.fspath, paths):
        parent = os.path.dirname(path)
        places = [*([] if parent in checked else [parent]), *([path] if os.path.islink(path) else [])]
        checked.add(parent)
        for place in places:
            real = os.path.realpath(place)
            if not any(real == top or real.startswith(top.rstrip(os.sep) + os.sep) for top in tops):
                raise DataError(
                    f"{place} leads by a symbolic link to {real}, outside the data set's folder {root}: put the file "
                    "itself there, or set data.root to a folder that holds both"
                )


def tried(read: Callable[..., T], *arguments: Any) -> T | DataError:
    """What `read` gives or raises, for `all_sound`."""
    try:
        return read(*arguments)
    except DataError as error:
        return error


def all_sound(results: Sequence[T | DataError], kind: str) -> list[T]:
    """The results. Raises the first DataError among them, with how many more there are."""
    errors = [result for result in results if isinstance(result, DataError)]
    if errors:
        more = len(errors) - 1
        also = f" ({more} more of the {len(results)} {kind} fail{'s' * (more == 1)} too)" if more else ""
        raise DataError(f"{errors[0]}{also}")
    return [result for result in results if not isinstance(result, DataError)]


def check_images(
    paths: Sequence[Path], folder: Path, root: Path, sizes: Sequence[Size | None], where: Sequence[str]
) -> tuple[Array, Array]:
    """Reads the header and the end of every file below `folder`, and decodes those whose end is not the usual one.

    sizes: (height, width) that the annotations give, or None. where: what to call each image's entry in a message.
    A size that is the file's only without its EXIF rotation means that the boxes were drawn on the stored pixels: that
    file is then read without the rotation.

    Returns (N, 2) int32, height and width of each image as it is to be read, and (N,) uint8, the EXIF orientation to
    read it with. Raises DataError for the first file that is missing, truncated, no image, of another size, or outside
    of the data set.
    """
    check_inside(paths, folder, root)

    def part(at: int) -> list[ImageHeader | DataError]:
        rows = slice(at, at + PART)
        return [tried(_check_image, *row) for row in zip(paths[rows], sizes[rows], where[rows], strict=True)]

    with ThreadPoolExecutor(THREADS) as pool:
        results = [result for results in pool.map(part, range(0, len(paths), PART)) for result in results]
    headers = all_sound(results, "images")
    return (
        np.array([header.size for header in headers], dtype=np.int32).reshape(-1, 2),
        np.array([header.orientation for header in headers], dtype=np.uint8),
    )


def check_boxes(truth: Annotations, strict: bool) -> tuple[Array, Array, Array]:
    """Of A boxes: kept (A,) bool, not degenerate; trained (A,) bool, kept and large enough to train on; clipped (A, 4)
    float64 x1 y1 x2 y2 inside the image.

    Raises DataError for an annotated set without a single usable box, and, if `strict`, for what is otherwise mended
    and named in one DataWarning.
    """
    limits = truth.sizes[truth.truth_images][:, [1, 0, 1, 0]].astype(np.float64)
    xywh = truth.truth_boxes
    corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    clipped = np.clip(corners, 0, limits)
    inside = clipped[:, 2:] - clipped[:, :2]
    kept = np.all(np.concatenate([xywh[:, 2:], inside], axis=1) > 0, axis=1)
    trained = kept & np.all(inside >= MIN_SIDE, axis=1) & (truth.truth_areas > 0)
    leaving = kept & np.any((corners < -ROUNDING) | (corners > limits + ROUNDING), axis=1)
    clipping = _finding(truth, leaving, "reaching out of the image, clipped")
    # Of json alone, the one form with a width to mistake. By chance few sets leave their images and fit so as corners.
    mostly = truth.unit == "annotation" and leaving.sum() > len(xywh) / 2
    if mostly and np.all((xywh >= 0) & (xywh <= limits + ROUNDING)) and np.all(xywh[:, 2:] > xywh[:, :2]):
        clipping += ": these look like corners x1, y1, x2, y2, but COCO's are x, y, width, height"
    findings = [
        clipping,
        _finding(truth, ~kept, "without any area in the image, dropped"),
        _finding(truth, kept & ~trained, "below 1 pixel or of area 0, not trained on"),
    ]
    found = "; ".join(finding for finding in findings if finding)
    if found and strict:
        raise DataError(f"{truth.source}: {found}: correct them, or set data.strict=false to accept this")
    if found:
        warn(truth.source, found)
    if truth.annotated and not kept.any():
        what = "usable boxes" if len(xywh) else "boxes"
        raise DataError(
            f"{truth.source} holds no {what} of {listed(truth.classes, 5)}: add some, or choose other classes by "
            "data.classes"
        )
    return kept, trained, clipped


def _check_image(path: Path, expected: Size | None, where: str) -> ImageHeader:
    header = read_header(path)
    if expected is not None and expected != header.size:
        if expected != header.stored_size:
            height, width = header.size
            raise DataError(
                f"{where} says width {expected[1]} and height {expected[0]}, but {path} is {width} x {height}: "
                "its boxes would not fit; correct the size or replace the file"
            )
        header = replace(header, orientation=1)
    if not header.ends:
        read_image(path, header.orientation)
    return header


def _finding(truth: Annotations, chosen: Array, what: str) -> str:
    """'2 boxes reaching out ... (annotation 7 of a.jpg, annotation 9 of b.jpg)', or '' for none."""
    count = int(chosen.sum())
    if count == 0:
        return ""
    named = ", ".join(truth.box_name(int(index)) for index in np.flatnonzero(chosen)[:NAMED])
    more = ", ..." if count > NAMED else ""
    return f"{count} {'box' if count == 1 else 'boxes'} {what} ({named}{more})"
