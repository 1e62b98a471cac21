"""One process at a time in a folder, and a word about who it is. Standard library alone."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msil.errors import UserError
from msil.runs import unusable

FILE_NAME = ".lock"
PATIENCE_SECONDS = 0.5  # who only looks whether a folder is held, as msil status does, holds it for a moment

_held: set[int] = set()


class Locked(UserError):
    """Another live process works in the folder."""

    exit_code = 73


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other process out of `folder`, which is made as needed, until the block ends.

    The operating system frees the lock of a process that ends, in whatever way: what a killed one has left locks
    nothing, and a line on stderr tells of it. Between hosts this holds on file systems that pass flock on (NFSv4,
    Lustre mounted with flock); where there is no flock at all, a line on stderr says so.

    Raises Locked, naming pid and host, where another process holds it, and UserError where it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / FILE_NAME, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise unusable(folder, error) from error
    _held.add(descriptor)
    try:
        _acquire(descriptor, folder)
        earlier = _holder(descriptor)
        if earlier:
            print(f"{folder}: the process before ({earlier}) did not end in order; going on", file=sys.stderr)
        try:
            _write(descriptor, _myself())
        except OSError as error:
            raise unusable(folder, error) from error
        try:
            yield
        finally:
            _write(descriptor, {})
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def _acquire(descriptor: int, folder: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    try:
        while not _taken(descriptor) and time.monotonic() < deadline:
            time.sleep(PATIENCE_SECONDS / 10)
        if not _taken(descriptor):
            who = _holder(descriptor) or "a process that just began"
            raise Locked(f"{folder} is in use by another run ({who}); wait for it, stop it or set another run_name.")
    except OSError as error:  # a file system without locks
        print(f"{folder} cannot be locked ({error}): see to it that no second run works in it", file=sys.stderr)


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(descriptor: int) -> str:
    """`pid 12 on host x since ...` of whoever has written the file last; empty if nobody is in the folder."""
    try:
        who = json.loads(os.pread(descriptor, 4096, 0) or b"{}")
        return f"pid {who['pid']} on host {who['host']} since {who['since']}" if who else ""
    except (ValueError, KeyError, TypeError):  # killed while it wrote these few bytes
        return "a process that left no name"


def _myself() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}


def _write(descriptor: int, who: dict[str, Any]) -> None:
    # Overwritten, not emptied first: its place on the disk stays, also when there is no other left.
    content = json.dumps(who).encode()
    os.pwrite(descriptor, content, 0)
    os.ftruncate(descriptor, len(content))


def _close_copies() -> None:
    """In a forked child, such as a data loader's worker: its copy would keep the lock alive if its parent is killed."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_copies)
