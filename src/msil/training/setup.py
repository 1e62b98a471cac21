"""From settings to the objects of a run: data, metrics, Lightning's trainer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only

from msil.config import Config, DataName
from msil.data.module import DetectionDataModule, EvaluationDataModule, build_datasets, build_split
from msil.errors import ConfigError
from msil.metrics.coco import CocoMetric
from msil.metrics.voc import VOCMetric
from msil.training.checkpoint import AtomicCheckpointIO
from msil.training.devices import check_processes, choose_accelerator, cluster_environment, count_on_cpu


def make_trainer(
    config: Config, run_dir: Path, *, loggers: list[Any], callbacks: list[Any], total_steps: int
) -> L.Trainer:
    """Without a GPU, says so and takes the CPU. Raises ConfigError for devices that the machine does not have, or a
    precision that its devices do not have."""
    settings, schedule = config.trainer, config.schedule
    accelerator, note = choose_accelerator(
        settings.accelerator,
        require_gpu=settings.require_gpu,
        cuda=torch.cuda.is_available(),
        mps=torch.backends.mps.is_available(),
    )
    if note is not None and rank_zero_only.rank == 0:
        print(f"warning: {note}", file=sys.stderr, flush=True)
    environment = cluster_environment()
    if settings.precision == "16-mixed" and accelerator == "cpu":  # Lightning would take bf16-mixed and go on
        raise ConfigError(
            "trainer.precision=16-mixed needs a GPU, and this run is on the CPU: set trainer.precision=bf16-mixed or "
            "32-true."
        )
    try:
        trainer = L.Trainer(
            accelerator=accelerator,
            devices=settings.devices if note is None else count_on_cpu(settings.devices),
            num_nodes=settings.num_nodes,
            strategy=settings.strategy,
            precision=settings.precision,  # pyright: ignore[reportArgumentType]
            logger=loggers,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO(), *([] if environment is None else [environment])],
            max_epochs=schedule.epochs,
            max_steps=-1 if schedule.max_steps is None else schedule.max_steps,
            check_val_every_n_epoch=schedule.eval_every,
            gradient_clip_val=schedule.grad_clip,
            log_every_n_steps=5 if total_steps > 100 else 1,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,  # the data module shards, and never evaluates an image twice
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=bool(callbacks),
            default_root_dir=str(run_dir),
        )
    except (MisconfigurationException, ValueError) as error:  # ValueError: SLURM's or torchrun's processes are others
        raise ConfigError(
            f"the settings in trainer do not fit this machine ({error}); see trainer.accelerator, trainer.devices,"
            " trainer.num_nodes and trainer.strategy."
        ) from error
    check_processes(trainer)
    return trainer


def make_datamodule(config: Config) -> DetectionDataModule:
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
        device_transforms=data.device_transforms,
        workers=data.workers,
        eval_images=config.schedule.eval_images,
    )


def make_test_datamodule(config: Config) -> EvaluationDataModule:
    """Of data.split, or data.val_split where that is null; no other split is looked at."""
    data = config.data
    dataset = build_split(
        str(data.name),
        data.root,
        data.split or data.val_split,
        classes=data.classes,
        strict=data.strict,
        num_train=data.num_train,
        num_val=data.num_val,
        image_size=data.image_size,
        seed=data.seed,
    )
    return EvaluationDataModule(
        dataset, eval_batch_size=data.eval_batch_size, workers=data.workers, eval_images=config.schedule.eval_images
    )


def make_metrics(config: Config, val: Any) -> list[CocoMetric | VOCMetric]:
    metrics: list[CocoMetric | VOCMetric] = [CocoMetric(val.annotations)]
    if config.data.name is DataName.voc:
        metrics.append(VOCMetric(val.annotations))
    return metrics
