"""What a detector costs: parameters and floating-point operations."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from msil.detection.torchvision_detector import AnyDetector


def count_parameters(module: nn.Module, trainable: bool = False) -> int:
    """Number of parameters, or of those that are trained. Frozen norms' buffers do not count."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def padded_size(min_size: int, max_size: int, divisor: int = 32) -> tuple[int, int]:
    """(height, width) of the largest padded landscape image of a recipe: 800, 1333 -> (800, 1344)."""
    return math.ceil(min_size / divisor) * divisor, math.ceil(max_size / divisor) * divisor


def count_flops(detector: AnyDetector, image_size: tuple[int, int]) -> int:
    """Forward FLOPs of backbone, FPN and head for one image (height, width), 2 a multiply-add.

    Convolutions and matrix products are counted, as usual; nothing is computed (meta tensors).
    """
    shadow = copy.deepcopy(detector).to("meta").eval()
    image = torch.empty(1, 3, *image_size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        type(shadow).net(shadow, image)  # pyright: ignore[reportArgumentType] - and not as compiled
    return counter.get_total_flops()
