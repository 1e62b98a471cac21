"""A file fetched by HTTP, also in several goes, and what the disk says to that."""

from __future__ import annotations

import io
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tqdm import tqdm

from msil import __version__
from msil.errors import ConfigError, UserError
from msil.runs import lacks_space, no_space

PIECE = 2**20  # bytes read at a time
TIMEOUT = 30  # seconds without a byte, after which a connection counts as lost
BAR: dict[str, Any] = {"ncols": 80, "leave": False, "disable": None}
TRIES = 5  # again after a lost connection, without a new byte
WAIT = 1.0  # seconds before the first of them; each further one waits twice as long


def fetch(url: str, part: Path) -> None:
    """Fetch the rest of url into `part`; a lost connection is resumed."""
    size = best = file_size(part)
    total, received, failures = None, False, 0
    with on_disk(part), tqdm(initial=size, unit="B", unit_scale=True, **BAR) as bar:
        while True:
            try:
                answer, size, total = _ask(url, size)
                if total is not None and size < total:
                    check_room(part, 2 * total - size)  # and as much again for the files in it
                bar.total, bar.n = total, size
                bar.set_description("fetching")
                with answer, open(part, "ab") as file:
                    file.truncate(size)
                    while piece := _read(answer):
                        file.write(piece)
                        size += len(piece)
                        bar.update(len(piece))
                        received = True
                if total is None or size == total:
                    return
                raise _Lost("the connection was closed")
            except _Lost as lost:
                failures, best = (0, size) if size > best else (failures, best)
                if not received or failures == TRIES:
                    raise UserError(_advice(url, part, lost, total)) from lost
                bar.set_description("connection lost")
                time.sleep(WAIT * 2**failures)
                failures += 1


class _Lost(Exception):
    """No answer, or not all of it."""


def _advice(url: str, part: Path, lost: _Lost, total: int | None) -> str:
    size, of = file_size(part), "" if total is None else f" of {total / 1e6:,.1f}"
    kept = f" and goes on from the {size / 1e6:,.1f}{of} MB in {part}" if size else ""
    return (
        f"{url} cannot be fetched ({lost}): check the network; the same command tries again{kept}. Or put the file, "
        f"fetched elsewhere, into {part.parent}."
    )


def _ask(url: str, size: int) -> tuple[Any, int, int | None]:
    """The answer for what follows the first `size` bytes, where it starts, 0 or size, and how long the whole is."""
    headers = {"User-Agent": f"msil/{__version__}"} | ({"Range": f"bytes={size}-"} if size else {})
    try:
        answer = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        if error.code == 416 and size:  # nothing follows: all is there, or it is the part of another file
            whole = error.headers.get("Content-Range", "").rpartition("/")[2]
            return (io.BytesIO(), size, size) if whole == str(size) else _ask(url, 0)
        raise _Lost(f"{error.code} {error.reason}") from error
    except (OSError, HTTPException) as error:
        raise _Lost(getattr(error, "reason", error) or type(error).__name__) from error
    start = size if answer.status == 206 else 0
    length = answer.headers.get("Content-Length")
    return answer, start, None if length is None else start + int(length)


def _read(answer: Any) -> bytes:
    try:
        return answer.read1(PIECE)
    except (OSError, HTTPException) as error:
        raise _Lost(error) from error


def file_size(file: Path) -> int:
    """In bytes; of what is no file, 0."""
    return os.path.getsize(file) if os.path.isfile(file) else 0


def check_room(path: Path, needed: int) -> None:
    if needed > shutil.disk_usage(path.parent).free:
        raise no_space(path, needed)


@contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """Raises UserError for what goes wrong with the disk or the folder."""
    try:
        yield
    except OSError as error:
        if lacks_space(error):
            raise no_space(path, None) from error
        reason = f"{error.filename or path} cannot be used ({error.strerror or error})"
        raise ConfigError(f"{reason}: mend that, or name another folder with --root.") from error
