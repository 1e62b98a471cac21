"""What a computation asks of the device: kernels, host syncs, time by operator, and how fast a core multiplies at best:
the limit of what consists of convolutions."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.compare import Row

# They give a tensor without computing one.
_NO_KERNEL = (
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "_unsafe_view",
)  # fmt: skip


class Kernels(TorchDispatchMode):
    """The number of dispatched operators that compute or copy something: neither views nor allocations.

    On a GPU each of them is one kernel or a few; on the CPU the same operators are dispatched, so they can be counted
    there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func._schema.name.removeprefix("aten::") not in _NO_KERNEL:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    @property
    def count(self) -> int:
        return len(self.names)


class Seconds(TorchDispatchMode):
    """CPU seconds in the named operators, forward and backward."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = {f"aten::{name}" for name in names}
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        began = time.process_time()
        result = func(*args, **(kwargs or {}))
        if func._schema.name in self.names:
            self.total += time.process_time() - began
        return result


# Operators whose result's shape or value the host has to know.
WAITING = {
    "aten::_local_scalar_dense",  # .item(), float(), bool(), `if tensor`
    "aten::lift_fresh",  # torch.tensor(list): a copy from unpinned memory waits
    "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::nonzero_numpy", "aten::argwhere",
    "aten::masked_select", "aten::unique_dim", "aten::unique_consecutive", "aten::_unique", "aten::_unique2",
    "aten::bincount",
}  # fmt: skip


class HostSyncs(TorchDispatchMode):
    """Names of the operators that would wait, and the number of all operators, forward and backward.

    A Python number that is written into a tensor (`x[:2] = 0`, `x[mask] = 0`) travels with the kernel: nobody waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.operators = 0
        self._number: torch.Tensor | None = None  # the last one that was made of a Python number
        self._place = 0  # in `found`

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.operators += 1
        name = func._schema.name
        writes_number = name in ("aten::fill_", "aten::index_put_") and args[-1] is self._number
        if writes_number:
            del self.found[self._place]
            self._number = None
        masks = self._masks(name, args, writes_number)
        if name in WAITING or masks or self._counts(func) or self._moves(name, args, kwargs):
            self.found.append(f"{func}, non_blocking" if kwargs.get("non_blocking") else str(func))
        result = func(*args, **kwargs)
        if name == "aten::lift_fresh" and result.dim() == 0:
            self._number, self._place = result, len(self.found) - 1
        return result

    @staticmethod
    def _masks(name: str, args: tuple, writes_number: bool) -> bool:
        """Whether an index is a mask, whose number of places is the shape of what is read or written."""
        if name not in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
            return False
        masks = [index.dtype in (torch.bool, torch.uint8) for index in args[1] if index is not None]
        return any(masks) and not (writes_number and all(masks))

    @staticmethod
    def _counts(func: Any) -> bool:
        return func is torch.ops.aten.repeat_interleave.Tensor

    @staticmethod
    def _moves(name: str, args: tuple, kwargs: dict) -> bool:
        if name == "aten::_to_copy":
            return kwargs.get("device") is not None and torch.device(kwargs["device"]).type != args[0].device.type
        return name == "aten::copy_" and args[0].device.type != args[1].device.type


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
