"""Modules of which parts stay frozen while the rest trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

from torch import nn


class PartlyFrozen(nn.Module):
    """What `keep_in_eval` names stays in eval mode whatever `train` says."""

    _always_eval: tuple[nn.Module, ...] = ()

    def keep_in_eval(self, modules: Iterable[nn.Module]) -> None:
        self._always_eval = tuple(modules)  # a tuple, so that nothing is registered a second time
        self.train()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self._always_eval:
            module.eval()
        return self
