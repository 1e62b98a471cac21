"""Multi-Semantic Interactive Learning for object detection (arXiv 2303.10411).

Importing this package needs torch and torchvision alone; training adds lightning, hydra and the rest.
"""

from msil.detection.detector import build_detector
from msil.interaction import MSIL

__version__ = "0.1.0"

__all__ = ["MSIL", "__version__", "build_detector"]
