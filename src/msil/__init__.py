"""Multi-Semantic Interactive Learning for object detection (arXiv 2303.10411).

Importing this package needs torch and torchvision alone; training adds lightning, hydra and the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msil.detection.detector import build_detector
    from msil.interaction import MSIL

__version__ = "0.1.0"

__all__ = ["MSIL", "__version__", "build_detector"]


def __getattr__(name: str) -> Any:
    # Late, so that `run.py --help`, a typo and the launcher of a sweep need not wait for torch.
    if name == "MSIL":
        from msil.interaction import MSIL

        return MSIL
    if name == "build_detector":
        from msil.detection.detector import build_detector

        return build_detector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
