"""A run's result.json: written whole or not at all, read only if complete. Standard library alone."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msil.errors import ConfigError
from msil.files import write_bytes

RESULT_FILE = "result.json"

# A result.json that lacks one of these was written by something else, or by half of a run.
REQUIRED_KEYS = (
    "run_name", "status", "config_hash", "seed", "command", "metrics", "parameters", "trainable_parameters", "flops",
    "flops_image_size", "images_per_second", "train_seconds", "total_seconds", "epochs", "steps", "train_images",
    "val_images", "classes", "versions", "machine", "config",
)  # fmt: skip


_MODEL = ("head", "backbone", "msil")
_MAKE_SOME = "python run.py experiment=table1 data=shapes schedule=quick makes some"


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON atomically; NaN and infinities become null, since JSON has no such numbers.

    Raises TypeError for what JSON cannot hold, before anything is written.
    """
    text = json.dumps(_finite(value), indent=2, allow_nan=False, ensure_ascii=False)
    write_bytes(path, (text + "\n").encode())


def read_result(run_dir: str | Path) -> dict[str, Any] | None:
    """The result of a finished run, or None if result.json is missing, unreadable or incomplete."""
    try:
        result = json.loads((Path(run_dir) / RESULT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # ValueError: broken JSON or broken UTF-8
        return None
    if not isinstance(result, dict) or result.get("status") != "finished":
        return None
    if any(key not in result for key in REQUIRED_KEYS):
        return None
    return result if isinstance(result["metrics"], dict) and isinstance(result["config"], dict) else None


def read_results(runs_dir: str | Path) -> list[dict[str, Any]]:
    """The results of all finished runs in runs_dir, by name, each with "folder": where its files are.

    A result.json that is not as a run writes it is left out, with a warning.
    Raises ConfigError if runs_dir is no folder or holds no finished run.
    """
    if not Path(runs_dir).is_dir():
        raise ConfigError(f"{runs_dir} is no folder: name the one that holds the runs' folders; {_MAKE_SOME}.")
    found = []
    for folder in sorted(path.parent for path in Path(runs_dir).glob(f"*/{RESULT_FILE}")):
        result = read_result(folder)
        if result is None or not _usable(result):
            warnings.warn(f"{folder / RESULT_FILE} is damaged or incomplete: that run is left out.", stacklevel=2)
        else:
            found.append((folder, result))
    if not found:
        raise ConfigError(f"no finished run is in {runs_dir}: {_MAKE_SOME}.")
    return [{**result, "folder": str(folder)} for folder, result in found]


def _usable(result: Mapping[str, Any]) -> bool:
    """Whether the values that tables are made of have their types."""
    numbers = [*result["metrics"].values(), *(result[key] for key in ("parameters", "flops", "images_per_second"))]
    config = result["config"]
    model = config.get("model")
    parts = [
        config.get("data"),
        config.get("schedule"),
        *([] if not isinstance(model, dict) else map(model.get, _MODEL)),
    ]
    return (
        all(one is None or (isinstance(one, int | float) and not isinstance(one, bool)) for one in numbers)
        and len(parts) == 2 + len(_MODEL)
        and all(isinstance(part, dict) for part in parts)
        and isinstance(result["seed"], int)
        and isinstance(result["command"], str)
    )


def is_finished(run_dir: str | Path, config_hash: str) -> bool:
    """Whether `run_dir` holds the complete result of a run with these very settings."""
    result = read_result(run_dir)
    return result is not None and result["config_hash"] == config_hash


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
