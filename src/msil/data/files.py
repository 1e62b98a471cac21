"""A split as it lies on disk, and names of files on disks that tell capitals apart."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from msil.data.annotations import Annotations

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
LARGEST_TEXT = 8 * 2**20  # bytes of one image's xml or txt, some 40,000 objects; parsed, it takes ten times as much


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
        self._folders: dict[str, dict[str, str]] = {}

    def find(self, folder: Path, stem: str, endings: Sequence[str]) -> str | None:
        """`stem`, maybe with folders, with the first of the endings (lower case) that a file below `folder` has."""
        # os.path's: the method of a Path raises where a name is too long
        if os.path.isfile(folder / f"{stem}{endings[0]}"):
            return f"{stem}{endings[0]}"
        parent, name = os.path.split(stem)
        files = self._listed(os.path.join(folder, parent))
        found = next((files[name + ending] for ending in endings if name + ending in files), None)
        return None if found is None else os.path.join(parent, found)

    def _listed(self, folder: str) -> dict[str, str]:
        if folder not in self._folders:
            try:
                names = sorted(os.listdir(folder))
            except (OSError, ValueError):
                names = []
            parts = {name: os.path.splitext(name) for name in names}
            self._folders[folder] = {stem + ending.lower(): name for name, (stem, ending) in parts.items()}
        return self._folders[folder]


def names_in(folder: Path, endings: Sequence[str]) -> list[str]:
    """Names of a folder's own files with one of the endings, in any case, sorted; hidden ones are left out."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [name for name in names if not name.startswith(".") and os.path.splitext(name)[1].lower() in endings]
