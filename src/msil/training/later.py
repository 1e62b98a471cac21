"""Numbers of the device that the host reads when they have come, so that nobody waits in between."""

from __future__ import annotations

import torch
from torch import Tensor


class Later:
    """A copy of `values` (V,), float32, under way to the host.

    On a GPU the copy is queued behind the work that makes the values; on the CPU they are there already.
    """

    def __init__(self, values: Tensor) -> None:
        values = values.detach().float()
        self._arrived: torch.cuda.Event | None = None
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._host = values.clone()

    @property
    def here(self) -> bool:
        """Whether `read` would not wait."""
        return self._arrived is None or self._arrived.query()

    def read(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.cpu().numpy().tolist()
