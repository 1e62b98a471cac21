"""What result.json and evaluation.npz say of every run, whether it trained or only tested."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch

from msil.config import Config, config_hash
from msil.detection import Detector
from msil.detection.torchvision_detector import AnyDetector
from msil.training.cost import count_flops, count_parameters, padded_size

PACKAGES = ("msil", "torch", "torchvision", "lightning", "hydra-core", "omegaconf", "torchmetrics", "pycocotools",
            "faster-coco-eval", "wandb", "numpy")  # fmt: skip


def common(config: Config, values: dict[str, Any], detector: AnyDetector, trainer: L.Trainer) -> dict[str, Any]:
    """Names, settings, costs and versions of a finished run; `values`: its settings as a plain dict."""
    flops_size = padded_size(config.data.min_size, config.data.max_size)
    return {
        "run_name": config.run_name,
        "head_title": detector.head.title if isinstance(detector, Detector) else None,
        "status": "finished",
        "config_hash": config_hash(values),
        "seed": config.seed,
        "command": _command(),
        "parameters": count_parameters(detector),
        "trainable_parameters": count_parameters(detector, trainable=True),
        "flops": count_flops(detector, flops_size),
        "flops_image_size": list(flops_size),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "machine": _machine(trainer),
        "config": values,
    }


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
