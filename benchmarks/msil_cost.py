"""P10: what the MSIL block costs in time, against what it costs in FLOPs: FCOS with ResNet-50 on the CPU at 320 px.

    python -m benchmarks.msil_cost

The anchor is the plain detector (model.msil.apply=none); the block is on, aligned, separated and applied to both
branches, with 3 x 3 and with 1 x 1 convolutions. A training step (one image: forward, loss, backward) and an
evaluation forward (one image), each compared with the FLOPs of the very same calls: the ratio is the time with the
block over the time without it, the goal the same quotient of FLOPs, times 1.02 and 1.05. Frozen BatchNorm, stem and
first stage frozen, channels last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from benchmarks.compare import Row, interleaved, run, seconds_said
from benchmarks.operators import flops
from benchmarks.scenes import ground_truth
from msil.detection import Detector, ResNetOptions, Target, build_detector

SIZE = (320, 320)
AT_MOST = {3: 1.02, 1: 1.05}  # times the quotient of FLOPs, by kernel size


def detector_with(kernel_size: int | None) -> Detector:
    """kernel_size: of the block, or None for the plain detector."""
    torch.manual_seed(0)
    msil = None if kernel_size is None else {"kernel_size": kernel_size}
    detector = build_detector("fcos", ResNetOptions("resnet50", norm="frozen_bn", frozen_stages=1), 80, msil=msil)
    detector.lay_out(channels_last=True)
    return detector


def training(detector: Detector, images: list[Tensor], targets: list[Target]) -> None:
    torch.stack(list(detector.loss(images, targets).values())).sum().backward()


def measure() -> Iterator[Row]:
    sizes = (None, 3, 1)
    detectors = {size: detector_with(size) for size in sizes}
    images = [torch.randint(256, (3, *SIZE), dtype=torch.uint8) for _ in range(1)]
    targets = ground_truth(images=1, boxes=7, size=SIZE)
    yield from rows("training step", {size: partial(training, detectors[size], images, targets) for size in sizes})
    batch = torch.randn(1, 3, *SIZE).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        ways = {size: partial(detectors[size].eval().net, batch) for size in sizes}
        yield from rows("evaluation forward", ways)


def rows(what: str, ways: Mapping[int | None, Callable[[], object]]) -> Iterator[Row]:
    counted = {size: flops(way) for size, way in ways.items()}
    seconds = interleaved({str(size): way for size, way in ways.items()})
    plain = seconds["None"]
    for size, at_most in AT_MOST.items():
        of_time, of_flops = seconds[str(size)] / plain, counted[size] / counted[None]
        yield Row(
            f"P10 MSIL {size}x{size}, {what}", seconds_said(seconds[str(size)]), seconds_said(plain), of_time,
            f"<= {at_most * of_flops:.3f}x", of_time <= at_most * of_flops,
            f"FLOPs {counted[size] / 1e9:.1f} G over {counted[None] / 1e9:.1f} G = {of_flops:.3f}",
        )  # fmt: skip


if __name__ == "__main__":
    run(measure, __doc__)
