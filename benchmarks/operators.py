"""What a computation asks of the device: kernels, what the host would have to wait for, time by operator."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# They give a tensor without computing one.
_NO_KERNEL = (
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "alias",
    "_unsafe_view",
)


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
    "aten::item",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::nonzero_numpy",
    "aten::argwhere",
    "aten::masked_select",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::_unique",
    "aten::_unique2",
    "aten::bincount",
    "aten::lift_fresh",  # torch.tensor(list): a copy from unpinned memory waits
}


class HostSyncs(TorchDispatchMode):
    """Names of the operators that would wait, and the number of all operators, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.operators += 1
        name = func._schema.name
        if name in WAITING or self._masks(name, args) or self._counts(func) or self._moves(name, args, kwargs):
            self.found.append(f"{func}, non_blocking" if kwargs.get("non_blocking") else str(func))
        return func(*args, **kwargs)

    @staticmethod
    def _masks(name: str, args: tuple) -> bool:
        if name not in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
            return False
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])

    @staticmethod
    def _counts(func: Any) -> bool:
        return func is torch.ops.aten.repeat_interleave.Tensor

    @staticmethod
    def _moves(name: str, args: tuple, kwargs: dict) -> bool:
        if name == "aten::_to_copy":
            return kwargs.get("device") is not None and torch.device(kwargs["device"]).type != args[0].device.type
        return name == "aten::copy_" and args[0].device.type != args[1].device.type
