"""A split as it lies on disk, and names of files on disks that tell capitals apart."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from msil.data.annotations import Annotations
from msil.errors import DataError
from msil.runs import CONFIG, DETECTIONS, SETTINGS

IMAGES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
LARGEST_LIST = 2**28  # bytes, some 5 million names of images
LARGEST_TEXT = 8 * 2**20  # bytes of one image's xml or txt, some 40,000 objects; parsed, it takes ten times as much


class MissingSplit(DataError):
    """A data set has no such split. there: those that it has."""

    def __init__(self, message: str, there: Sequence[str]) -> None:
        super().__init__(message)
        self.there = there


class Split(Protocol):
    """A split that a layout has found."""

    def read(self) -> Annotations:
        """With all classes of the files; the boxes are not audited yet. Raises DataError, naming file and entry."""
        ...

    def files(self) -> tuple[list[Path], list[Path]]:
        """Its annotation files and its image files, which need not be there."""
        ...


class Listings:
    """Files by their names whatever the case of their ending; each folder is listed once."""

    def __init__(self) -> None:
        self._files: dict[str, dict[str, str]] = {}

    def has(self, folder: Path, name: str) -> bool:
        """Whether there is `name`, maybe with folders, below a folder."""
        parent, _, name = name.rpartition("/")
        return self._listed(f"{folder}/{parent}").get(name) == name

    def find(self, folder: Path, stem: str, endings: Sequence[str]) -> str | None:
        """`stem`, maybe with folders, with the first of the endings (lower case) that a file below `folder` has; one in
        lower case goes before others."""
        parent, slash, name = stem.rpartition("/")
        files = self._listed(f"{folder}/{parent}")
        found = [files[name + ending] for ending in endings if name + ending in files]
        found.sort(key=lambda file: os.path.splitext(file)[1] not in endings)
        return parent + slash + found[0] if found else None

    def _listed(self, place: str) -> dict[str, str]:
        """The names in a folder, each also under itself with its ending in lower case."""
        if place not in self._files:
            try:
                names = sorted(os.listdir(place))
            except (OSError, ValueError):
                names = []
            parts = {name: os.path.splitext(name) for name in names}
            lower = {stem + ending.lower(): name for name, (stem, ending) in parts.items()}
            self._files[place] = lower | {name: name for name in names}
        return self._files[place]


def read_file(file: Path, what: str, largest: float = LARGEST_TEXT) -> bytes:
    """The content of an annotation file. Raises DataError, naming it, for what is missing, unreadable or too large."""
    try:
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would block
            raise DataError(f"{file} is not a regular file: put the {what} there")
        if status.st_size > largest:
            large, most = (f"{size / 2**20:.0f} MB" for size in (status.st_size, largest))
            raise DataError(f"{file} is {large} large, more than the {most} of any {what}: replace it")
        return file.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{what} {file} is missing: put it there, or take its name out of the split") from None
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{file} cannot be read ({reason}): replace it with an intact {what}") from None


def read_text(file: Path, what: str, largest: float = LARGEST_TEXT) -> str:
    """As `read_file`, of UTF-8."""
    try:
        return read_file(file, what, largest).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} cannot be read ({error}): replace it with an intact {what}") from None


def names_in(folder: Path, endings: Sequence[str]) -> list[str]:
    """Names of a folder's own files with one of the endings, in any case, sorted; hidden ones are left out."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [name for name in names if not name.startswith(".") and os.path.splitext(name)[1].lower() in endings]


def images_below(root: Path, folder: str = ".") -> list[str]:
    """Image files of a folder and those below it, in order, as names below root; hidden ones, and the pictures that
    this program has written below it, are left out."""
    found = []
    for place, folders, names in os.walk(root / folder):
        folders[:] = sorted(
            name for name in folders if not name.startswith((".", "__MACOSX")) and not _written_here(Path(place, name))
        )
        found += [
            Path(os.path.relpath(os.path.join(place, name), root)).as_posix()
            for name in sorted(names)
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGES
        ]
    return found


def _written_here(folder: Path) -> bool:
    """Whether a folder is of `msil predict`, of a run, or figures/ of `msil data show` or `msil figure`."""
    figures = ("data.png", "heatmap.png", "centers.png") if folder.name == "figures" else ()
    if any((folder / name).is_file() for name in (DETECTIONS, *figures)):
        return True
    try:
        with open(folder / CONFIG, "rb") as file:
            return file.read(len(SETTINGS)) == SETTINGS.encode()
    except OSError:
        return False
