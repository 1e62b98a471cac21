"""Label assignment: which prior learns which ground-truth box."""

from msil.detection.assign.atss import ATSSAssigner
from msil.detection.assign.base import Assigner, GroundTruth, Match, ground_truth
from msil.detection.assign.fcos import FCOSAssigner
from msil.detection.assign.max_iou import MaxIoUAssigner
from msil.detection.assign.task_aligned import TaskAlignedAssigner

__all__ = [
    "ATSSAssigner",
    "Assigner",
    "FCOSAssigner",
    "GroundTruth",
    "Match",
    "MaxIoUAssigner",
    "TaskAlignedAssigner",
    "ground_truth",
]
