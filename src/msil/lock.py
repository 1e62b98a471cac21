"""One process at a time in a folder."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from msil.errors import UserError
from msil.runs import LOCK, unusable

NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)


class Locked(UserError):
    """Another live process works in the folder."""

    exit_code = 73


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other process out of `folder`, which is made as needed, until the block ends.

    The operating system frees the lock of a process that ends, however it ends, also while a forked child of it lives.
    Between hosts this holds on file systems that pass flock on (NFSv4, Lustre mounted with flock); without flock the
    folder is not locked, with a warning on stderr.

    Raises Locked, naming pid and host, where another process holds it, and UserError where it cannot be written to.
    """
    path = folder / LOCK
    # A soft lock would outlive a killed process.
    lock = FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise Locked(
            f"{folder} is in use by another run ({_owner(path)}); wait for it, stop it or set another run_name."
        ) from None
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise unusable(folder, error) from error
        print(f"warning: {folder} cannot be locked ({error}): start no second run in it", file=sys.stderr)
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        try:
            path.write_text(f"pid {os.getpid()} on host {socket.gethostname()} since {since}", encoding="utf-8")
        except OSError as error:
            raise unusable(folder, error) from error
        yield
    finally:
        lock.release()


def owner(folder: Path) -> str | None:
    """The process that works in a folder, in words; None where it has ended. On another host that is not known."""
    found = re.match(r"pid (\d+) on host (\S+)", _owner(folder / LOCK))
    if found is None:
        return None
    pid, host = found.groups()
    if host != socket.gethostname():
        return f"or stopped, pid {pid} on {host}"
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:  # another user's
        pass
    return f"pid {pid}"


def _owner(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace") or "a process that has just begun"
    except OSError:
        return "unknown"
