"""MMDetection 3.3's dense heads on today's PyTorch, for the comparison alone.

Its compiled operators (mmcv.ops) exist for no current PyTorch. Assignment and losses use none of them, so here they are
modules that can be imported and built but not run.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

from torch import nn

from benchmarks.compare import NotRun
from msil.detection import Target

MISSING = (
    'MMDetection is not installed ({reason}): pip install -e ".[benchmarks]" -c constraints.txt brings mmdet 3.3.0 and '
    "mmcv-lite 2.1.0"
)

ATSS = {"type": "ATSSAssigner", "topk": 9}
ONE_ANCHOR = {
    "type": "AnchorGenerator", "ratios": [1.0], "octave_base_scale": 8, "scales_per_octave": 1,
    "strides": [8, 16, 32, 64, 128],
}  # fmt: skip
FOCAL_LOSS = {"type": "FocalLoss", "use_sigmoid": True, "gamma": 2.0, "alpha": 0.25, "loss_weight": 1.0}
DELTAS = {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4, "target_stds": [0.1, 0.1, 0.2, 0.2]}
GIOU_LOSS = {"type": "GIoULoss", "loss_weight": 2.0}


class _Operator(nn.Module):
    """Stands for a compiled operator."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(self, *_: Any) -> Any:
        raise RuntimeError(f"{type(self).__name__} of mmcv.ops is compiled code, which is not there.")


class _Operators(ModuleType):
    """A module in which every name is such an operator."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (_Operator,), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds mmcv.ops and everything below it."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname == "mmcv.ops" or fullname.startswith("mmcv.ops."):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Operators(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def vfnet_head(classes: int) -> Any:
    return _built("VFNetHead", classes, use_atss=True, use_vfl=True)


def fcos_head(classes: int) -> Any:
    """In its improved form, as ours is by default."""
    tricks = {"center_sampling": True, "centerness_on_reg": True, "norm_on_bbox": True}
    return _built("FCOSHead", classes, loss_bbox={"type": "GIoULoss", "loss_weight": 1.0}, **tricks)


def atss_head(classes: int) -> Any:
    return _built(
        "ATSSHead", classes, bbox_coder=DELTAS, anchor_generator=ONE_ANCHOR, loss_cls=FOCAL_LOSS, loss_bbox=GIOU_LOSS
    )


def gfl_head(classes: int) -> Any:
    focal = {"type": "QualityFocalLoss", "use_sigmoid": True, "beta": 2.0, "loss_weight": 1.0}
    distribution = {"type": "DistributionFocalLoss", "loss_weight": 0.25}
    return _built(
        "GFLHead", classes, anchor_generator=ONE_ANCHOR, loss_cls=focal, loss_dfl=distribution, loss_bbox=GIOU_LOSS
    )


def retinanet_head(classes: int) -> Any:
    assigner = {
        "type": "MaxIoUAssigner", "pos_iou_thr": 0.5, "neg_iou_thr": 0.4, "min_pos_iou": 0, "ignore_iof_thr": -1,
    }  # fmt: skip
    return _built(
        "RetinaHead", classes, {"assigner": assigner, "sampler": {"type": "PseudoSampler"}},
        anchor_generator={**ONE_ANCHOR, "octave_base_scale": 4, "scales_per_octave": 3, "ratios": [0.5, 1.0, 2.0]},
        bbox_coder={**DELTAS, "target_stds": [1.0] * 4},
        loss_cls=FOCAL_LOSS, loss_bbox={"type": "L1Loss", "loss_weight": 1.0},
    )  # fmt: skip


def tood_head(classes: int, epoch: int) -> Any:
    """In that epoch, counted from 0, which all heads share."""
    focal = {"type": "QualityFocalLoss", "use_sigmoid": True, "activated": True, "beta": 2.0, "loss_weight": 1.0}
    assigners = {
        "initial_epoch": 4, "initial_assigner": ATSS, "assigner": {"type": "TaskAlignedAssigner", "topk": 13},
        "alpha": 1, "beta": 6,
    }  # fmt: skip
    head = _built(
        "TOODHead", classes, assigners, bbox_coder=DELTAS, anchor_generator=ONE_ANCHOR, loss_cls=focal,
        loss_bbox=GIOU_LOSS,
    )  # fmt: skip
    from mmengine.logging import MessageHub  # pyright: ignore[reportMissingImports]

    MessageHub.get_current_instance().update_info("epoch", epoch)
    return head


def _built(name: str, classes: int, assigners: dict[str, Any] | None = None, **settings: Any) -> Any:
    """A head with the settings of its published configurations. assigners: of train_cfg; None: ATSS. Raises NotRun
    without MMDetection."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    try:
        from mmdet.models import dense_heads  # pyright: ignore[reportMissingImports]
        from mmengine.config import ConfigDict  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise NotRun(MISSING.format(reason=error)) from None
    training = ConfigDict(allowed_border=-1, pos_weight=-1, debug=False, **(assigners or {"assigner": ATSS}))
    return getattr(dense_heads, name)(num_classes=classes, in_channels=256, train_cfg=training, **settings)


def instances(targets: list[Target], size: tuple[int, int]) -> tuple[list[Any], list[dict[str, Any]]]:
    """Ground truth and image descriptions as MMDetection's heads take them. size: (height, width) of all images."""
    from mmengine.structures import InstanceData  # pyright: ignore[reportMissingImports]

    described = [{"img_shape": size, "pad_shape": size, "batch_input_shape": size, "scale_factor": (1.0, 1.0)}]
    return [InstanceData(bboxes=t.boxes, labels=t.labels) for t in targets], described * len(targets)
