"""Image files -> uint8 RGB tensors, by torchvision.io; Pillow for BMP and TIFF, which torchvision cannot decode.

What comes out, by kind of file:
- grayscale (1 to 16 bits) and palette: the same picture in three channels.
- RGBA, or any other transparency: the colours as stored, alpha dropped (as torchvision, Pillow and OpenCV do), not
  composited on a background.
- CMYK and YCCK JPEG: Adobe's inverted inks, as every CMYK JPEG is read by browsers and Pillow.
- 16 bits a channel: the high byte, 40000 -> 156 (Pillow's conversion would saturate it to 255).
- EXIF orientation: turned upright. Animations: the first frame.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from msil.data.headers import read_content
from msil.errors import DataError

BMP_START = b"BM"
PNG_START = b"\x89PNG"
TIFF_STARTS = (b"II", b"MM")


def read_image(path: Path, orientation: int | None = None) -> Tensor:
    """(3, H, W) uint8 RGB in 0..255, H and W after the rotation.

    orientation: EXIF's 1..8, what to do with the stored pixels; None: what the file itself says.
    Raises DataError, naming the file, if it is missing, truncated, damaged, of an unknown kind, or of too many pixels
    (more than headers.LARGEST): the header is looked at before anything is decoded.
    """
    header, content = read_content(path)
    if orientation is None:
        orientation = header.orientation
    try:
        start = content[:4].tobytes()
        if start == PNG_START:
            _check_png(content.tobytes())
        if start[:2] in (BMP_START, *TIFF_STARTS):
            image = _decode_by_pillow(path)
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
        image = (image.to(torch.int32) >> 8).to(torch.uint8)
    return upright(image, orientation)


def _check_png(content: bytes) -> None:
    """Raises ValueError where a chunk's checksum is wrong; torchvision's decoder would crash the process there."""
    start = 8
    while start + 12 <= len(content):
        length = int.from_bytes(content[start : start + 4], "big")
        end = start + 8 + length
        if zlib.crc32(content[start + 4 : end]) != int.from_bytes(content[end : end + 4], "big"):
            raise ValueError("a PNG chunk has a wrong checksum")
        start = end + 4


def upright(image: Tensor, orientation: int) -> Tensor:
    """(C, H, W) as stored -> (C, H, W) or (C, W, H) as it is to be seen. EXIF 2.3, tag 0x0112."""
    match orientation:
        case 1:
            return image
        case 2:
            turned = image.flip(2)
        case 3:
            turned = image.flip(1, 2)
        case 4:
            turned = image.flip(1)
        case 5:
            turned = image.transpose(1, 2)
        case 6:  # a quarter turn clockwise
            turned = image.transpose(1, 2).flip(2)
        case 7:
            turned = image.transpose(1, 2).flip(1, 2)
        case 8:  # a quarter turn counter-clockwise
            turned = image.transpose(1, 2).flip(1)
        case _:
            raise ValueError(f"orientation must be 1 to 8, not {orientation}")
    return turned.contiguous()


def _decode_by_pillow(path: Path) -> Tensor:
    with Image.open(path, formats=("BMP", "TIFF")) as image:
        image.load()
        if image.mode.startswith("I;16"):
            gray = (np.asarray(image).astype(np.int32) >> 8).astype(np.uint8)
            pixels = np.stack([gray] * 3, axis=-1)
        elif image.mode in ("I", "F"):
            raise ValueError(f"Pillow's mode {image.mode}, numbers whose range is not known")
        else:
            pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
