"""Whether a run has been finished: with these settings, and on the data that are there now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msil.config import Config, Mode, Resume, config_hash, plain
from msil.errors import ConfigError, DataError
from msil.runs import read_result


def finished_result(config: Config) -> dict[str, Any] | None:
    """The result of a finished run with these settings; None where there is none.

    Raises ConfigError where its data have changed since; under resume=never such a run counts as not finished.
    Data that are no longer there are not compared.
    """
    run_dir = Path(config.runs_dir) / config.run_name
    result = read_result(run_dir)
    if result is None or result["config_hash"] != config_hash(plain(config)):
        return None
    if changed := _changed(config, result.get("data") or {}):
        if config.resume is Resume.never:
            return None
        raise ConfigError(
            f"{run_dir} was finished on other data ({changed} differ): set resume=never to run it again in its place, "
            "or another run_name to keep both."
        )
    return result


def splits_of(config: Config) -> tuple[str, ...]:
    """The splits that a run reads."""
    data = config.data
    return (data.train_split, data.val_split) if config.mode is Mode.train else (data.split or data.val_split,)


def _changed(config: Config, before: dict[str, Any]) -> str:
    from msil.data.fingerprint import differing, fingerprint  # late: they take seconds

    try:
        return differing(before, fingerprint(plain(config.data), splits_of(config) if before else ()))
    except (DataError, OSError, ValueError):
        return ""
