"""What W&B and TensorBoard have written, read back without their help where that is possible."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

BLOCK = 32768


def without_login(home: Path) -> dict[str, str]:
    """An environment in which W&B finds no login and writes nothing outside `home`."""
    home.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB") and name != "NETRC"}
    folders = dict.fromkeys(("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"), str(home))
    return {**kept, **folders, "OMP_NUM_THREADS": "1"}


def offline_runs(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*"))


def records(run: Path) -> list[Any]:
    """The records of an offline run's .wandb file: LevelDB's log format behind seven bytes that say W&B."""
    (file,) = run.glob("*.wandb")
    found = []
    for data in _chunks(file.read_bytes()):
        record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
        record.ParseFromString(data)
        found.append(record)
    return found


def begun(run: Path) -> Any:
    """Its record of group, job type, names."""
    return next(record.run for record in records(run) if record.HasField("run"))


def summary(run: Path) -> dict[str, Any]:
    """What was written into the summary beside the last value of each metric."""
    updates = [update for record in records(run) if record.HasField("summary") for update in record.summary.update]
    return {update.key or ".".join(update.nested_key): json.loads(update.value_json) for update in updates}


def table(run: Path, name: str) -> list[dict[str, Any]]:
    """A logged table's rows by its columns."""
    (file,) = (run / "files" / "media" / "table").glob(f"{name}_*.table.json")
    content = json.loads(file.read_text())
    return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]


def events(folder: Path) -> EventAccumulator:
    """A folder's event files as TensorBoard shows them."""
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    reader.Reload()
    return reader


def _chunks(data: bytes) -> Iterator[bytes]:
    place, whole = 7, b""
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:  # no header fits here
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # all of it, or its last part
            yield whole
            whole = b""
