"""Wall-clock time of a device that works behind the host's back."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


class WallClock:
    """Seconds between start and stop, each of which waits for the device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.began = 0.0

    def start(self) -> None:
        self._wait()
        self.began = time.perf_counter()

    def stop(self) -> float:
        self._wait()
        return time.perf_counter() - self.began

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def medians(turns: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median of what each turn says it took, over `rounds` rounds in which each has its turn."""
    said = [{name: turn() for name, turn in turns.items()} for _ in range(rounds)]
    return {name: statistics.median(one[name] for one in said) for name in turns}
