"""One run: from a typed Config to runs/<run_name>/ with its result."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import wandb
import yaml
from lightning.pytorch.utilities import rank_zero_only

from msil.config import Config, Mode, config_hash, plain
from msil.errors import ConfigError, UserError
from msil.files import write_bytes
from msil.reporting.results import is_finished, read_result
from msil.training.fitting import train
from msil.training.testing import test


class RunLocked(UserError):
    """Another live process works in the run's folder (exit code 73)."""


def run(config: Config) -> dict[str, Any]:
    """Train and evaluate, or only test, and leave everything in runs_dir/run_name; returns what result.json holds.

    A finished run of the same name and settings is returned as it is, with "skipped": true beside its
    values. An unfinished training goes on after its last whole epoch.
    Raises UserError for what the user can mend, TrainingDiverged for a loss that is no number.
    """
    values = plain(config)
    run_dir = Path(config.runs_dir) / config.run_name
    with _locked(run_dir):
        if rank_zero_only.rank == 0:
            finished = _claim(run_dir, values)
            if finished is not None:
                return {**finished, "skipped": True}
        _quiet()
        try:
            match config.mode:
                case Mode.train:
                    return train(config, values, run_dir)
                case Mode.test:
                    return test(config, values, run_dir)
        except BaseException:
            wandb.finish(exit_code=1)  # a sweep's next run must not go on in this one
            raise
        finally:
            wandb.finish()


@contextlib.contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Keeps a second process out of the folder; ranks above 0 belong to the run that holds it."""
    if rank_zero_only.rank != 0:
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunLocked(f"{run_dir} is in use by another run; wait for it or set another run_name.") from error
        yield


def _claim(run_dir: Path, values: dict[str, Any]) -> dict[str, Any] | None:
    """The finished result of these very settings, or None after writing config.yaml for a run to come."""
    settings = run_dir / "config.yaml"
    if settings.exists():
        earlier = config_hash(yaml.safe_load(settings.read_text()))
        if earlier != config_hash(values):
            raise ConfigError(
                f"{run_dir} holds a run with other settings (hash {earlier}, not {config_hash(values)});"
                " set another run_name or delete that folder."
            )
        if is_finished(run_dir, config_hash(values)):
            return read_result(run_dir)
    write_bytes(settings, yaml.safe_dump(values, sort_keys=False).encode())
    return None


def _quiet() -> None:
    """Leave out what Lightning says on every start and a user of this program can do nothing about."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)
    for message in (
        r".*does not have many workers.*",
        r".*Experiment logs directory .* exists and is not empty.*",
        r".*Checkpoint directory .* exists and is not empty.*",
        r".*The number of training batches .* is smaller than the logging interval.*",
        r".*is not configured to use.*litlogger.*",
        r".*This DataLoader will create .* worker processes.*",
        r".*isinstance\(treespec, LeafSpec\).*",
        r".*module\(s\) in eval mode.*",  # frozen norms are
    ):
        warnings.filterwarnings("ignore", message=message)
