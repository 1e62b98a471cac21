"""Dense heads by name. A module of this package registers its head where it stands."""

from __future__ import annotations

import importlib
import pkgutil

from msil.detection.heads.base import HEADS, DenseHead, HeadOptions

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["HEADS", "DenseHead", "HeadOptions", "head_class"]


def head_class(name: str) -> type[DenseHead]:
    """Raises ValueError for a name that no head is registered by."""
    if name not in HEADS:
        raise ValueError(f"unknown head {name!r}; known: {', '.join(sorted(HEADS))}.")
    return HEADS[name]
