"""What a run leaves: result.json, evaluation.npz, curves and, of mode=test, the detections for an evaluation server."""

from __future__ import annotations

import copy
import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from msil.checkpoints.description import trained_on
from msil.config import config_hash
from msil.detection import Detector
from msil.detection.torchvision_detector import AnyDetector
from msil.metrics.record import write_record
from msil.metrics.upload import SERVER_LIMIT, upload_entries, write_upload
from msil.reporting.figures.pictures import draw_curves
from msil.runs import CHECKPOINTS, CURVES, LAST, METRICS, PREVIOUS, RESULT, weights_name, write_json
from msil.training.build import Parts
from msil.training.checkpoint import drop_optimizer
from msil.training.loggers import log_result

PACKAGES = ("msil", "torch", "torchvision", "lightning", "hydra-core", "omegaconf", "torchmetrics", "pycocotools",
            "faster-coco-eval", "wandb", "numpy")  # fmt: skip
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")


def write(parts: Parts, evaluation_seconds: float) -> dict[str, Any]:
    """Write every file of a run that has been evaluated, result.json last; returns what that holds."""
    config, module, trainer, data = parts.config, parts.module, parts.trainer, parts.data
    training = data.train is not None
    detector = module.detector
    # (height, width) of the largest padded landscape image: 800, 1333 -> 800, 1344
    flops_size = [math.ceil(side / 32) * 32 for side in (config.data.min_size, config.data.max_size)]
    result = {
        "run_name": config.run_name,
        "head_title": title(detector),
        "status": "finished",
        "config_hash": config_hash(parts.values),
        "seed": config.seed,
        "command": command(),
        "metrics": module.final_metrics,
        "per_class": module.metrics[-1].per_class,  # the last one has the set's own AP
        "parameters": count_parameters(detector),
        "trainable_parameters": count_parameters(detector, trainable=True),
        "flops": count_flops(detector, flops_size),
        "flops_image_size": flops_size,
        "images_per_second": parts.throughput.images_per_second if training else None,
        "train_seconds": parts.throughput.seconds,
        "total_seconds": parts.throughput.total_seconds,
        "evaluation_seconds": evaluation_seconds,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "train_images": len(data.train_indices) if training else None,
        "val_images": data.num_eval,
        "classes": list(data.val.classes),
        "data": module.describe["data"],
        "git": module.describe["git"],
        "continued": module.describe["continued"],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "machine": {
            "platform": platform.platform(),
            "cpu_count": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "processes": trainer.world_size,
        },
        "config": parts.values,
    }
    record = module.record
    assert record is not None
    if not trainer.is_global_zero:
        return result
    if module.evaluated_at_step != trainer.global_step:  # the training ended between two evaluations
        for logger in trainer.loggers:
            # Under the last step's number, as Lightning logs an evaluation.
            numbers = {**module.final_metrics, "epoch": max(trainer.current_epoch - 1, 0)}
            logger.log_metrics(numbers, step=max(trainer.global_step - 1, 0))
            logger.save()
    if data.val.annotated:
        write_record(parts.run_dir, record)
    if training:
        draw_curves(parts.run_dir / METRICS, parts.run_dir / CURVES)
    else:
        split = result["split"] = config.data.split or config.data.val_split
        digests = result["data"][split]
        result["seen"] = trained_on(str(config.model.weights), parts.values["data"], split, digests)
        # Whatever they are called on disk, the files have plain names.
        names = (_UNSAFE.sub("-", word) for word in (result["split"], weights_name(config.model.weights)))
        truth = data.val.annotations
        own_images = dict(zip(truth.image_ids.tolist(), truth.own_image_ids or (), strict=False))
        most = None if data.val.annotated else SERVER_LIMIT
        entries = upload_entries(record, most, own_images, truth.own_category_ids)
        files = write_upload(parts.run_dir, *names, entries=entries)
        result["detections"] = [path.name for path in files]
    write_json(parts.run_dir / RESULT, result)
    if training and not config.trainer.keep_optimizer:
        drop_optimizer(parts.run_dir / CHECKPOINTS / LAST)
    (parts.run_dir / CHECKPOINTS / PREVIOUS).unlink(missing_ok=True)  # a finished run is not resumed
    log_result(trainer.loggers, result)
    return result


def title(detector: AnyDetector) -> str | None:
    """Of the head, in tables."""
    return detector.head.title if isinstance(detector, Detector) else None


def count_parameters(module: nn.Module, trainable: bool = False) -> int:
    """Number of parameters, or of those that are trained. Frozen norms' buffers do not count."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def count_flops(detector: AnyDetector, image_size: Sequence[int]) -> int:
    """Forward FLOPs of backbone, FPN and head for one image (height, width), 2 a multiply-add.

    Convolutions and matrix products are counted, as usual; nothing is computed (meta tensors).
    """
    shadow = copy.deepcopy(detector).to("meta").eval()
    image = torch.empty(1, 3, *image_size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        type(shadow).net(shadow, image)  # pyright: ignore[reportArgumentType] - and not as compiled
    return counter.get_total_flops()


def command() -> str:
    """What the user would type for this run alone; a sweep's job has hydra.mode=RUN of the launcher's besides."""
    script = Path(sys.argv[0]).name
    program = ["msil", "train"] if script in ("msil", "cli.py") else ["python", script]
    return shlex.join([*program, *(word for word in sys.argv[1:] if not word.startswith("hydra.mode="))])
