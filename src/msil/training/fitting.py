"""mode=train: fit a detector, evaluate it, and say so in result.json."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from msil.checkpoints.assemble import detector_from_config
from msil.checkpoints.load import load_weights
from msil.config import Config, Resume
from msil.data.module import DetectionDataModule
from msil.errors import ConfigError
from msil.interruption import Interruption
from msil.metrics.record import write_record
from msil.reporting.pictures import draw_curves
from msil.runs import write_json
from msil.training.averaging import AveragedWeights
from msil.training.callbacks import PredictionPictures, SeedSteps, Throughput
from msil.training.checkpoint import LAST, PREVIOUS, SaveLast, StopEvaluation, best_checkpoint, resume_point
from msil.training.devices import prepare
from msil.training.divergence import FiniteSteps
from msil.training.loggers import dashboard_loggers, has_dashboard
from msil.training.memory import Sizes
from msil.training.metrics_file import MetricsFile
from msil.training.module import DetectionModule
from msil.training.progress import Progress
from msil.training.record import common, evaluated
from msil.training.setup import make_datamodule, make_metrics, make_trainer
from msil.training.step_log import StepLog


def train(config: Config, values: dict[str, Any], run_dir: Path, interruption: Interruption) -> dict[str, Any]:
    """Train from scratch, from model.weights or from the last checkpoint; returns what result.json holds."""
    L.seed_everything(config.seed, verbose=False)
    datamodule = make_datamodule(config)
    train, val = datamodule.train, datamodule.val
    detector = detector_from_config(config.model, len(train.classes), config.data.min_size, config.data.max_size)
    resume, resume_step = _resume(config.resume, run_dir / "checkpoints")
    if config.model.weights is not None and resume is None:
        notes = load_weights(detector, config.model.weights, train.classes, to_train=True)
        if rank_zero_only.rank == 0:
            print("; ".join([f"starting from {config.model.weights}", *notes]))
    prepare(detector, config.trainer)
    module = DetectionModule(
        detector,
        make_metrics(config, val),
        config.schedule,
        steps_per_epoch=datamodule.steps_per_epoch,
        batch_size=config.data.batch_size,
        accumulate=config.trainer.accumulate,
        cuda_graph=config.trainer.cuda_graph,
        describe={"config": values, "classes": list(train.classes), "category_ids": list(train.category_ids)},
    )
    throughput = Throughput()
    step_log = StepLog(throughput)
    loggers = [MetricsFile(run_dir, resume_step), *dashboard_loggers(config, values, run_dir, resume_step)]
    sizes, finite = Sizes(), FiniteSteps(run_dir, config.trainer.nan_policy)
    callbacks: list[Any] = [
        sizes,
        SeedSteps(config.seed),
        throughput,
        finite,
        step_log,
        StopEvaluation(interruption),
        PredictionPictures(run_dir / "predictions.png", train.classes),
    ]
    if config.trainer.progress_bar:
        callbacks.append(Progress(step_log))
    if config.schedule.ema is not None:
        callbacks.append(AveragedWeights(config.schedule.ema))
    checkpoints = run_dir / "checkpoints"
    callbacks += [SaveLast(checkpoints, config.trainer.save_every, interruption), best_checkpoint(checkpoints)]
    trainer = make_trainer(config, run_dir, loggers=loggers, callbacks=callbacks, total_steps=module.total_steps)
    with sizes.explaining(config.data, trainer.strategy.root_device), datamodule.naming_lost_workers():
        _fit(trainer, module, datamodule, resume, run_dir)
        train_ended = time.time()
        module.final_evaluation = True
        trainer.validate(module, datamodule=datamodule, verbose=False)
    skipped = [str(train.path(index)) for index in datamodule.skipped_images]
    if skipped and trainer.is_global_zero:
        words = "image could not be read, and another stood in for it"
        if len(skipped) > 1:
            words = "images could not be read, and others stood in for them"
        print(f"{len(skipped)} training {words}: {', '.join(skipped)}")
    result = {
        **common(config, values, detector, trainer),
        "metrics": module.final_metrics,
        "images_per_second": throughput.images_per_second,
        "train_seconds": throughput.seconds,
        "total_seconds": throughput.total_seconds,
        "evaluation_seconds": time.time() - train_ended,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "skipped_steps": finite.skipped,
        "train_images": len(datamodule.train_indices),
        "skipped_images": len(skipped),
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
        (checkpoints / PREVIOUS).unlink(missing_ok=True)  # a finished run is not resumed
        if has_dashboard(loggers):
            from msil.training.panels import show_panels  # late: the other runs need none of it

            show_panels(loggers, result, record, detector, val, max(trainer.global_step - 1, 0))
    return result


def _fit(
    trainer: L.Trainer, module: DetectionModule, data: DetectionDataModule, resume: Path | None, run_dir: Path
) -> None:
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    except (RuntimeError, KeyError) as error:
        if resume is not None and "state_dict" in str(error):
            raise ConfigError(
                f"{resume} does not fit this net; delete {run_dir} to start again, or set another run_name."
            ) from error
        raise
    except SystemExit as end:  # what Lightning makes of Ctrl-C
        if isinstance(end.__context__, KeyboardInterrupt):  # else somebody else's exit, as submitit's that requeues
            raise KeyboardInterrupt from end
        raise


def _resume(resume: Resume, folder: Path) -> tuple[Path | None, int | None]:
    """The checkpoint to go on from, and its step; or two times None to start at the beginning."""
    if resume is Resume.never:
        if rank_zero_only.rank == 0:
            for name in (LAST, PREVIOUS):
                (folder / name).unlink(missing_ok=True)
        return None, None
    return resume_point(folder) or (None, None)
