"""P8: the evaluation forward of FCOS with ResNet-50, CPU, one image of 480 x 480, against torchvision's as shipped.

    python -m benchmarks.evaluation_forward

From the normalised batch to raw outputs (backbone, FPN, head), without gradients; frozen BatchNorm, 80 classes, the
same weights. Ours is plain FCOS, compiled as mode=test trainer.compile=default does (for weights that stay) and eager,
both channels last, and eager without; the compilation is not counted. Two more rows: how close the convolutions come to
the rate of one large matrix product, which is what a core gives at best.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torchvision.models.detection import FCOS

from benchmarks.compare import Row, faster, interleaved, relative_difference, run
from benchmarks.operators import flops, matrix_product, rates
from benchmarks.scenes import detector_like, torchvision_fcos
from msil.detection import Detector

SIZE = (480, 480)


def theirs_of(net: FCOS, batch: Tensor) -> dict[str, Tensor]:
    return net.head(list(net.backbone(batch).values()))


def check(ours: Detector, net: FCOS, batch: Tensor) -> str:
    """Asserts that both give the same outputs."""
    found, expected = ours.net(batch), theirs_of(net, batch)
    pairs = (
        (found.logits, expected["cls_logits"]),
        (found.box, expected["bbox_regression"]),
        (found.quality, expected["bbox_ctrness"].squeeze(-1)),
    )
    worst = max(relative_difference(mine, other) for mine, other in pairs if mine is not None)
    assert worst < 1e-4, worst
    return f"raw outputs to {worst:.0e}"


@torch.no_grad()
def measure() -> Iterator[Row]:
    net = torchvision_fcos(SIZE).eval()
    eager, compiled = detector_like(net).eval(), detector_like(net).eval()
    first = detector_like(net, channels_last=False).eval()
    compiled.compile_parts(frozen=True)
    plain = torch.randn(1, 3, *SIZE)
    batch = plain.contiguous(memory_format=torch.channels_last)
    agreements = [check(ours, net, batch) for ours in (compiled, eager)]
    seconds = interleaved(
        {
            "compiled": partial(compiled.net, batch),
            "eager": partial(eager.net, batch),
            "first": partial(first.net, plain),
            "anchor": partial(theirs_of, net, plain),
            "product": matrix_product(),
        }
    )
    for way, goal, agreement in zip(("compiled", "eager"), (1.35, None), agreements, strict=True):
        name = f"P8 FCOS R50 evaluation forward, {way}"
        yield faster(name, seconds[way], seconds["anchor"], goal, agreement)
    name = "P8 the same, eager, channels_last=false"
    yield faster(name, seconds["first"], seconds["anchor"], None, check(first, net, plain))
    work = flops(partial(eager.net, batch))
    yield rates("P8 its rate, compiled", work, seconds["compiled"], seconds["product"])
    yield rates("P8 torchvision's rate", work, seconds["anchor"], seconds["product"])


if __name__ == "__main__":
    run(measure, __doc__)
