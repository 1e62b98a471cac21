"""From settings to the objects of a run: data, detector, metrics, callbacks, Lightning's trainer."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only

from msil.checkpoints.assemble import detector_from_config
from msil.checkpoints.load import load_weights
from msil.config import Config, Mode, plain
from msil.data.annotations import AnnotatedImages
from msil.data.fingerprint import differing, fingerprint
from msil.data.module import DetectionDataModule, build_datasets, build_split
from msil.detection.folding import keep_folded
from msil.errors import ConfigError
from msil.finished import splits_of
from msil.interruption import Interruption
from msil.metrics.coco import MAX_DETS, CocoMetric
from msil.metrics.detections import DetectionMetric
from msil.metrics.voc import VOCMetric
from msil.runs import CHECKPOINTS, LAST, PREDICTIONS, git_commit
from msil.training.callbacks import AveragedWeights, PredictionPictures, Progress, SeedSteps, Throughput
from msil.training.checkpoint import AtomicCheckpointIO, SaveLast, best_checkpoint, resume_point
from msil.training.devices import OneStreamDDP, check_graphs, check_processes, choose_devices, cluster_environment
from msil.training.faults import FiniteSteps
from msil.training.loggers import MetricsFile, dashboard_loggers
from msil.training.module import DetectionModule

MOST_ROWS = 100  # that metrics.csv has of a short training's steps
LOG_EVERY = 50  # steps, of a long one


@dataclass(frozen=True)
class Parts:
    """The objects of one run. values: its settings as a plain dict. resume: the checkpoint to go on from."""

    config: Config
    values: dict[str, Any]
    run_dir: Path
    data: DetectionDataModule
    module: DetectionModule
    trainer: L.Trainer
    throughput: Throughput
    resume: Path | None
    resume_step: int | None


def build(config: Config, run_dir: Path, interruption: Interruption, finite: FiniteSteps) -> Parts:
    """Raises UserError for settings, data, weights or devices that do not fit each other, and where every checkpoint
    of the run is damaged."""
    L.seed_everything(config.seed, verbose=False)
    training = config.mode is Mode.train
    values = plain(config)
    data = data_of(config)
    classes = data.val.classes
    detector = detector_from_config(config.model, len(classes), config.data.min_size, config.data.max_size)
    about = {"config": values, "classes": list(classes), "category_ids": list(data.val.category_ids)}
    about["data"] = fingerprint(values["data"], splits_of(config))
    found = resume_point(config.resume, run_dir / CHECKPOINTS) if training else None
    resume, resume_step, described = found or (None, None, about)
    about |= {"git": git_commit(), "continued": schedules_before(described, config.schedule.epochs, resume_step)}
    if changed := data_changes(described, about):
        raise ConfigError(
            f"{resume} cannot be continued on other data: {changed}; delete {run_dir} to start again, or set another "
            "run_name."
        )
    if config.model.weights is not None and resume is None:
        notes = load_weights(detector, config.model.weights, classes, to_train=training)
        if rank_zero_only.rank == 0:
            print("; ".join([f"{'starting from' if training else 'testing'} {config.model.weights}", *notes]))
    detector.lay_out(channels_last=config.trainer.channels_last)
    if not training:
        keep_folded(detector)
    detector.compile_parts(config.trainer.compile, frozen=not training)
    module = DetectionModule(
        detector,
        metrics(config, data.val),
        config.schedule,
        steps_per_epoch=data.steps_per_epoch,
        batch_size=config.data.batch_size,
        describe=about,
    )
    throughput = Throughput()
    rows = MetricsFile(run_dir, resume_step) if training else None
    save = SaveLast(run_dir / CHECKPOINTS / LAST, config.trainer.save_every, interruption)
    callbacks: list[Any] = [finite, throughput, save]
    if data.val.annotated:
        image_ids = data.val.annotations.image_ids[: data.num_eval].tolist()
        callbacks.append(PredictionPictures(run_dir / PREDICTIONS, classes, image_ids))
    if config.trainer.progress_bar:
        callbacks.append(Progress(rows, bar=sys.stdout.isatty()))
    if rows is not None:
        callbacks += [SeedSteps(config.seed), best_checkpoint(run_dir / CHECKPOINTS)]
        if config.schedule.ema is not None:
            callbacks.append(AveragedWeights(config.schedule.ema))
    dashboards = dashboard_loggers(config, values, run_dir, resume_step)
    trainer = make_trainer(
        config,
        run_dir,
        logger=[*([] if rows is None else [rows]), *dashboards],
        callbacks=callbacks,
        enable_progress_bar=config.trainer.progress_bar,
        log_every_n_steps=max(1, min(LOG_EVERY, module.total_steps // MOST_ROWS)),
    )
    check_graphs(config.trainer.compile, detector, trainer.strategy.root_device)
    return Parts(config, values, run_dir, data, module, trainer, throughput, resume, resume_step)


def data_of(config: Config) -> DetectionDataModule:
    """To train and evaluate on; with mode=test data.split, or data.val_split where that is null, and no other split."""
    data, named = config.data, plain(config.data)
    if config.mode is Mode.train:
        train, val = build_datasets(named, data.train_split, data.val_split)
    else:
        train, val = None, build_split(named, data.split or data.val_split, complete=False)
    return DetectionDataModule(
        data,
        val,
        train,
        seed=config.seed,
        accumulate=config.trainer.accumulate,
        eval_images=config.schedule.eval_images,
    )


def data_changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """How the data of a checkpoint differ from today's, in words; '' where they are the same."""
    if before["classes"] != now["classes"]:
        return f"its classes were {', '.join(before['classes'])}, and now are {', '.join(now['classes'])}"
    changed = differing(before.get("data", {}), now["data"])
    return f"{changed} differ" if changed else ""


def schedules_before(described: dict[str, Any], epochs: int, step: int | None) -> list[dict[str, Any]]:
    """The shorter schedules by which a training came so far: how many epochs each had, and the steps done by then.

    described: what the checkpoint that it goes on from holds under "msil".
    """
    before = described["config"]["schedule"]["epochs"]
    return [*described.get("continued", ()), *([{"epochs": before, "steps": step}] if before != epochs else [])]


def metrics(config: Config, val: AnnotatedImages) -> list[DetectionMetric]:
    """The first collects the detections of the run; without annotations there are no numbers."""
    if not val.annotated:
        return [DetectionMetric(val.annotations)]
    coco = CocoMetric(val.annotations, config.data.max_dets or MAX_DETS)
    return [coco, VOCMetric(val.annotations)] if val.annotations.layout.startswith("VOC") else [coco]


def make_trainer(config: Config, run_dir: Path, **given: Any) -> L.Trainer:
    """given: other arguments of the Trainer.

    Raises ConfigError for devices that the machine does not have, or a precision that its devices do not have.
    """
    settings, schedule = config.trainer, config.schedule
    accelerator, devices = choose_devices(settings)
    environment = cluster_environment()
    if settings.precision == "16-mixed" and accelerator == "cpu":  # Lightning would take bf16-mixed and go on
        raise ConfigError(
            "trainer.precision=16-mixed needs a GPU, and this run is on the CPU: set trainer.precision=bf16-mixed or "
            "32-true."
        )
    try:
        trainer = L.Trainer(
            accelerator=accelerator,
            devices=devices,
            num_nodes=settings.num_nodes,
            strategy=settings.strategy,
            precision=settings.precision,  # pyright: ignore[reportArgumentType]
            accumulate_grad_batches=settings.accumulate,
            plugins=[AtomicCheckpointIO(), *([] if environment is None else [environment])],
            max_epochs=schedule.epochs,
            max_steps=-1 if schedule.max_steps is None else schedule.max_steps,
            check_val_every_n_epoch=schedule.eval_every,
            gradient_clip_val=schedule.grad_clip,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,  # the data module shards, and never evaluates an image twice
            enable_model_summary=False,
            default_root_dir=str(run_dir),
            **given,
        )
    except (MisconfigurationException, ValueError) as error:  # ValueError: SLURM's or torchrun's processes are others
        raise ConfigError(
            f"the settings in trainer do not fit this machine ({error}); see trainer.accelerator, trainer.devices,"
            " trainer.num_nodes and trainer.strategy."
        ) from error
    if type(trainer.strategy) is DDPStrategy:  # by name, or by `auto` of several devices
        trainer.strategy.__class__ = OneStreamDDP
    check_processes(trainer)
    return trainer
