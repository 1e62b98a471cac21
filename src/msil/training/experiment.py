"""One run: from a typed Config to runs_dir/run_name with its result."""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.utilities import rank_zero_only

from msil.config import Config, Mode, Resume, config_hash, plain
from msil.errors import ConfigError, RunError, UserError
from msil.finished import continues, finished_result, title
from msil.interruption import Interruption
from msil.lock import locked
from msil.runs import (
    BEST,
    CHECKPOINTS,
    CONFIG,
    LAST,
    PREVIOUS,
    RESULT,
    earlier_result,
    read_result,
    remove_if_empty,
    remove_leftovers,
    write_bytes,
)
from msil.training.build import Parts, build
from msil.training.faults import FiniteSteps, explained
from msil.training.loggers import finish_dashboards
from msil.training.result import command, write
from msil.training.start import start_lines, warn


def run(config: Config, interruption: Interruption | None = None) -> dict[str, Any]:
    """Train and evaluate, or only evaluate (mode=test), with every file in runs_dir/run_name; returns what result.json
    holds.

    A finished run of the same name and settings is returned as it is, with "skipped": true beside its values. An
    unfinished training goes on from its last checkpoint, and with a larger schedule.epochs a finished one too.
    interruption: has the handlers of SIGTERM and SIGUSR1 already; None: they are set here.
    Raises UserError for what the user can mend (Locked where another run works in the folder), TrainingDiverged for
    losses or gradients that are not finite, Preempted after a signal, PeerLost where another rank has ended.
    """
    run_dir = Path(config.runs_dir) / config.run_name
    interruption = interruption or Interruption()
    finite = FiniteSteps()
    try:
        # The ranks above 0 belong to the run that holds the folder.
        holding = locked(run_dir) if rank_zero_only.rank == 0 else contextlib.nullcontext()
        with holding, _tidied(run_dir), interruption.watching():
            finished = None if continues(config, run_dir) else finished_result(config)
            if finished is not None:
                return {**finished, "skipped": True}
            _quiet()
            parts = build(config, run_dir, interruption, finite)
            if parts.trainer.is_global_zero:
                claim(config, run_dir)
                warn(parts)
                print("\n".join(start_lines(parts)), flush=True)
            with parts.data.naming_lost_workers():
                if config.mode is Mode.train:
                    fit(parts)
                seconds = evaluate(parts)
            return write(parts, seconds)
    except (UserError, RunError):
        raise
    except Exception as error:
        known = explained(error, config, run_dir, finite.current)
        if known is None:
            raise
        raise known from error


def claim(config: Config, run_dir: Path) -> None:
    """Make the folder that of this run, once nothing could refuse it any more. The result of fewer epochs stays, under
    another name; under resume=never the checkpoints go."""
    values = plain(config)
    remove_leftovers(run_dir)
    if config.mode is Mode.train and config.resume is Resume.never:
        for name in (BEST, LAST, PREVIOUS):
            (run_dir / CHECKPOINTS / name).unlink(missing_ok=True)
    before = read_result(run_dir)
    if before is not None and before["config_hash"] != config_hash(values):
        (run_dir / RESULT).replace(run_dir / earlier_result(before["epochs"]))
    (run_dir / RESULT).unlink(missing_ok=True)
    typed = " ".join(command().splitlines())
    write_bytes(run_dir / CONFIG, f"{title(values)}\n# {typed}\n{yaml.safe_dump(values, sort_keys=False)}".encode())


def fit(parts: Parts) -> None:
    """Train from the beginning or from parts.resume. Raises ConfigError for a checkpoint of another net."""
    try:
        parts.trainer.fit(parts.module, datamodule=parts.data, ckpt_path=parts.resume, weights_only=True)
    except (RuntimeError, KeyError) as error:
        if parts.resume is not None and "state_dict" in str(error):
            raise ConfigError(
                f"{parts.resume} does not fit this net; delete {parts.run_dir} to start again, or set another run_name."
            ) from error
        raise
    except SystemExit as end:  # what Lightning makes of Ctrl-C
        if isinstance(end.__context__, KeyboardInterrupt):  # else somebody else's exit, as submitit's that requeues
            raise KeyboardInterrupt from end
        raise


def evaluate(parts: Parts) -> float:
    """The final evaluation, which leaves module.final_metrics; the seconds that it took."""
    began = time.monotonic()
    parts.module.final_evaluation = True
    parts.trainer.validate(parts.module, datamodule=parts.data, verbose=False)
    return time.monotonic() - began


@contextlib.contextmanager
def _tidied(run_dir: Path) -> Any:
    """Ends W&B's run with the block; one that fails before its first checkpoint or log leaves no folder."""
    try:
        yield
    except BaseException:
        finish_dashboards(exit_code=1)
        if rank_zero_only.rank == 0:
            remove_if_empty(run_dir)
        raise
    finish_dashboards()


def _quiet() -> None:
    """Leave out what Lightning prints on every start and a user of this program can do nothing about."""
    for name in ("lightning.pytorch", "lightning.fabric", "faster_coco_eval"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Few workers, few batches, a loader that is not resumable (the sampler is), sync_dist (the means are logged).
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    for message in (
        r".*directory .* exists and is not empty.*",
        r".*is not configured to use.*litlogger.*",
        r".*This DataLoader will create .* worker processes.*",
        r".*isinstance\(treespec, LeafSpec\).*",
        r".*module\(s\) in eval mode.*",  # frozen norms are
    ):
        warnings.filterwarnings("ignore", message=message)
