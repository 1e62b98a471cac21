"""MMDetection 3.3's VFNet head on today's PyTorch, for the comparison alone.

Its compiled operators (mmcv.ops) exist for no current PyTorch. Assignment and loss of VFNet use none of them, so here
they are modules that can be imported and built but not run.
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
    """An mmdet VFNetHead with the settings of its published configurations. Raises NotRun without MMDetection."""
    return _built("VFNetHead", classes, use_atss=True, use_vfl=True)


def fcos_head(classes: int) -> Any:
    """An mmdet FCOSHead in its improved form, as ours is by default. Raises NotRun without MMDetection."""
    tricks = {"center_sampling": True, "centerness_on_reg": True, "norm_on_bbox": True}
    return _built("FCOSHead", classes, loss_bbox={"type": "GIoULoss", "loss_weight": 1.0}, **tricks)


def _built(name: str, classes: int, **settings: Any) -> Any:
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    try:
        from mmdet.models import dense_heads  # pyright: ignore[reportMissingImports]
        from mmengine.config import ConfigDict  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise NotRun(MISSING.format(reason=error)) from None
    assigner = ConfigDict(assigner={"type": "ATSSAssigner", "topk": 9}, allowed_border=-1, pos_weight=-1, debug=False)
    return getattr(dense_heads, name)(num_classes=classes, in_channels=256, train_cfg=assigner, **settings)


def instances(targets: list[Target], size: tuple[int, int]) -> tuple[list[Any], list[dict[str, Any]]]:
    """Ground truth and image descriptions as MMDetection's heads take them. size: (height, width) of all images."""
    from mmengine.structures import InstanceData  # pyright: ignore[reportMissingImports]

    described = [{"img_shape": size, "pad_shape": size, "batch_input_shape": size, "scale_factor": (1.0, 1.0)}]
    return [InstanceData(bboxes=t.boxes, labels=t.labels) for t in targets], described * len(targets)
