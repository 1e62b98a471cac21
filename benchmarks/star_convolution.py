"""The star convolution's gathers against torchvision's operator, forward and backward, on one CPU thread.

    python benchmarks/star_convolution.py

Both sides in one process, interleaved; medians of CPU seconds. Prints the largest difference of output and gradients,
relative to the largest value.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.ops import deform_conv2d

from msil.detection.starconv import gathered_conv

SIZES = ((2, 64, 16, 16), (1, 256, 40, 56), (2, 256, 10, 14))  # images, channels, height, width
REPEATS = 7


def operator(features: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    return deform_conv2d(features, offsets, weight, padding=(1, 1))


def timed(conv: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> tuple[float, list[Tensor]]:
    """CPU seconds of forward and backward, and the output with the inputs' gradients."""
    started = time.process_time()
    out = conv(*inputs)
    grads = torch.autograd.grad(out, inputs, grad)
    return time.process_time() - started, [out.detach(), *grads]


def main() -> None:
    torch.set_num_threads(1)
    print("images x channels x height x width   ours ms   operator ms   ratio   difference")
    for batch, channels, height, width in SIZES:
        torch.manual_seed(0)
        features = torch.randn(batch, channels, height, width).contiguous(memory_format=torch.channels_last)
        inputs = [features, 3 * torch.randn(batch, 18, height, width), 0.05 * torch.randn(channels, channels, 3, 3)]
        inputs = [tensor.requires_grad_() for tensor in inputs]
        grad = torch.randn(batch, channels, height, width)
        seconds: dict[str, list[float]] = {"ours": [], "operator": []}
        results: dict[str, list[Tensor]] = {}
        for _ in range(REPEATS):
            for name, conv in (("ours", gathered_conv), ("operator", operator)):
                taken, results[name] = timed(conv, inputs, grad)
                seconds[name].append(taken)
        ours, theirs = (1000 * statistics.median(seconds[name]) for name in ("ours", "operator"))
        pairs = zip(results["ours"], results["operator"], strict=True)
        difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        assert difference < 1e-5
        size = f"{batch} x {channels} x {height} x {width}"
        print(f"{size:35}  {ours:8.1f}  {theirs:12.1f}  {theirs / ours:6.1f}  {difference:.1e}", flush=True)


if __name__ == "__main__":
    main()
