"""What the tests of this folder share: the real settings made small, and a file that describes its detector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import save_file

from msil.checkpoints.assemble import detector_from_config
from msil.checkpoints.description import Description, explicit, to_text
from msil.compose import register, to_config
from msil.config import Config
from msil.detection import Detector

CONF = Path(__file__).resolve().parents[2] / "conf"
SMALL = ("model.channels=16", "model.head.num_convs=1", "model.head.norm_groups=4", "model.msil.reduction=4")
CLASSES = ("cat", "dog", "emu")


def composed(*overrides: str) -> Config:
    """What a command with these overrides composes, before model.weights is looked at."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="run"):
        return to_config(compose("config", [*overrides, "run_name=mine"]))


def described_file(path: Path, *overrides: str, seed: int = 0, **changed: Any) -> tuple[Detector, Description]:
    """Writes a small detector of three classes with its description; returns both."""
    config = composed(*SMALL, *overrides)
    config.model.backbone = explicit(config.model.backbone)
    description = Description(config.model, 64, 96, CLASSES, (3, 5, 9), "a test")
    torch.manual_seed(seed)
    detector = detector_from_config(config.model, len(CLASSES), 64, 96).eval()
    save_file(detector.state_dict(), path, {"msil": to_text(description)})
    return detector, description


def image(seed: int = 0, size: tuple[int, int] = (64, 80)) -> torch.Tensor:
    return torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
