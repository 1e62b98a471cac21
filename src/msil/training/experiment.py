"""One run: from a typed Config to runs/<run_name>/ with its result."""

from __future__ import annotations

import contextlib
import logging
import warnings
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_only

from msil.config import Config, Mode, config_hash, plain
from msil.errors import ConfigError, UserError
from msil.interruption import Interruption
from msil.lock import locked
from msil.runs import is_finished, lacks_space, no_space, read_result, remove_leftovers, write_bytes
from msil.training.fitting import train
from msil.training.loggers import finish_dashboards
from msil.training.memory import OutOfMemory, is_out_of_memory
from msil.training.peers import PeerLost, lost_peer
from msil.training.testing import test


def run(config: Config, interruption: Interruption | None = None) -> dict[str, Any]:
    """Train and evaluate, or only test, and leave everything in runs_dir/run_name; returns what result.json holds.

    A finished run of the same name and settings is returned as it is, with "skipped": true beside its
    values. An unfinished training goes on from its last checkpoint.
    interruption: what has taken SIGTERM and SIGUSR1 already; None: they are taken here.
    Raises UserError for what the user can mend (Locked where another run works in the folder), TrainingDiverged for
    losses or gradients that are no numbers, Preempted where a signal has stopped it.
    """
    run_dir = Path(config.runs_dir) / config.run_name
    try:
        return _run(config, run_dir, interruption or Interruption())
    except UserError:
        raise
    except Exception as error:
        if lacks_space(error):
            raise no_space(run_dir, None) from error
        if is_out_of_memory(error):
            reason = str(error) or type(error).__name__
            raise OutOfMemory(
                f"out of memory outside of the training and evaluation steps ({reason}): stop other programs, or lower"
                " data.workers."
            ) from error
        if lost_peer(error):
            raise PeerLost(
                f"process {rank_zero_only.rank} of this run lost another one and cannot go on; the same command"
                " continues after the last checkpoint."
            ) from error
        raise


def _run(config: Config, run_dir: Path, interruption: Interruption) -> dict[str, Any]:
    values = plain(config)
    # The ranks above 0 belong to the run that holds the folder.
    holding = locked(run_dir) if rank_zero_only.rank == 0 else contextlib.nullcontext()
    with holding, interruption.watching():
        finished = _finished(run_dir, values)
        if finished is not None:
            return {**finished, "skipped": True}
        if rank_zero_only.rank == 0:
            remove_leftovers(run_dir)
            write_bytes(run_dir / "config.yaml", yaml.safe_dump(values, sort_keys=False).encode())
        _quiet()
        try:
            match config.mode:
                case Mode.train:
                    return train(config, values, run_dir, interruption)
                case Mode.test:
                    return test(config, values, run_dir, interruption)
        except BaseException:
            finish_dashboards(exit_code=1)  # a sweep's next run must not go on in this one
            raise
        finally:
            finish_dashboards()


def _finished(run_dir: Path, values: dict[str, Any]) -> dict[str, Any] | None:
    """The finished result of these very settings; None if there is none yet."""
    settings = run_dir / "config.yaml"
    if not settings.exists():
        return None
    try:
        earlier = config_hash(yaml.load(settings.read_bytes(), _WithoutAliases))
    except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{settings} is damaged: set another run_name or delete that folder.") from error
    if earlier != config_hash(values):
        raise ConfigError(
            f"{run_dir} holds a run with other settings (hash {earlier}, not {config_hash(values)});"
            " set another run_name or delete that folder."
        )
    return read_result(run_dir) if is_finished(run_dir, config_hash(values)) else None


class _WithoutAliases(yaml.SafeLoader):
    """For settings as `_run` writes them: by aliases a few lines could stand for more than fits the memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("settings have no aliases")
        return super().compose_node(parent, index)


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
        r".*checkpoint that ended before the epoch ended.*",  # the sampler goes on where it was
        r".*recommended to use .*sync_dist=True.*",  # what is logged is the mean over the processes already
    ):
        warnings.filterwarnings("ignore", message=message)
