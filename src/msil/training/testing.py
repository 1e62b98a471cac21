"""mode=test: score the detector of model.weights on one split, or write its detections for a server that does."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from msil.checkpoints.assemble import detector_from_config
from msil.checkpoints.load import load_weights
from msil.config import Config, weights_name
from msil.interruption import Interruption
from msil.metrics.record import write_record
from msil.metrics.upload import DetectionCollector, upload_entries, write_upload
from msil.runs import write_json
from msil.training.callbacks import PredictionPictures
from msil.training.checkpoint import StopEvaluation
from msil.training.devices import prepare
from msil.training.loggers import dashboard_loggers, has_dashboard
from msil.training.memory import Sizes
from msil.training.module import DetectionModule
from msil.training.progress import EvaluationProgress
from msil.training.record import common
from msil.training.setup import make_metrics, make_test_datamodule, make_trainer

_PLAIN = re.compile(r"[^A-Za-z0-9._-]")


def test(config: Config, values: dict[str, Any], run_dir: Path, interruption: Interruption) -> dict[str, Any]:
    """Evaluate model.weights on data.split (data.val_split if null); returns what result.json holds.

    Every split's detections are written in COCO's upload format; one without annotations has no numbers.
    """
    assert config.model.weights is not None
    started = time.time()
    L.seed_everything(config.seed, verbose=False)
    datamodule = make_test_datamodule(config)
    data = datamodule.val
    split = config.data.split or config.data.val_split
    detector = detector_from_config(config.model, len(data.classes), config.data.min_size, config.data.max_size)
    notes = load_weights(detector, config.model.weights, data.classes, to_train=False)
    if rank_zero_only.rank == 0:
        print("; ".join([f"testing {config.model.weights} on {config.data.name.value} {split}", *notes]))
    prepare(detector, config.trainer, frozen=True)
    collector = DetectionCollector(data.annotations)
    module = DetectionModule(
        detector,
        [*(make_metrics(config, data) if data.annotated else []), collector],
        config.schedule,
        steps_per_epoch=1,
        batch_size=config.data.batch_size,
        describe={},
    )
    module.final_evaluation = True
    sizes = Sizes()
    callbacks: list[Any] = [sizes, StopEvaluation(interruption)]
    if config.trainer.progress_bar:
        callbacks.append(EvaluationProgress(datamodule.num_eval))
    if data.annotated:
        callbacks.append(PredictionPictures(run_dir / "predictions.png", data.classes))
    loggers = dashboard_loggers(config, values, run_dir, None)
    trainer = make_trainer(config, run_dir, loggers=loggers, callbacks=callbacks, total_steps=1)
    with sizes.explaining(config.data, trainer.strategy.root_device), datamodule.naming_lost_workers():
        trainer.validate(module, datamodule=datamodule, verbose=False)

    seconds = time.time() - started
    result = {
        **common(config, values, detector, trainer),
        "metrics": module.final_metrics,
        "images_per_second": None,
        "train_seconds": 0.0,
        "total_seconds": seconds,
        "evaluation_seconds": seconds,
        "epochs": 0,
        "steps": 0,
        "train_images": None,
        "val_images": datamodule.num_eval,
        "classes": list(data.classes),
        "split": split,
    }
    record = collector.gathered()
    if trainer.is_global_zero:
        entries = upload_entries(record)
        # Whatever they are called on disk, the upload has a plain name.
        plain_split, name = (_PLAIN.sub("-", word) for word in (split, weights_name(config.model.weights)))
        files = write_upload(run_dir, plain_split, name, entries)
        result["detections"] = [path.name for path in files]
        for logger in loggers:
            logger.log_metrics(module.final_metrics, step=0)
        if data.annotated:
            write_record(run_dir, record)
        write_json(run_dir / "result.json", result)
        if has_dashboard(loggers):
            from msil.training.panels import show_panels  # late: the other runs need none of it

            show_panels(loggers, result, record if data.annotated else None, detector, data, 0)
    return result
