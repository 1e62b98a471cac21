"""Files that are whole or not there: written beside their place, then moved into it. Standard library alone."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from msil.errors import ConfigError, UserError

PROBE_BYTES = 16384  # about what a sweep writes before its first job
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A new path to write to, which takes the place of `path` once the block ends without an error.

    A reader, or a crash at any moment, sees the old content or the new, never a part. Folders are made as needed. On
    any error the old file stays and the new one is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since os.replace is atomic only inside one file system.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # or a crash could leave the name without the content
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed while they wrote have left below a folder; nobody else may write there."""
    for path in folder.rglob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file in one step; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


class DiskFull(UserError):
    """There is no room for what is to be written."""


def lacks_space(error: BaseException | None) -> bool:
    """Whether a full disk, a quota or a limit on file sizes is behind an error, or behind what it hides."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        error = error.__cause__ or error.__context__
    return False


def no_space(path: str | Path, needed: int | None) -> DiskFull:
    """The sentence for a file that could not be written. needed: its bytes, if known."""
    free = shutil.disk_usage(_existing(Path(path))).free
    wanted = "" if needed is None else f" it needs about {needed / 1e6:,.1f} MB, and"
    return DiskFull(
        f"there is no room for {path}:{wanted} {free / 1e6:,.1f} MB are free there. Make room (or raise the limit on"
        " file sizes) and give the same command again: nothing that was there is lost."
    )


def unusable(folder: Path, error: OSError) -> UserError:
    """The sentence for a folder that cannot be made or written to."""
    if lacks_space(error):
        return no_space(folder, None)
    return ConfigError(
        f"{folder} cannot be used ({error.strerror or error}): mend it, or set runs_dir to another folder."
    )


def probe(folder: Path) -> None:
    """Raises UserError if small files cannot be written to a folder, which is made as needed."""
    try:
        with replacing(folder / "probe") as temporary:
            temporary.write_bytes(bytes(PROBE_BYTES))
        (folder / "probe").unlink()
    except OSError as error:
        raise unusable(folder, error) from error


def _existing(path: Path) -> Path:
    """The nearest folder above a path that is there."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())
