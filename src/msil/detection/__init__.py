"""Dense detectors of torch and torchvision alone: structures, heads and the whole detector."""

from msil.detection.backbone import ResNetOptions, TimmOptions
from msil.detection.detector import Detector, build_detector
from msil.detection.heads import DenseHead
from msil.detection.heads.atss import ATSSHead
from msil.detection.heads.fcos import FCOSHead
from msil.detection.heads.gfl import GFLHead
from msil.detection.heads.retinanet import RetinaNetHead
from msil.detection.heads.tood import TOODHead
from msil.detection.heads.vfnet import VFNetHead
from msil.detection.structures import Detections, Predictions, Target

__all__ = [
    "ATSSHead",
    "DenseHead",
    "Detections",
    "Detector",
    "FCOSHead",
    "GFLHead",
    "Predictions",
    "ResNetOptions",
    "RetinaNetHead",
    "TOODHead",
    "Target",
    "TimmOptions",
    "VFNetHead",
    "build_detector",
]
