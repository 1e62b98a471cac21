"""mode=train: fit a detector, evaluate it, and say so in result.json."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from msil.analysis.record import write_record
from msil.checkpoints.assemble import detector_from_config
from msil.checkpoints.load import load_weights
from msil.config import Config
from msil.errors import ConfigError
from msil.reporting.figures import draw_curves
from msil.reporting.results import write_json
from msil.training.averaging import AveragedWeights
from msil.training.callbacks import PredictionPictures, Progress, StopOnNaN, Throughput
from msil.training.checkpoint import checkpoint_callbacks
from msil.training.loggers import csv_logger, dashboard_loggers, has_dashboard
from msil.training.module import DetectionModule
from msil.training.record import common, evaluated
from msil.training.setup import make_datamodule, make_metrics, make_trainer


class Preempted(Exception):
    """A signal ended the run before its end (exit code 75)."""


def train(config: Config, values: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Train from scratch, from model.weights or from the last checkpoint; returns what result.json holds."""
    L.seed_everything(config.seed, verbose=False)
    datamodule = make_datamodule(config)
    train, val = datamodule.train, datamodule.val
    detector = detector_from_config(config.model, len(train.classes), config.data.min_size, config.data.max_size)
    resume = _resume_point(run_dir)
    if config.model.weights is not None and resume is None:
        notes = load_weights(detector, config.model.weights, train.classes, to_train=True)
        if rank_zero_only.rank == 0:
            print("; ".join([f"starting from {config.model.weights}", *notes]))
    detector.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    module = DetectionModule(
        detector,
        make_metrics(config, val),
        config.schedule,
        steps_per_epoch=datamodule.steps_per_epoch,
        batch_size=config.data.batch_size,
        accumulate=config.trainer.accumulate,
        describe={"config": values, "classes": list(train.classes), "category_ids": list(train.category_ids)},
    )
    throughput = Throughput()
    resume_step = None if resume is None else _step_of(resume)
    loggers = [csv_logger(run_dir, resume_step), *dashboard_loggers(config, values, run_dir, resume_step)]
    callbacks: list[Any] = [throughput, StopOnNaN(), PredictionPictures(run_dir / "predictions.png", train.classes)]
    if config.trainer.progress_bar:
        callbacks.append(Progress(throughput))
    if config.schedule.ema is not None:
        callbacks.append(AveragedWeights(config.schedule.ema))
    callbacks += checkpoint_callbacks(run_dir / "checkpoints")
    trainer = make_trainer(config, run_dir, loggers=loggers, callbacks=callbacks, total_steps=module.total_steps)
    _fit(trainer, module, datamodule, resume, run_dir)
    train_ended = time.time()
    module.final_evaluation = True
    trainer.validate(module, datamodule=datamodule, verbose=False)
    result = {
        **common(config, values, detector, trainer),
        "metrics": module.final_metrics,
        "images_per_second": throughput.images_per_second,
        "train_seconds": throughput.seconds,
        "total_seconds": throughput.total_seconds,
        "evaluation_seconds": time.time() - train_ended,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "train_images": len(datamodule.train_indices),
        "val_images": datamodule.num_eval,
        "classes": list(train.classes),
    }
    found = module.metrics[0].gathered()  # pyright: ignore
    if trainer.is_global_zero:
        if module.evaluated_at_step != trainer.global_step:  # the training ended between two evaluations
            for logger in trainer.loggers:
                # Under the last step's number, as Lightning logs an evaluation.
                epoch = max(trainer.current_epoch - 1, 0)
                logger.log_metrics({**module.final_metrics, "epoch": epoch}, step=trainer.global_step - 1)
                logger.save()
        draw_curves(run_dir / "metrics.csv", run_dir / "curves.png")
        record = evaluated(found, val, config.data.root)
        write_record(run_dir, record)
        write_json(run_dir / "result.json", result)
        if has_dashboard(loggers):
            from msil.training.panels import show_panels  # late: the other runs need none of it

            show_panels(loggers, result, record, detector, val, max(trainer.global_step - 1, 0))
    return result


def _fit(trainer: L.Trainer, module: DetectionModule, data: L.LightningDataModule, resume: Path | None, run_dir: Path
) -> None:  # fmt: skip
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    except (RuntimeError, KeyError) as error:
        if resume is not None and "state_dict" in str(error):
            raise ConfigError(
                f"{resume} does not fit this net; delete {run_dir} to start again, or set another run_name."
            ) from error
        raise
    except SIGTERMException as end:  # a SystemExit that would pass for success
        raise Preempted("stopped by SIGTERM; the same command continues after the last checkpoint") from end
    except SystemExit as end:  # what Lightning makes of Ctrl-C
        if trainer.interrupted:
            raise KeyboardInterrupt from end
        raise


def _resume_point(run_dir: Path) -> Path | None:
    last = run_dir / "checkpoints" / "last.ckpt"
    return last if last.exists() else None


def _step_of(checkpoint: Path) -> int:
    try:
        return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise ConfigError(
            f"{checkpoint} cannot be read as a checkpoint; delete {checkpoint.parent.parent} to start again, or set"
            " another run_name."
        ) from error
