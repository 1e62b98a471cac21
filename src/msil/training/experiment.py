"""One run: from a typed Config to runs/<run_name>/ with its result."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
import wandb
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from msil.checkpoints.assemble import detector_from_config
from msil.config import Config, DataName, LoggerName, config_hash, plain
from msil.data.module import DetectionDataModule, build_datasets
from msil.errors import ConfigError, UserError
from msil.evaluation.coco import CocoMetric
from msil.evaluation.voc import VOCMetric
from msil.reporting.figures import draw_curves
from msil.reporting.results import is_finished, read_result, write_bytes, write_json
from msil.training.callbacks import PredictionPictures, Progress, StopOnNaN, Throughput
from msil.training.checkpoint import AtomicCheckpointIO, checkpoint_callbacks
from msil.training.cost import count_flops, count_parameters, padded_size
from msil.training.loggers import csv_logger, wandb_logger
from msil.training.module import DetectionModule

PACKAGES = ("msil", "torch", "torchvision", "lightning", "hydra-core", "omegaconf", "torchmetrics", "pycocotools",
            "faster-coco-eval", "wandb", "numpy")  # fmt: skip


class RunLocked(UserError):
    """Another live process works in the run's folder (exit code 73)."""


class Preempted(Exception):
    """A signal ended the run before its end (exit code 75)."""


def run(config: Config) -> dict[str, Any]:
    """Train, evaluate, and leave everything in runs_dir/run_name; returns what result.json holds.

    A finished run of the same name and settings is returned as it is, with "skipped": true beside its values. An
    unfinished one goes on after its last whole epoch.
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
            return _train_and_evaluate(config, values, run_dir)
        except BaseException:
            wandb.finish(exit_code=1)  # a sweep's next run must not go on in this one
            raise
        finally:
            wandb.finish()


def _train_and_evaluate(config: Config, values: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    L.seed_everything(config.seed, verbose=False)
    datamodule = _datamodule(config)
    train, val = datamodule.train, datamodule.val
    detector = detector_from_config(config.model, len(train.classes), config.data.min_size, config.data.max_size)
    detector.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    module = DetectionModule(
        detector,
        _metrics(config, val),
        config.schedule,
        steps_per_epoch=datamodule.steps_per_epoch,
        batch_size=config.data.batch_size,
        describe={"config": values, "classes": list(train.classes), "category_ids": list(train.category_ids)},
    )
    resume = _resume_point(run_dir)
    throughput = Throughput()
    try:
        trainer = _trainer(config, values, run_dir, resume, throughput, train.classes, module.total_steps)
    except MisconfigurationException as error:
        raise ConfigError(
            f"the settings in trainer do not fit this machine ({error}); see trainer.accelerator, trainer.devices and"
            " trainer.strategy."
        ) from error
    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=resume, weights_only=True)
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
    train_ended = time.time()
    module.final_evaluation = True
    trainer.validate(module, datamodule=datamodule, verbose=False)

    flops_size = padded_size(config.data.min_size, config.data.max_size)
    result = {
        "run_name": config.run_name,
        "status": "finished",
        "config_hash": config_hash(values),
        "seed": config.seed,
        "command": _command(),
        "metrics": module.final_metrics,
        "parameters": count_parameters(detector),
        "trainable_parameters": count_parameters(detector, trainable=True),
        "flops": count_flops(detector, flops_size),
        "flops_image_size": list(flops_size),
        "images_per_second": throughput.images_per_second,
        "train_seconds": throughput.seconds,
        "total_seconds": throughput.total_seconds,
        "evaluation_seconds": time.time() - train_ended,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "train_images": len(datamodule.train_indices),
        "val_images": datamodule.num_eval,
        "classes": list(train.classes),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "machine": _machine(trainer),
        "config": values,
    }
    if trainer.is_global_zero:
        if module.evaluated_at_step != trainer.global_step:  # the training ended between two evaluations
            for logger in trainer.loggers:
                # Under the last step's number, as Lightning logs an evaluation.
                epoch = max(trainer.current_epoch - 1, 0)
                logger.log_metrics({**module.final_metrics, "epoch": epoch}, step=trainer.global_step - 1)
                logger.save()
        draw_curves(run_dir / "metrics.csv", run_dir / "curves.png")
        write_json(run_dir / "result.json", result)
    return result


def _trainer(
    config: Config, values: dict[str, Any], run_dir: Path, resume: Path | None, throughput: Throughput,
    classes: tuple[str, ...], total_steps: int,
) -> L.Trainer:  # fmt: skip
    settings, schedule = config.trainer, config.schedule
    loggers: list[Any] = [csv_logger(run_dir, None if resume is None else _step_of(resume))]
    if config.logger.name is LoggerName.wandb and rank_zero_only.rank == 0:
        loggers.append(wandb_logger(config.logger, run_dir, config.run_name, values))
    callbacks: list[Any] = [throughput, StopOnNaN(), PredictionPictures(run_dir / "predictions.png", classes)]
    if settings.progress_bar:
        callbacks.append(Progress(throughput))
    callbacks += checkpoint_callbacks(run_dir / "checkpoints")
    return L.Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        strategy=settings.strategy,
        precision=settings.precision,  # pyright: ignore[reportArgumentType]
        logger=loggers,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        max_epochs=schedule.epochs,
        max_steps=-1 if schedule.max_steps is None else schedule.max_steps,
        check_val_every_n_epoch=schedule.eval_every,
        gradient_clip_val=schedule.grad_clip,
        log_every_n_steps=5 if total_steps > 100 else 1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # the data module shards, and never evaluates an image twice
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(run_dir),
    )


def _datamodule(config: Config) -> DetectionDataModule:
    data = config.data
    train, val = build_datasets(
        str(data.name),
        data.root,
        data.train_split,
        data.val_split,
        classes=data.classes,
        strict=data.strict,
        num_train=data.num_train,
        num_val=data.num_val,
        image_size=data.image_size,
        seed=data.seed,
    )
    low_high = None if data.multiscale is None else (data.multiscale[0], data.multiscale[1])
    return DetectionDataModule(
        train,
        val,
        batch_size=data.batch_size,
        eval_batch_size=data.eval_batch_size,
        seed=config.seed,
        min_size=data.min_size,
        max_size=data.max_size,
        multiscale=low_high,
        flip=data.flip,
        workers=data.workers,
        eval_images=config.schedule.eval_images,
    )


def _metrics(config: Config, val: Any) -> list[CocoMetric | VOCMetric]:
    ground_truth = val.ground_truth()
    metrics: list[CocoMetric | VOCMetric] = [CocoMetric(ground_truth, val.category_ids)]
    if config.data.name is DataName.voc:
        metrics.append(VOCMetric(ground_truth, val.category_ids))
    return metrics


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


def _machine(trainer: L.Trainer) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "processes": trainer.world_size,
    }


def _command() -> str:
    """What the user would type for this run alone; a sweep's job has two of the launcher's own settings besides."""
    typed = [word for word in sys.argv[1:] if not word.startswith(("hydra.run.dir=", "hydra.mode="))]
    return shlex.join(["python", Path(sys.argv[0]).name, *typed])


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
    ):
        warnings.filterwarnings("ignore", message=message)
