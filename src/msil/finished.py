"""What a run's folder holds: the run of these very settings, finished or not, one that these continue, or another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from msil.config import Config, Mode, Resume, changes, config_hash, plain
from msil.errors import ConfigError, DataError, listed
from msil.reporting.tables import short
from msil.runs import CHECKPOINTS, CONFIG, LAST, RESULT, SETTINGS, earlier_result, is_empty, read_result

# What a run that goes on for more epochs may change besides schedule.epochs; schedule.name: of 2x in the place of 1x.
LONGER = {"schedule.epochs", "schedule.milestones", "schedule.name"}


def title(values: Mapping[str, Any]) -> str:
    """The first line of config.yaml."""
    return f"{SETTINGS}{config_hash(values)}"


def stored_settings(run_dir: Path) -> dict[str, Any] | None:
    """The settings in config.yaml as the run wrote them; None for a file that is missing, damaged or edited."""
    try:
        text = (run_dir / CONFIG).read_text(encoding="utf-8")
        values = yaml.safe_load(text)
        return values if isinstance(values, dict) and text.startswith(title(values)) else None
    except (OSError, ValueError, AttributeError, yaml.YAMLError):  # AttributeError: sections that are none
        return None


def stored_command(run_dir: Path) -> str:
    """The command in the second line of config.yaml; empty where there is none, as of an earlier version."""
    lines = (run_dir / CONFIG).read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[1].removeprefix("# ") if len(lines) > 1 and lines[1].startswith("# ") else ""


def continues(config: Config, run_dir: Path) -> bool:
    """Whether the folder's run goes on for more epochs under `config`; False: it is of these very settings, or empty.

    Raises ConfigError where it is any other run.
    """
    values, file = plain(config), run_dir / CONFIG
    if not file.exists() or is_empty(run_dir):
        return False
    if file.read_bytes().startswith(title(values).encode()):  # and not the YAML, which anybody may have edited
        return False
    # resume=never could train over the longer run.
    if config.resume is Resume.auto and _result(config, run_dir, earlier_result(config.schedule.epochs)) is not None:
        return False
    before = stored_settings(run_dir)
    if before is None:
        raise ConfigError(
            f"{run_dir} holds a run with other settings, and its {CONFIG} was damaged or edited: set another run_name, "
            "or delete that folder."
        )
    if config.resume is Resume.auto and goes_on(before, config, run_dir):
        return True
    differing = changes(before, values)
    max_steps = before["schedule"]["max_steps"]
    what = listed([f"{name}: {short(old)} -> {short(new)}" for name, (old, new) in differing.items()], 5)
    longer = ""
    if "schedule.epochs" in differing and max_steps is not None:
        longer = f" It ends by schedule.max_steps={max_steps}, so more epochs do not continue it."
    elif "schedule.epochs" in differing:
        longer = f" More epochs alone, schedule.epochs above {before['schedule']['epochs']}, continue it."
    own = stored_command(run_dir)
    raise ConfigError(
        f"{run_dir} holds a run with other settings ({what}): give its own{own and f' ({own})'} to continue it, set "
        f"another run_name, or delete that folder.{longer}"
    )


def goes_on(before: Mapping[str, Any], config: Config, run_dir: Path) -> bool:
    """Whether `config` has more epochs, and nothing else, than the run in run_dir, whose settings are `before`."""
    differing, schedule = changes(before, plain(config)), before["schedule"]
    more = differing.keys() <= LONGER and config.schedule.epochs > schedule["epochs"] and schedule["max_steps"] is None
    return more and (run_dir / CHECKPOINTS / LAST).exists()


def finished_result(config: Config) -> dict[str, Any] | None:
    """The result of a finished run with these settings; None where there is none.

    Raises ConfigError where its data have changed since; under resume=never such a run counts as not finished.
    Data that are no longer there are not compared.
    """
    run_dir = Path(config.runs_dir) / config.run_name
    result = _result(config, run_dir, RESULT) or _result(config, run_dir, earlier_result(config.schedule.epochs))
    if result is None:
        return None
    if changed := _changed(config, result.get("data") or {}):
        if config.resume is Resume.never:
            return None
        raise ConfigError(
            f"{run_dir} was finished on other data ({changed} differ): set resume=never to run it again in its place, "
            "or another run_name to keep both."
        )
    return result


def _result(config: Config, run_dir: Path, name: str) -> dict[str, Any] | None:
    """The folder's result of that name where it is of these very settings."""
    result = read_result(run_dir, name)
    return result if result is not None and result["config_hash"] == config_hash(plain(config)) else None


def splits_of(config: Config) -> tuple[str, ...]:
    """The splits that a run reads."""
    data = config.data
    return (data.train_split, data.val_split) if config.mode is Mode.train else (data.split or data.val_split,)


def _changed(config: Config, before: dict[str, Any]) -> str:
    if not before:  # of an earlier version
        return ""
    from msil.data.fingerprint import differing, fingerprint  # late: they take seconds

    try:
        return differing(before, fingerprint(plain(config.data), splits_of(config)))
    except (DataError, OSError, ValueError):
        return ""
