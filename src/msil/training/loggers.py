"""Where numbers and pictures go beside metrics.csv while a run goes on: W&B or TensorBoard, if asked for."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from msil.config import Config, LoggerConfig, LoggerName

TENSORBOARD_FOLDER = "tensorboard"
# Of result.json, beside the metrics: what a run is read by in a dashboard's table of runs.
REPORTED = ("parameters", "trainable_parameters", "flops", "images_per_second", "train_seconds", "total_seconds")


def dashboard_loggers(config: Config, values: Mapping[str, Any], run_dir: Path, resume_step: int | None) -> list[Any]:
    """The logger that config.logger names beside metrics.csv, in a list; none for csv, and none on ranks above 0."""
    if rank_zero_only.rank != 0:
        return []
    match config.logger.name:
        case LoggerName.wandb:
            return [wandb_logger(config.logger, run_dir, config.run_name, values, job_type=config.mode.value)]
        case LoggerName.tensorboard:
            return [tensorboard_logger(run_dir, values, resume_step)]
        case LoggerName.csv:
            return []


def wandb_logger(
    config: LoggerConfig, run_dir: Path, run_name: str, values: Mapping[str, Any], *, job_type: str
) -> WandbLogger:
    """A W&B logger that needs neither account nor network: without them it writes offline and says so once."""
    # Late, as every import of wandb here: it takes half a second that runs without it need not wait for.
    from msil.training import wandb_run

    # Begun here, not by Lightning: it would ask for an offline run by an environment variable that W&B, once asked
    # about the login, no longer reads.
    run = wandb_run.begin(config, run_dir, run_name, values, job_type=job_type, group=config.group)
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return WandbLogger(experiment=run, save_dir=str(run_dir))


def tensorboard_logger(run_dir: Path, values: Mapping[str, Any], resume_step: int | None) -> TensorBoardLogger:
    """Writes run_dir/tensorboard. What an earlier process logged from `resume_step` on is hidden: it is trained again.

    values: the run's settings, shown as a text.
    """
    logger = TensorBoardLogger(str(run_dir), name=TENSORBOARD_FOLDER, version="", purge_step=resume_step or 0)
    logger.hparams = dict(values)  # or Lightning leaves an empty hparams.yaml
    logger.experiment.add_text("settings", _indented(yaml.safe_dump(dict(values), sort_keys=False)), resume_step or 0)
    return logger


def has_dashboard(loggers: Sequence[Any]) -> bool:
    """Whether one of the loggers can show pictures."""
    return any(isinstance(logger, WandbLogger | TensorBoardLogger) for logger in loggers)


def log_pictures(loggers: Sequence[Any], pictures: Mapping[str, np.ndarray], step: int) -> None:
    """Show pictures, uint8 (H, W, 3), by their names wherever pictures can be shown."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            shown = {name: wandb.Image(Image.fromarray(picture)) for name, picture in pictures.items()}
            logger.log_metrics(shown, step=step)  # pyright: ignore[reportArgumentType]
        elif isinstance(logger, TensorBoardLogger):
            for name, picture in pictures.items():
                logger.experiment.add_image(name, picture, step, dataformats="HWC")


def log_result(loggers: Sequence[Any], result: Mapping[str, Any], step: int) -> None:
    """The numbers of result.json: in W&B as the summary, by which it lists and sorts runs; in TensorBoard a text."""
    numbers = {**result["metrics"], **{name: result[name] for name in REPORTED}}
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update(numbers)
        elif isinstance(logger, TensorBoardLogger):
            text = "\n".join(f"{name}: {value}" for name, value in numbers.items())
            logger.experiment.add_text("result", _indented(text), step)


def finish_dashboards(exit_code: int | None = None) -> None:
    """End W&B's run, if one has begun. exit_code: 1 for a run that failed."""
    if "wandb" in sys.modules:
        import wandb

        wandb.finish(exit_code=exit_code)


def _indented(text: str) -> str:
    """What Markdown shows as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())
