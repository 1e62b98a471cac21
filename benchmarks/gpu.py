"""Sizes, scene, steps and clock of gpu_training.py: the same code runs at toy size on a CPU."""

from __future__ import annotations

import copy
import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS

from benchmarks.compare import REPEATS, Row
from benchmarks.scenes import IMAGE, ground_truth
from msil.detection import Detector, Target

EAGER, DEFAULT, REDUCED = "eager", "default", "reduce-overhead"  # the latter two: of torch.compile

Step = Callable[[], Any]


@dataclass(frozen=True)
class Setup:
    """All sizes. batches: images a step; the first is the one of G2 and G4, the last that of G3. boxes: an image.
    compiled: the modes of torch.compile. uncounted: the first steps of a turn. limit_s: no part begins later."""

    size: tuple[int, int] = IMAGE
    batches: tuple[int, ...] = (8, 2)
    boxes: int = 7
    classes: int = 80
    backbone: str = "resnet50"
    device: str = "cuda"
    compiled: tuple[str, ...] = (DEFAULT, REDUCED)
    rounds: int = REPEATS
    images_a_turn: int = 40
    uncounted: int = 3
    limit_s: float = 420


@dataclass(frozen=True)
class Scene:
    """A batch as ours takes it, uint8 with targets of the host, and as torchvision's does, all on the device."""

    images: list[Tensor]
    targets: list[Target]
    floats: list[Tensor]
    dicts: list[dict[str, Tensor]]

    @staticmethod
    def of(setup: Setup, batch: int) -> Scene:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (batch, 3, *setup.size), dtype=torch.uint8, generator=generator).to(setup.device)
        targets = ground_truth(batch, setup.boxes, setup.classes, setup.size)
        dicts = [{"boxes": t.boxes.to(setup.device), "labels": t.labels.to(setup.device)} for t in targets]
        return Scene(list(images), targets, list(images / 255), dicts)


def autocast(setup: Setup, mixed: bool = True) -> torch.autocast:
    return torch.autocast(torch.device(setup.device).type, torch.bfloat16, enabled=mixed)


def trained(net: nn.Module, losses_of: Callable[[], dict[str, Tensor]], setup: Setup, *, mixed: bool) -> Step:
    """A training step, which returns its losses."""
    weights = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=1e-6, momentum=0.9, weight_decay=1e-4, fused=isinstance(net, Detector))

    def step() -> dict[str, Tensor]:
        with autocast(setup, mixed):
            losses = losses_of()
            total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        return {name: value.detach().clone() for name, value in losses.items()}

    return step


def our_training(detector: Detector, scene: Scene, setup: Setup, mode: str) -> Step:
    detector = prepared(detector.train(), setup, mode)
    return trained(detector, lambda: detector.loss(scene.images, scene.targets), setup, mixed=True)


def their_training(net: FCOS, scene: Scene, setup: Setup, *, mixed: bool) -> Step:
    net = laid_out(copy.deepcopy(net), setup, mixed=mixed).train()
    return trained(net, lambda: net(scene.floats, scene.dicts), setup, mixed=mixed)


def our_inference(detector: Detector, scene: Scene, setup: Setup, mode: str) -> Step:
    detector = prepared(detector.eval(), setup, mode)

    def step() -> Any:
        with torch.inference_mode(), autocast(setup):
            return detector.predict(scene.images)

    return step


def their_inference(net: FCOS, scene: Scene, setup: Setup, *, mixed: bool) -> Step:
    net = laid_out(copy.deepcopy(net), setup, mixed=mixed).eval()

    def step() -> Any:
        with torch.inference_mode(), autocast(setup, mixed):
            return net(scene.floats)

    return step


def prepared(detector: Detector, setup: Setup, mode: str) -> Detector:
    detector.to(setup.device).lay_out(channels_last=True)
    if mode != EAGER:
        detector.compile_parts(mode, frozen=not detector.training)
    return detector


def laid_out(net: FCOS, setup: Setup, *, mixed: bool) -> FCOS:
    net.to(setup.device)
    return net.to(memory_format=torch.channels_last) if mixed else net  # pyright: ignore[reportCallIssue]


def now(setup: Setup) -> float:
    if torch.device(setup.device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def turn(step: Step, setup: Setup, batch: int) -> float:
    """Seconds of one step."""
    gc.collect()  # memory of another way goes back, or all of them together would not fit
    torch.cuda.empty_cache()
    for _ in range(setup.uncounted):
        step()
    steps = max(1, setup.images_a_turn // batch)
    began = now(setup)
    for _ in range(steps):
        step()
    return (now(setup) - began) / steps


def medians(makers: Mapping[str, Callable[[], Step]], setup: Setup, batch: int, name: str) -> Iterator[Any]:
    """Rows of ways that fail, and last {way: median seconds of a step}, over rounds in which each has its turn."""
    steps: dict[str, Step] = {}
    for way, make in makers.items():
        try:
            step = make()
            turn(step, setup, batch)
            steps[way] = step
        except Exception as error:
            yield failed(f"{name} {way}", error)
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    for _ in range(setup.rounds):
        for way, step in steps.items():
            seconds[way].append(turn(step, setup, batch))
    yield {way: statistics.median(values) for way, values in seconds.items()}


def failed(name: str, error: Exception) -> Row:
    traceback.print_exc(file=sys.stderr)
    lines = str(error).strip().splitlines() or [""]
    return Row(name, "failed", "", None, "", False, f"{type(error).__name__}: {lines[0][:200]}")
