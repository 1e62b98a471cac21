"""Dense detectors of torch and torchvision alone: structures, heads and the whole detector."""

from msil.detection.detector import Detector, build_detector
from msil.detection.heads.fcos import FCOSHead
from msil.detection.heads.vfnet import VFNetHead
from msil.detection.structures import Detections, Predictions, Target

__all__ = ["Detections", "Detector", "FCOSHead", "Predictions", "Target", "VFNetHead", "build_detector"]
