"""From the host to the device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device | None) -> Tensor:
    """`values` on `device` (None: where they are); from the host without waiting for the copy."""
    if device is None or values.device == device:
        return values
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()  # an ordinary host tensor's copy would make the host wait
    return values.to(device, non_blocking=True)


def sizes_tensor(image_sizes: list[tuple[int, int]], device: torch.device) -> Tensor:
    """B pairs (height, width) -> (B, 2) int64 on `device`."""
    if torch.compiler.is_exporting():
        return torch.tensor(image_sizes, device=device)  # they may be symbols
    sizes = torch.empty((len(image_sizes), 2), dtype=torch.int64)
    sizes.numpy()[:] = image_sizes  # of the host: nothing that counts copies to a device takes it for one
    return to_device(sizes, device)
