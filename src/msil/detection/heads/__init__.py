"""Dense heads by name. A module of this package registers its head where it stands."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from torch import nn

from msil.detection.heads.base import HEADS, DenseHead, HeadOptions

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["HEADS", "DenseHead", "HeadOptions", "build_head", "head_class"]


def head_class(name: str) -> type[DenseHead]:
    """Raises ValueError for a name that no head is registered by."""
    if name not in HEADS:
        raise ValueError(f"unknown head {name!r}; known: {', '.join(sorted(HEADS))}.")
    return HEADS[name]


def build_head(
    options: HeadOptions, num_classes: int, channels: int, msil: nn.Module | Mapping[str, Any] | None
) -> DenseHead:
    """The head whose Options these are. Raises ValueError for another object."""
    kind = next((kind for kind in HEADS.values() if kind.Options is type(options)), None)
    if kind is None:
        raise ValueError(f"head must be a name, a head's options or a DenseHead, not {type(options).__name__}.")
    return kind(num_classes, channels, msil=msil, **vars(options))
