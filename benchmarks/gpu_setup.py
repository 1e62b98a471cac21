"""Sizes, clock and scene of gpu_training.py: the same code runs at toy size on a CPU."""

from __future__ import annotations

import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.compare import REPEATS, Row
from benchmarks.scenes import IMAGE, ground_truth
from msil.detection import Target

Way = Callable[[], float]  # a turn: some steps, and the seconds of one of them


@dataclass(frozen=True)
class Setup:
    """All sizes.

    batches: images a step; the first is the one of G2 and G4, the last that of G3. boxes: an image. precision: of
    `trainer.precision`. compiled: measure torch.compile too. rounds, steps: see `medians` and `steps_of`; uncounted:
    the first steps of a turn. limit_s: no part begins later, for the whole is to stay below nine minutes.
    """

    size: tuple[int, int] = IMAGE
    batches: tuple[int, ...] = (8, 2)
    inference_batch: int = 8
    boxes: int = 7
    classes: int = 80
    backbone: str = "resnet50"
    device: str = "cuda"
    precision: str = "bf16-mixed"
    compiled: bool = True
    rounds: int = REPEATS
    images_a_turn: int = 40
    uncounted: int = 3
    limit_s: float = 420

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def steps_of(self, batch: int) -> int:
        """Counted steps a turn."""
        return max(1, self.images_a_turn // batch)


@dataclass(frozen=True)
class Clock:
    """Wall-clock seconds of a device: those of the host, once the device has done what it was given."""

    device: torch.device

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def settle(self) -> None:
        """Before a turn: memory that another way has left goes back, or all of them together would not fit."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def seconds_of(self, step: Callable[[], object], *, uncounted: int, steps: int) -> float:
        """Of one step, in a turn of `steps` after `uncounted` ones."""
        self.settle()
        for _ in range(uncounted):
            step()
        began = self.now()
        for _ in range(steps):
            step()
        return (self.now() - began) / steps


@dataclass(frozen=True)
class Scene:
    """A batch as ours takes it, uint8 on the device with targets of the host, and as torchvision's does, all there."""

    images: list[Tensor]
    targets: list[Target]
    floats: list[Tensor] = field(init=False)
    dicts: list[dict[str, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        device = self.images[0].device
        object.__setattr__(self, "floats", [image / 255 for image in self.images])
        dicts = [{"boxes": t.boxes.to(device), "labels": t.labels.to(device)} for t in self.targets]
        object.__setattr__(self, "dicts", dicts)

    @staticmethod
    def of(setup: Setup, batch: int) -> Scene:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (batch, 3, *setup.size), dtype=torch.uint8, generator=generator)
        return Scene(list(images.to(setup.device)), ground_truth(batch, setup.boxes, setup.classes, setup.size))


def begun(makers: Mapping[str, Callable[[], Way]]) -> tuple[dict[str, Way], dict[str, Exception]]:
    """Builds each way and gives it a turn that does not count; those that fail are left out, with their errors."""
    ways: dict[str, Way] = {}
    errors: dict[str, Exception] = {}
    for name, make in makers.items():
        try:
            way = make()
            way()
            ways[name] = way
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            errors[name] = error
    return ways, errors


def medians(ways: Mapping[str, Way], rounds: int) -> dict[str, float]:
    """Median seconds of one step of each way, over `rounds` rounds in which each has its turn."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(way())
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_bytes(make: Callable[[], Way], clock: Clock) -> int:
    """The most memory that a way's net, optimizer and steps hold on the GPU at a time."""
    clock.settle()
    before = torch.cuda.memory_allocated()
    way = make()
    torch.cuda.reset_peak_memory_stats()
    way()
    return torch.cuda.max_memory_allocated() - before


def failed(name: str, goal: str, error: Exception) -> Row:
    """A row for what could not be measured; its traceback stands in stderr."""
    lines = str(error).strip().splitlines() or [""]
    return Row(name, "failed", "", None, goal, False, f"{type(error).__name__}: {lines[0][:200]}")
