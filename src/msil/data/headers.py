"""Size, EXIF orientation and completeness of an image file, without decoding its pixels.

Reads a few hundred bytes of a JPEG or PNG, so that 118k images are looked at before training starts.
"""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from msil.errors import DataError

FORMATS = "JPEG, PNG, WebP, GIF, BMP or TIFF"
LARGEST = 2**26  # pixels of one image, 67 million: decoded, they take 200 MB, and some 1 GB in the net

JPEG_START = b"\xff\xd8"
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"  # the last chunk, always these 12 bytes
EXIF_PREFIX = b"Exif\x00\x00"
ORIENTATION_TAG = 0x0112

# JPEG markers. Start of frame: C0..CF but for Huffman tables (C4), extensions (C8) and arithmetic coding (CC).
START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
WITHOUT_LENGTH = frozenset(range(0xD0, 0xD9)) | {0x01}
APP1, START_OF_SCAN, END_OF_IMAGE = 0xE1, 0xDA, 0xD9


@dataclass(frozen=True)
class ImageHeader:
    """stored_size: (height, width) of the pixels as they lie in the file.
    orientation: EXIF's 1..8, what must be done to show them upright (1: nothing).
    ends: the format's end marker was seen at the end of the file; False does not yet mean that pixels are missing.
    """

    stored_size: tuple[int, int]
    orientation: int
    ends: bool

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) after the EXIF rotation."""
        height, width = self.stored_size
        return (width, height) if self.orientation >= 5 else (height, width)


def read_header(path: Path) -> ImageHeader:
    """Raises DataError, naming the file, if it is missing, empty, no image that we read, or of too many pixels."""
    header, _ = _read_file(path, whole=False)
    return header


def read_content(path: Path) -> tuple[ImageHeader, NDArray[np.uint8]]:
    """The header and all bytes of a file, which are read only once the header is known to be good. Raises the same."""
    return _read_file(path, whole=True)


def _read_file(path: Path, whole: bool) -> tuple[ImageHeader, NDArray[np.uint8]]:
    content = np.zeros(0, dtype=np.uint8)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a named pipe would wait forever
            raise OSError("it is no file")
        with open(path, "rb") as file:
            header = _accepted(_read(file), path)
            if whole:
                content = np.empty(file.seek(0, os.SEEK_END), dtype=np.uint8)
                file.seek(0)
                content = content[: file.readinto(content.data)]
    except FileNotFoundError:
        raise DataError(f"image file {path} is missing: put it there, or take it out of the annotations") from None
    except Image.DecompressionBombError:  # of Pillow's own limit, above ours
        raise DataError(_too_large(path, "far too many pixels")) from None
    except (OSError, ValueError, MemoryError) as error:  # ValueError: a name that no file system can hold
        raise DataError(f"image file {path} cannot be read ({error}): mend it or its name") from None
    return header, content


def _accepted(header: ImageHeader | None, path: Path) -> ImageHeader:
    if header is None:
        empty = path.stat().st_size == 0
        reason = "is empty (0 bytes)" if empty else f"has no valid header of a {FORMATS} file"
        raise DataError(f"image file {path} {reason}: replace it with an intact copy")
    height, width = header.stored_size
    if height * width > LARGEST:
        raise DataError(_too_large(path, f"{width} x {height} pixels"))
    return header


def _too_large(path: Path, size: str) -> str:
    return (
        f"image file {path} has {size}, more than the {LARGEST // 10**6} million that one image may have: "
        "make it smaller, with its boxes, or cut it into tiles"
    )


def exif_orientation(tiff: bytes) -> int:
    """The orientation (1..8) in an EXIF block that starts with its TIFF header; 1 if it has none or is damaged."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (first,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, first)
        for entry in range(entries):
            at = first + 2 + 12 * entry
            tag, kind = struct.unpack_from(order + "HH", tiff, at)
            if tag == ORIENTATION_TAG:
                (value,) = struct.unpack_from(order + ("I" if kind == 4 else "H"), tiff, at + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:  # offsets beyond the block: viewers ignore such EXIF, and so do we
        return 1
    return 1


def _read(file: BinaryIO) -> ImageHeader | None:
    start = file.read(len(PNG_START))
    if start.startswith(JPEG_START):
        found, end = _read_jpeg(file), b"\xff\xd9"
    elif start == PNG_START:
        found, end = _read_png(file), PNG_END
    else:
        return _read_other(file)
    if found is None:
        return None
    size, orientation = found
    length = file.seek(0, os.SEEK_END)
    file.seek(max(0, length - len(end)))
    return ImageHeader(size, orientation, file.read() == end)


def _read_jpeg(file: BinaryIO) -> tuple[tuple[int, int], int] | None:
    """Walks the segments up to the start of the pixels. ITU-T T.81, annex B."""
    size, orientation, has_exif = None, 1, False
    file.seek(len(JPEG_START))
    while True:
        marker = _next_marker(file)
        if marker is None or marker == END_OF_IMAGE:
            return None
        if marker == START_OF_SCAN:
            return None if size is None else (size, orientation)
        if marker in WITHOUT_LENGTH:
            continue
        length = int.from_bytes(file.read(2), "big") - 2
        if length < 0:
            return None
        after = file.tell() + length
        if marker in START_OF_FRAME:
            frame = file.read(5)
            if len(frame) < 5:
                return None
            height, width = struct.unpack_from(">HH", frame, 1)
            if height == 0 or width == 0:
                return None
            size = (height, width)
        elif marker == APP1 and not has_exif:
            block = file.read(length)
            if block.startswith(EXIF_PREFIX):
                has_exif, orientation = True, exif_orientation(block[len(EXIF_PREFIX) :])
        file.seek(after)


def _next_marker(file: BinaryIO) -> int | None:
    """Skips what is no marker, as libjpeg does; any number of FF bytes may stand before a marker's code."""
    byte = file.read(1)
    while byte and byte != b"\xff":
        byte = file.read(1)
    while byte == b"\xff":
        byte = file.read(1)
    return byte[0] if byte else None


def _read_png(file: BinaryIO) -> tuple[tuple[int, int], int] | None:
    """Walks the chunks up to the pixels. PNG specification, third edition, sections 5.3, 11.2.1 and 11.3.4.6."""
    head = file.read(25)  # IHDR: length, name, 13 bytes, check sum
    if len(head) < 25 or head[4:8] != b"IHDR":
        return None
    width, height = struct.unpack_from(">II", head, 8)
    if height == 0 or width == 0:
        return None
    orientation = 1
    while True:
        chunk = file.read(8)
        if len(chunk) < 8:
            return None
        length, name = struct.unpack(">I4s", chunk)
        if name == b"IDAT":
            return (height, width), orientation
        after = file.tell() + length + 4
        if name == b"eXIf":
            orientation = exif_orientation(file.read(length))
        file.seek(after)


def _read_other(file: BinaryIO) -> ImageHeader | None:
    """Pillow opens lazily: it reads the header alone. `ends` stays False, so the audit decodes such files once."""
    file.seek(0)
    try:
        with Image.open(file, formats=("WEBP", "GIF", "BMP", "TIFF")) as image:
            width, height = image.size
            # Pillow turns a TIFF upright itself, and gives its upright size.
            exif = b"" if image.format == "TIFF" else image.info.get("exif", b"")
    except (OSError, ValueError, SyntaxError):
        return None
    return ImageHeader((height, width), exif_orientation(exif.removeprefix(EXIF_PREFIX)), ends=False)
