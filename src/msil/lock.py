"""One process at a time in a folder. Standard library alone."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from msil.errors import UserError


class Locked(UserError):
    """Another live process works in the folder (exit code 73)."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds `folder` for this process. Raises Locked, naming pid and host, if another one that lives holds it.

    The system lets go of the lock when its process ends, however it ends, so a stale file hinders nobody.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise Locked(f"{folder} is in use by {file.read().strip() or 'another process'}.") from error
        holder = {"pid": os.getpid(), "host": platform.node(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
        file.truncate(0)
        file.write(json.dumps(holder) + "\n")
        file.flush()
        yield
