"""Image files -> uint8 RGB tensors, by torchvision.io; headers, BMP and TIFF, which it cannot decode, by Pillow.

What comes out, by kind of file:
- grayscale (1 to 16 bits) and palette: the same picture in three channels.
- RGBA, or any other transparency: the colours as stored, alpha dropped (as torchvision, Pillow and OpenCV do), not
  composited on a background.
- CMYK and YCCK JPEG: Adobe's inverted inks, as every CMYK JPEG is read by browsers and Pillow.
- 16 bits a channel: the high byte, 40000 -> 156 (Pillow's conversion would saturate it to 255); of pictures that use
  fewer of the 16 bits (data.bits) the highest eight of those.
- EXIF orientation: turned upright. Animations: the first frame.
"""

from __future__ import annotations

import os
import re
import stat
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image

from msil.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")
LARGEST = 2**26  # pixels of one image, 67 million: decoded, they take 200 MB, and some 1 GB in the net
ENDS = {"JPEG": b"\xff\xd9", "PNG": b"\x00\x00\x00\x00IEND\xaeB`\x82"}  # last bytes of a complete file

BMP_START = b"BM"
PNG_START = b"\x89PNG"
TIFF_STARTS = (b"II", b"MM")

# EXIF orientation: whether rows and columns are exchanged, then the axes of (C, H, W) to flip. 6 is a quarter turn
# clockwise, 8 one counter-clockwise.
UPRIGHT = {
    2: (False, (2,)), 3: (False, (1, 2)), 4: (False, (1,)),
    5: (True, ()), 6: (True, (2,)), 7: (True, (1, 2)), 8: (True, (1,)),
}  # fmt: skip

# Pillow warns of damaged EXIF, and of sizes that are errors here, without naming the file.
warnings.filterwarnings("ignore", module=r"PIL\.")


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
    """By Pillow, which reads the header alone; `ends` by the last bytes of a JPEG or PNG.

    Raises DataError, naming the file, if it is missing, empty, no image that we read, or of too many pixels.
    """
    with _opened(path) as file:
        return _header(file, path)


def read_image(path: Path, orientation: int | None = None, bits: int = 16) -> Tensor:
    """(3, H, W) uint8 RGB in 0..255, H and W after the rotation.

    orientation: EXIF's 1..8, what to do with the stored pixels; None: what the file itself says.
    bits: of a 16-bit file, how many hold the picture, 8..16; higher values are white.
    Raises DataError, naming the file, if it is missing, truncated, damaged, of an unknown kind, or of too many pixels
    (more than LARGEST): nothing is decoded before the header is checked.
    """
    import torch  # here, as it takes seconds, in which a folder without a data set could be refused
    from torchvision.io import ImageReadMode, decode_image

    with _opened(path) as file:
        header = _header(file, path)
        file.seek(0)
        content = np.empty(os.fstat(file.fileno()).st_size, dtype=np.uint8)
        content = content[: file.readinto(content.data)]
    try:
        start = content[:4].tobytes()
        if start == PNG_START:
            _check_png(content.tobytes())
        if start[:2] in (BMP_START, *TIFF_STARTS):
            image = _decode_by_pillow(path, bits)
        else:
            image = decode_image(torch.from_numpy(content), mode=ImageReadMode.RGB)
    # torchvision raises RuntimeError; Pillow the rest, SyntaxError and MemoryError for damaged headers included
    except (RuntimeError, OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
        reason = re.sub(r"^.*\.cpp:\d+, ", "", str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise DataError(
            f"image file {path} is truncated, damaged or of an unknown kind ({reason.rstrip('.')}): "
            "replace it with an intact copy"
        ) from None
    if image.ndim == 4:  # an animation: (frames, 3, H, W)
        image = image[0]
    if image.dtype == torch.uint16:
        image = (image.to(torch.int32) >> (bits - 8)).clamp(max=255).to(torch.uint8)
    return upright(image, header.orientation if orientation is None else orientation)


def is_16_bit(path: Path) -> bool:
    """Whether a file holds 16 bits a channel: of a PNG by its header, of others by Pillow's mode."""
    with _opened(path) as file:
        start = file.read(25)
    if start[:4] == PNG_START:
        return start[24:] == b"\x10"
    with Image.open(path, formats=FORMATS) as image:
        return image.mode.startswith("I;16")


def _check_png(content: bytes) -> None:
    """Raises ValueError where a chunk's checksum is wrong; torchvision's decoder would crash the process there."""
    start, kind = 8, b""
    while start + 12 <= len(content) and kind != b"IEND":
        length = int.from_bytes(content[start : start + 4], "big")
        kind = content[start + 4 : start + 8]
        end = start + 8 + length
        if zlib.crc32(content[start + 4 : end]) != int.from_bytes(content[end : end + 4], "big"):
            raise ValueError("a PNG chunk has a wrong checksum")
        start = end + 4


def upright(image: Tensor, orientation: int) -> Tensor:
    """(C, H, W) as stored -> (C, H, W) or (C, W, H) as it is to be seen. EXIF 2.3, tag 0x0112."""
    if orientation == 1:
        return image
    transposed, flipped = UPRIGHT[orientation]
    return (image.transpose(1, 2) if transposed else image).flip(flipped).contiguous()


def _decode_by_pillow(path: Path, bits: int) -> Tensor:
    import torch

    with Image.open(path, formats=("BMP", "TIFF")) as image:
        image.load()
        if image.mode.startswith("I;16"):
            gray = (np.asarray(image).astype(np.int32) >> (bits - 8)).clip(max=255).astype(np.uint8)
            pixels = np.stack([gray] * 3, axis=-1)
        elif image.mode in ("I", "F"):
            raise ValueError(f"Pillow's mode {image.mode}, numbers whose range is not known")
        else:
            pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    """Raises DataError, naming the file, for what goes wrong in opening or reading it."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a named pipe would block
            raise OSError("it is not a regular file")
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError:
        raise DataError(f"image file {path} is missing: put it there, or take it out of the annotations") from None
    except (OSError, ValueError, MemoryError) as error:  # ValueError: a name that no file system can hold
        raise DataError(f"image file {path} cannot be read ({error}): mend it or its name") from None


def _header(file: BufferedReader, path: Path) -> ImageHeader:
    try:
        with Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            # A TIFF's size is upright already. Image.getexif would decode a PNG without EXIF.
            block = image.info.get("exif")
            orientation = _orientation(block) if block and image.format != "TIFF" else 1
            end = ENDS.get(image.format or "")
    except Image.DecompressionBombError:
        raise DataError(_too_large(path, "far too many pixels")) from None
    except Exception:  # of a damaged file, Pillow's readers raise anything
        empty = path.stat().st_size == 0
        reason = "is empty (0 bytes)" if empty else f"has no valid header of a {', '.join(FORMATS)} file"
        raise DataError(f"image file {path} {reason}: replace it with an intact copy") from None
    if height * width > LARGEST:
        raise DataError(_too_large(path, f"{width} x {height} pixels"))
    if end is None:
        return ImageHeader((height, width), orientation, ends=False)
    file.seek(max(0, file.seek(0, os.SEEK_END) - len(end)))
    return ImageHeader((height, width), orientation, ends=file.read() == end)


def _orientation(block: bytes) -> int:
    """The orientation (1..8) in an EXIF block; 1 if it has none or is damaged, as viewers take it."""
    exif = Image.Exif()
    try:
        exif.load(block)
        value = exif.get(ExifTags.Base.Orientation, 1)
    except Exception:  # of a damaged block, Pillow's reader raises anything
        return 1
    return value if value in range(1, 9) else 1


def _too_large(path: Path, size: str) -> str:
    return (
        f"image file {path} has {size}, more than the {LARGEST // 10**6} million that one image may have: "
        "make it smaller, with its boxes, or cut it into tiles"
    )
