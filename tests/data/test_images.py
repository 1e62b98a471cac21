"""Every kind of image file, with the pixel values worked out by hand."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode, decode_image

from msil.data.images import is_16_bit, read_header, read_image
from msil.errors import DataError

from .files import chunk, png, quadrants


def pixels(path: Path) -> list[list[list[int]]]:
    """(H, W, 3) nested lists of what read_image gives."""
    image = read_image(path)
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3
    assert tuple(image.shape[1:]) == read_header(path).size
    return image.permute(1, 2, 0).tolist()


def gray(*values: int) -> list[list[int]]:
    return [[value] * 3 for value in values]


PALETTE = chunk(b"PLTE", bytes([255, 0, 0, 0, 200, 0, 10, 20, 30]))
COLOURS = [[10, 20, 30], [255, 0, 0], [0, 200, 0]]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (png(2, 1, 8, 2, [bytes([1, 2, 3, 250, 251, 252])]), [[1, 2, 3], [250, 251, 252]]),
        (png(2, 1, 1, 0, [bytes([0b10000000])]), gray(255, 0)),
        (png(2, 1, 2, 0, [bytes([0b01100000])]), gray(85, 170)),  # 1/3 and 2/3 of 255
        (png(2, 1, 4, 0, [bytes([0x3F])]), gray(51, 255)),  # 3/15 of 255
        (png(2, 1, 8, 0, [bytes([7, 200])]), gray(7, 200)),
        (png(2, 1, 16, 0, [struct.pack(">2H", 40000, 256)]), gray(156, 1)),  # 40000 = 156 * 256 + 64
        (png(3, 1, 8, 3, [bytes([2, 0, 1])], PALETTE), COLOURS),
        (png(3, 1, 8, 3, [bytes([2, 0, 1])], PALETTE, chunk(b"tRNS", bytes([0, 128, 255]))), COLOURS),
        # alpha is dropped, not composited
        (png(2, 1, 8, 6, [bytes([10, 20, 30, 0, 40, 50, 60, 128])]), [[10, 20, 30], [40, 50, 60]]),
        (png(2, 1, 8, 4, [bytes([10, 0, 20, 128])]), gray(10, 20)),
        # 16 bits: 40000 -> 156, 255 -> 0, 65535 -> 255, 300 -> 1
        (png(2, 1, 16, 2, [struct.pack(">6H", 40000, 255, 65535, 0, 300, 512)]), [[156, 0, 255], [0, 1, 2]]),
        (png(1, 1, 16, 6, [struct.pack(">4H", 40000, 255, 65535, 7)]), [[156, 0, 255]]),
    ],
)
def test_pngs(tmp_path: Path, content: bytes, expected: list[list[int]]) -> None:
    (tmp_path / "a.png").write_bytes(content)
    assert pixels(tmp_path / "a.png") == [expected]


def test_cmyk_jpeg_is_read_as_inverted_inks_with_or_without_adobes_marker(tmp_path: Path) -> None:
    inks = np.zeros((8, 8, 4), dtype=np.uint8)
    inks[..., 0], inks[..., 3] = 200, 50
    Image.fromarray(inks, "CMYK").save(tmp_path / "a.jpg", quality=100)  # Pillow stores 255 - ink, as Adobe does
    # red = (255 - 200) * (255 - 50) / 255 = 44.2, green = blue = 255 * (255 - 50) / 255 = 205
    assert pixels(tmp_path / "a.jpg") == [[[44, 205, 205]] * 8] * 8
    data = (tmp_path / "a.jpg").read_bytes()
    at = data.index(b"\xff\xee")
    assert data[at + 4 : at + 9] == b"Adobe"
    (tmp_path / "b.jpg").write_bytes(data[:at] + data[at + 16 :])
    assert pixels(tmp_path / "b.jpg") == [[[44, 205, 205]] * 8] * 8


def test_other_formats(tmp_path: Path) -> None:
    colours = np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8)
    for name in ("a.bmp", "a.tif", "a.webp"):
        Image.fromarray(colours).save(tmp_path / name, lossless=True)
        assert pixels(tmp_path / name) == colours.tolist()
    Image.fromarray(np.array([[40000, 256, 255]], dtype=np.uint16)).save(tmp_path / "b.tif")
    # 12 bits: 4095 -> 255, 2049 = 128 * 16 + 1 -> 128, 40000 is more than white
    (tmp_path / "b.png").write_bytes(png(3, 1, 16, 0, [struct.pack(">3H", 4095, 2049, 40000)]))
    Image.fromarray(np.array([[4095, 2049, 40000]], dtype=np.uint16)).save(tmp_path / "d.tif")
    for name in ("b.png", "d.tif"):
        assert is_16_bit(tmp_path / name)
        assert read_image(tmp_path / name, bits=12).tolist() == [[[255, 128, 255]]] * 3
    assert pixels(tmp_path / "b.tif") == [gray(156, 1, 0)]
    Image.fromarray(np.array([[0.5]], dtype=np.float32)).save(tmp_path / "c.tif")
    with pytest.raises(DataError, match=r"c\.tif .*range is not known"):
        read_image(tmp_path / "c.tif")
    frames = [Image.new("RGB", (3, 2), (value, 0, 0)) for value in (10, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert pixels(tmp_path / "a.gif") == [[[10, 0, 0]] * 3] * 2  # the first


# Stored: 1 2 3 / 4 5 6. What EXIF says of the stored first row and first column -> how it must be seen.
UPRIGHT = {
    1: [[1, 2, 3], [4, 5, 6]],  # row: top, column: left
    2: [[3, 2, 1], [6, 5, 4]],  # top, right
    3: [[6, 5, 4], [3, 2, 1]],  # bottom, right
    4: [[4, 5, 6], [1, 2, 3]],  # bottom, left
    5: [[1, 4], [2, 5], [3, 6]],  # left, top
    6: [[4, 1], [5, 2], [6, 3]],  # right, top
    7: [[6, 3], [5, 2], [4, 1]],  # right, bottom
    8: [[3, 6], [2, 5], [1, 4]],  # left, bottom
}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path: Path, orientation: int) -> None:
    expected = [gray(*row) for row in UPRIGHT[orientation]]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.array([[1, 2, 3], [4, 5, 6]], dtype=np.uint8))
    for name in ("a.png", "a.webp", "a.tif"):
        stored.convert("RGB").save(tmp_path / name, exif=exif, lossless=True)
        assert pixels(tmp_path / name) == expected
    assert read_image(tmp_path / "a.png", orientation=1).tolist() == [UPRIGHT[1]] * 3
    path = tmp_path / "a.jpg"
    Image.fromarray(quadrants()).save(path, exif=exif, quality=100)
    image = read_image(path)
    assert torch.equal(image, decode_image(str(path), mode=ImageReadMode.RGB, apply_exif_orientation=True))
    with Image.open(path) as file:
        turned = np.array(ImageOps.exif_transpose(file))
    assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - turned).max() <= 2  # another JPEG library
    assert (read_header(path).stored_size, read_header(path).size) == ((16, 32), turned.shape[:2])


def test_headers_of_whole_and_truncated_files(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    for name in ("a.jpg", "a.png"):
        noise.save(tmp_path / name)
        header = read_header(tmp_path / name)
        assert (header.stored_size, header.ends) == ((30, 40), True)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        assert not read_header(tmp_path / name).ends
        with pytest.raises(DataError, match=f"{name} is truncated, damaged"):
            read_image(tmp_path / name)
        damaged = bytearray(data)
        damaged[len(data) // 2] ^= 8
        (tmp_path / name).write_bytes(damaged)
        if name == "a.png":  # its checksums tell
            with pytest.raises(DataError, match="a PNG chunk has a wrong checksum"):
                read_image(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<html>not found</html>", "no valid header"),
        (b"\xff\xd8\xff\xd9", "no valid header"),
        (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 5, 8, 2, 0, 0, 0)), "no valid header"),
    ],
)
def test_what_is_no_image(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.jpg .*{message}"):
        read_image(tmp_path / "a.jpg")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for orientation in (None, 1):
        with pytest.raises(DataError, match=r"b\.jpg is missing"):
            read_image(tmp_path / "b.jpg", orientation)
    with pytest.raises(DataError, match="cannot be read"):
        read_image(tmp_path)
