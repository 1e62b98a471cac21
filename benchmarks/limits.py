"""How fast a core multiplies at best: the limit of what consists of convolutions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.compare import Row

_SIDE = 2048
_GIGA = 2 * _SIDE**3 / 1e9


def matrix_product() -> Callable[[], object]:
    """One large float32 product, to be timed in turn with what is compared with it."""
    first, second = torch.rand(_SIDE, _SIDE), torch.rand(_SIDE, _SIDE)
    return lambda: torch.mm(first, second)


def flops(step: Callable[[], object]) -> int:
    """Of its convolutions and matrix products, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def rates(name: str, work: int, seconds: float, of_product: float) -> Row:
    """work: FLOPs that took `seconds`, beside a matrix product that took `of_product`."""
    rate, limit = work / seconds / 1e9, _GIGA / of_product
    said = f"{work / 1e9:.0f} GFLOP; the anchor is one large matrix product"
    return Row(name, f"{rate:.0f} GFLOP/s", f"{limit:.0f} GFLOP/s", rate / limit, "", None, said)
