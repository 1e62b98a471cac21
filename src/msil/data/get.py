"""`msil data get`: fetch, check and unpack VOC and COCO from their publishers; files already present are kept."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from msil.data.audit import inner_name, short
from msil.data.download import BAR, check_room, fetch, file_size, on_disk
from msil.data.readers.layouts import located
from msil.errors import DataError, counted, typed
from msil.lock import Locked, locked

# What reading a damaged archive raises.
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError)


class Archive(NamedTuple):
    """A .tar or .zip at `url`, and the files below the set's folder by which it is found unpacked: those of a split,
    and others. md5: as published; None: there is none, and the sums in the zip are what it is checked by."""

    url: str
    md5: str | None
    split: str | None = None
    files: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


class PublicSet(NamedTuple):
    """layout: a data.name. folder: below --root. archives: later ones may need the earlier."""

    layout: str
    folder: str
    train_split: str
    val_split: str
    archives: tuple[Archive, ...]


_VOC = "https://thor.robots.ox.ac.uk/pascal/VOC"
_COCO = "http://images.cocodataset.org"  # its certificate is not for this name
PUBLIC: dict[str, PublicSet] = {
    "voc2007": PublicSet("voc", "VOCdevkit/VOC2007", "trainval", "test", (
        Archive(f"{_VOC}/voc2007/VOCtrainval_06-Nov-2007.tar", "c52e279531787c972589f7e41ab4ae64", "trainval"),
        Archive(f"{_VOC}/voc2007/VOCtest_06-Nov-2007.tar", "b6e924de25625d8de591ea690078ad9f", "test"),
    )),
    "voc2012": PublicSet("voc", "VOCdevkit/VOC2012", "train", "val", (
        Archive(f"{_VOC}/voc2012/VOCtrainval_11-May-2012.tar", "6cd6e144f989b92b3379bac3b3de84fd", "trainval"),
    )),
    "coco2017": PublicSet("coco", ".", "train2017", "val2017", (
        Archive(
            f"{_COCO}/annotations/annotations_trainval2017.zip", None,
            files=("annotations/instances_train2017.json", "annotations/instances_val2017.json"),
        ),
        Archive(f"{_COCO}/zips/val2017.zip", None, "val2017"),
        Archive(f"{_COCO}/zips/train2017.zip", None, "train2017"),
    )),
}  # fmt: skip


def get_data(name: str, root: str | Path) -> Iterator[str]:
    """Put the set `name` of PUBLIC below `root`; the lines to print come as the work goes on.

    An archive is fetched to root/NAME.part, with which a later call goes on, and which goes once it is unpacked. One
    that lies in root under its own name is taken instead, and stays. An archive whose files are there is not fetched;
    a file that is there is not replaced, unless it is empty.

    Raises UserError for a network, a disk or a folder that fails, DataError for an archive that is not as published.
    """
    root, public = Path(root), PUBLIC[name]
    folder = root / public.folder
    with on_disk(root):
        root.mkdir(parents=True, exist_ok=True)
    if any(_unfinished(root, public, archive) for archive in public.archives):
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(root))
            except Locked as error:
                raise Locked(f"another msil data get is filling {root}: wait for it or stop it.") from error
            for archive in public.archives:
                yield from _get(archive, root, public)
    place = f"data={public.layout} {typed('data.root', str(folder))}"
    splits = f"data.train_split={public.train_split} data.val_split={public.val_split}"
    yield f"{name} is in {folder}. To train on it: msil train {place} {splits}"


def _get(archive: Archive, root: Path, public: PublicSet) -> Iterator[str]:
    if not _unfinished(root, public, archive):
        yield f"{archive.name}: its files are there."
        return
    file, part = root / archive.name, _part(root, archive)
    given = file.is_file()
    if not given:
        file = part
        yield f"fetching {archive.url}"
        fetch(archive.url, part)
    try:
        written, other = _unpack(archive, file, root)
        if missing := _missing(root, public, archive):
            raise DataError(f"it lacks files: {missing}")
    except DataError as error:
        if not given:
            part.unlink(missing_ok=True)
        remedy = f"replace {file} by an intact copy" if given else "give the same command to fetch it again"
        raise DataError(f"{archive.name} is not as published ({error}): {remedy}.") from error
    part.unlink(missing_ok=True)
    kept = f"; {other:,} of other sizes, which were there, are left as they were" if other else ""
    yield f"{archive.name}: {counted(written, 'file')} unpacked{kept}."


def _part(root: Path, archive: Archive) -> Path:
    return root / f"{archive.name}.part"


def _unfinished(root: Path, public: PublicSet, archive: Archive) -> bool:
    return _part(root, archive).exists() or bool(_missing(root, public, archive))


def _missing(root: Path, public: PublicSet, archive: Archive) -> str:
    """The first thing missing of what the archive brings; '' if all of it is there."""
    files = [root / public.folder / name for name in archive.files]
    try:
        if archive.split is not None:
            place = {"name": public.layout, "root": root / public.folder}
            annotations, images = located(place, archive.split).files()
            files += [*annotations, *images]
    except DataError as error:
        return str(error)
    return next((f"{file} is missing or empty" for file in files if not file_size(file)), "")


class _Member(NamedTuple):
    name: str
    size: int
    open: Callable[[], Any]


def _unpack(archive: Archive, file: Path, root: Path) -> tuple[int, int]:
    """Check the archive and put its files below root. Returns how many were written, and how many were there already
    with another size. Each appears in one step, once it is whole and its checksum is right.

    Raises DataError for a checksum that is wrong, and for a member that is neither a file nor a folder, or whose name
    leaves root: nothing is then unpacked.
    """
    if archive.md5 is not None:
        with on_disk(file), open(file, "rb") as whole:
            found = hashlib.file_digest(whole, partial(hashlib.md5, usedforsecurity=False)).hexdigest()
        if found != archive.md5:
            raise DataError(f"its MD5 is {found}, not {archive.md5}")
    try:
        with on_disk(root), _opened(file) as content:
            members = _members(content)
            sizes = [file_size(root / member.name) for member in members]
            absent = [member for member, size in zip(members, sizes, strict=True) if not size]
            check_room(file, sum(member.size for member in absent))
            for member in tqdm(absent, "unpacking", unit=" files", **BAR):
                _write(member, root / member.name)
    except _DAMAGED as error:
        raise DataError(f"it is damaged: {error}") from error
    return len(absent), sum(size not in (0, member.size) for member, size in zip(members, sizes, strict=True))


def _opened(file: Path) -> zipfile.ZipFile | tarfile.TarFile:
    return zipfile.ZipFile(file) if ".zip" in file.suffixes else tarfile.open(file, "r:")


def _members(content: zipfile.ZipFile | tarfile.TarFile) -> list[_Member]:
    """The files in an archive; see `_unpack`."""
    if isinstance(content, zipfile.ZipFile):
        files = [entry for entry in content.infolist() if not entry.is_dir()]
        members = [_Member(entry.filename, entry.file_size, partial(content.open, entry)) for entry in files]
    else:
        entries = [entry for entry in content if not entry.isdir()]
        if others := [entry.name for entry in entries if not entry.isreg()]:
            raise DataError(f"its member {short(others[0])} is neither a file nor a folder")
        members = [_Member(entry.name, entry.size, partial(content.extractfile, entry)) for entry in entries]
    for member in members:
        try:
            inner_name(member.name, "")
        except DataError as error:
            raise DataError(f"its member {short(member.name)} would leave the folder") from error
    return members


def _write(member: _Member, path: Path) -> None:
    # Not `msil.runs.replacing`, which waits for the disk: COCO has 118,287 files.
    temporary = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with member.open() as source, open(temporary, "wb") as copy:
            shutil.copyfileobj(source, copy)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
