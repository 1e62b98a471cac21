"""Multi-Semantic Interactive Learning for object detection (arXiv 2303.10411).

Importing this package needs torch and torchvision alone; training adds lightning, hydra and the rest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msil.attach import attach_msil
    from msil.checkpoints.load import load_detector
    from msil.detection.detector import build_detector
    from msil.detection.structures import Detections, Target
    from msil.interaction import MSIL

__version__ = "0.1.0"

__all__ = ["MSIL", "Detections", "Target", "__version__", "attach_msil", "build_detector", "load_detector"]

_MODULES = {
    "MSIL": "msil.interaction",
    "Detections": "msil.detection.structures",
    "Target": "msil.detection.structures",
    "attach_msil": "msil.attach",
    "build_detector": "msil.detection.detector",
    "load_detector": "msil.checkpoints.load",
}


def __getattr__(name: str) -> Any:
    # Late, so that `run.py --help`, a typo and the launcher of a sweep need not wait for torch.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
