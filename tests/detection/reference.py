"""The reference's files of all seven forms: our head of each, and its arrays in our layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from msil.detection import ATSSHead, DenseHead, FCOSHead, GFLHead, RetinaNetHead, TOODHead, VFNetHead
from msil.detection.weights import from_mmdet

from .cases import reference_pyramid

# Of the original FCOS.
PLAIN = {
    "conv_bias": False, "center_sampling": False, "centerness_on_reg": False, "norm_on_bbox": False, "loss_bbox": "iou",
}  # fmt: skip
HEADS: dict[str, tuple[type[DenseHead], dict[str, Any]]] = {
    "head_fcos": (FCOSHead, PLAIN),
    "head_fcos_tricks": (FCOSHead, {}),
    "head_vfnet_s3": (VFNetHead, {}),
    "head_atss": (ATSSHead, {}),
    "head_gfl": (GFLHead, {}),
    "head_tood": (TOODHead, {}),
    "head_retina": (RetinaNetHead, {"norm_groups": None}),
}
# Of the last four, the prefix of the reference's cases: TOOD's change with the epoch.
CASES = [("head_atss", ""), ("head_gfl", ""), ("head_tood", "0"), ("head_tood", "4"), ("head_retina", "")]
# Of all.
FORMS = [*((name, "") for name in HEADS if name not in dict(CASES)), *CASES]


def build(
    name: str,
    msil: nn.Module | dict[str, Any] | None = None,
    num_convs: int = 1,
    epoch: str = "",
    fast_start: bool = False,
) -> DenseHead:
    """A head of 5 classes and 32 channels, at the start of an epoch."""
    torch.manual_seed(0)
    kind, options = HEADS[name]
    head = kind(5, 32, msil=msil, **{"num_convs": num_convs, "norm_groups": 8, "fast_start": fast_start, **options})
    head.set_epoch(int(epoch or 0))
    return head


def reference_head(golden: Any, name: str, epoch: str = "") -> DenseHead:
    """A head with the reference's weights, of double precision where it has deformable convolutions: these sample where
    other layers say, so that the rounding of one processor is 1e-4 from that of another."""
    head = build(name, num_convs=3 if name == "head_vfnet_s3" else 2, epoch=epoch)
    head.load_state_dict(from_mmdet(golden(name, "state/")))
    return head.double() if head.deformable else head


def reference_input(golden: Any, head: DenseHead) -> list[Tensor]:
    """The reference's pyramid in the head's precision, leaves that gather gradients."""
    dtype = next(head.parameters()).dtype
    return [level.to(dtype).requires_grad_() for level in reference_pyramid(golden)]


def near(head: DenseHead) -> float:
    """Tolerance. The reference computed in float32: behind deformable convolutions 9.4e-5 from float64 at most, else
    less than 1e-5."""
    return 1e-4 if head.deformable else 1e-5


def flat(arrays: dict[str, Tensor], prefix: str, per_cell: int = 1) -> Tensor:
    """Five maps (N, A C, H, W) of the reference -> (N, P, C), a cell's A anchors side by side."""
    maps = [arrays[f"{prefix}{level}"].permute(0, 2, 3, 1) for level in range(5)]
    return torch.cat([m.reshape(len(m), -1, m.shape[-1] // per_cell) for m in maps], 1)


def levels(arrays: dict[str, Tensor], prefix: str, *tail: int) -> Tensor:
    """Five arrays of the reference, (2, n, ...) or (2 n, ...), as (2, P, *tail)."""
    return torch.cat([arrays[f"{prefix}{level}"].reshape(2, -1, *tail) for level in range(5)], 1)
