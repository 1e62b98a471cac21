"""Counts what a computation asks of the device: kernels, and what the host would have to wait for."""

from __future__ import annotations

from typing import Any

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
