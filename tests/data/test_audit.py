"""The audit's parts that are not one reader's: image files before training starts, and the rule of the boxes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from msil.data.audit import PART, check_images
from msil.errors import DataError

from .files import write_jpeg


def audited(paths: list[Path], sizes: list[Any] | None = None, where: list[str] | None = None) -> list[list[Any]]:
    """[height, width, orientation] of each."""
    root = paths[0].parent
    sizes, orientations = check_images(paths, root, root, sizes or [None] * len(paths), where or [""] * len(paths))
    return [[*size, orientation] for size, orientation in zip(sizes.tolist(), orientations.tolist(), strict=True)]


def cut(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def noise(path: Path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".gif", ".bmp", ".tif"])
def test_truncated_files_are_found_before_training(tmp_path: Path, suffix: str) -> None:
    whole, broken = noise(tmp_path / f"a{suffix}"), noise(tmp_path / f"b{suffix}")
    assert audited([whole], [(30, 40)]) == [[30, 40, 1]]
    cut(broken, 0.6)
    with pytest.raises(DataError, match=rf"b\{suffix}.*replace it"):
        audited([whole, broken])


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_bytes_after_the_end_are_no_truncation_but_zeros_instead_of_it_are(tmp_path: Path, name: str) -> None:
    path = noise(tmp_path / name)
    data = path.read_bytes()
    path.write_bytes(data + b"\0\0made by a camera")
    audited([path])
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) // 2))  # an interrupted download into a reserved file
    with pytest.raises(DataError, match=f"{name} is truncated"):
        audited([path])


def test_the_first_broken_file_is_named_and_the_others_counted(tmp_path: Path) -> None:
    write_jpeg(tmp_path / "a.jpg", 4, 3)
    paths = [tmp_path / "a.jpg"] * (PART + 3)
    for index in (PART - 1, PART + 1, PART + 2):
        paths[index] = tmp_path / f"lost{index}.jpg"
    with pytest.raises(
        DataError, match=rf"lost{PART - 1}\.jpg is missing.*\(2 more of the {PART + 3} images fail too\)"
    ):
        audited(paths)


@pytest.mark.parametrize(
    ("orientation", "expected", "read_as"),
    [
        (6, None, [40, 30, 6]),  # nothing said: upright
        (6, (40, 30), [40, 30, 6]),
        (6, (30, 40), [30, 40, 1]),  # said of the stored pixels: not turned
        (3, (30, 40), [30, 40, 3]),  # half a turn leaves the size: turned as the file says
        (1, (30, 40), [30, 40, 1]),
    ],
)
def test_exif_and_the_size_that_the_annotations_say(
    tmp_path: Path, orientation: int, expected: tuple[int, int] | None, read_as: list[int]
) -> None:
    write_jpeg(tmp_path / "a.jpg", 40, 30, orientation)
    assert audited([tmp_path / "a.jpg"], [expected]) == [read_as]
