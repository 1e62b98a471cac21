"""P16: a training step of `python run.py` (FCOS+MSIL, ResNet-10, 4 images of 128 px) with PyTorch's fused AdamW, as it
runs on a CPU, against the same step with AdamW weight by weight.

    python -m benchmarks.fused_optimizer

Forward, loss, backward, the gradients' norm, clipping and the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.compare import Row, faster, interleaved, run
from benchmarks.scenes import ground_truth
from msil.detection import Detector, build_detector

SIZE, IMAGES = (128, 128), 4


def detector() -> Detector:
    torch.manual_seed(0)
    made = build_detector("fcos", "resnet10", 4, channels=64)
    made.lay_out(channels_last=True)
    return made.train()


def measure() -> Iterator[Row]:
    images = [torch.randint(256, (3, *SIZE), dtype=torch.uint8) for _ in range(IMAGES)]
    targets = ground_truth(images=IMAGES, boxes=3, classes=4, size=SIZE)

    def step(net: Detector, optimizer: torch.optim.Optimizer) -> None:
        torch.stack(list(net.loss(images, targets).values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()

    nets = {True: detector(), None: detector()}
    ways: dict[str, Callable[[], None]] = {
        str(fused): partial(step, net, torch.optim.AdamW(net.parameters(), lr=0.002, fused=fused))
        for fused, net in nets.items()
    }
    for way in ways.values():
        way()
    pairs = zip(nets[True].parameters(), nets[None].parameters(), strict=True)
    apart = max((ours - theirs).abs().max().item() for ours, theirs in pairs)
    assert apart < 1e-6, apart
    seconds = interleaved(ways, repeats=21)
    agreement = f"weights after a step to {apart:.0e}"
    yield faster("P16 fused AdamW, FCOS+MSIL R10 step", seconds["True"], seconds["None"], 1.05, agreement)


if __name__ == "__main__":
    run(measure, __doc__)
