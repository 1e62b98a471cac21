"""P17 and P19: EfficientNet-Lite0 of timm with its frozen BatchNorms computed inside the convolutions before them, as
TimmBackbone does, against the norms as layers of their own.

    python -m benchmarks.folded_norms

A training step's forward and backward of FCOS (64 channels, two convolutions a tower, two frozen stages, 8 images of
192x256), and the evaluation forward of the backbone alone. Then `predict` of FCOS as `msil predict` and mode=test do
it, channels last and folded once, against a detector as `load_detector` returns it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.compare import Row, faster, interleaved, relative_difference, run
from benchmarks.scenes import ground_truth
from msil.detection import Detector, build_detector
from msil.detection.backbone import ResNetOptions, TimmOptions
from msil.detection.folding import keep_folded
from msil.detection.heads.fcos import FCOSHead

NET, SIZE, IMAGES, CLASSES = "tf_efficientnet_lite0", (192, 256), 8, 20


def detector(norm: str) -> Detector:
    torch.manual_seed(0)
    backbone = TimmOptions(NET, norm=norm, frozen_stages=2)
    made = build_detector(FCOSHead.Options(num_convs=2), backbone, CLASSES, msil=None, channels=64)
    for key, parameter in made.backbone.named_parameters():
        if ".bn" in key:
            parameter.requires_grad_(False)
    made.lay_out(channels_last=True)
    with_statistics(made, 1)
    return made.train()


def with_statistics(net: nn.Module, seed: int) -> None:
    """Norms as after a training: their fresh ones do nothing, and would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if hasattr(module, "running_var"):
            for name, low, high in (("running_mean", -0.2, 0.2), ("running_var", 0.5, 2), ("weight", 0.5, 1.5),
                                    ("bias", -0.2, 0.2)):  # fmt: skip
                getattr(module, name).data.uniform_(low, high, generator=generator)


def measure() -> Iterator[Row]:
    images = [torch.randint(256, (3, *SIZE), dtype=torch.uint8) for _ in range(IMAGES)]
    targets = ground_truth(images=IMAGES, boxes=3, classes=CLASSES, size=SIZE)
    batch = torch.rand(IMAGES, 3, *SIZE).contiguous(memory_format=torch.channels_last)

    def step(net: Detector) -> None:
        torch.stack(list(net.loss(images, targets).values())).sum().backward()
        net.zero_grad()

    @torch.no_grad()
    def forward(net: Detector) -> list[Tensor]:
        return net.backbone(batch)

    folded, apart = detector("frozen_bn"), detector("eval_bn")
    difference = max(map(relative_difference, forward(folded), forward(apart)))
    assert difference < 1e-4, difference
    ways: dict[str, Callable[[], object]] = {
        f"{way.__name__} {net}": partial(way, made)
        for way in (step, forward)
        for net, made in (("folded", folded), ("apart", apart))
    }
    seconds = interleaved(ways, repeats=21)
    for way, name in (("step", "FCOS Lite0 step"), ("forward", "Lite0 evaluation forward")):
        yield faster(
            f"P17 folded norms, {name}",
            seconds[f"{way} folded"],
            seconds[f"{way} apart"],
            1.05,
            f"maps to {difference:.0e}",
        )
    for name, count, size in (("resnet18", 1, (256, 320)), ("resnet50", 1, (320, 416)), ("resnet50", 1, (608, 800))):
        yield from predict_rows(name, ResNetOptions(name, norm="frozen_bn"), count, size)
    for count in (1, IMAGES):
        yield from predict_rows("Lite0", TimmOptions(NET, norm="frozen_bn"), count, SIZE)


def predict_rows(name: str, net: ResNetOptions | TimmOptions, count: int, size: tuple[int, int]) -> Iterator[Row]:
    loaded = build_detector(FCOSHead.Options(num_convs=2), net, CLASSES, msil=None, channels=64).eval()
    with_statistics(loaded, 2)
    laid_out = copy.deepcopy(loaded)
    laid_out.lay_out(channels_last=True)
    kept = copy.deepcopy(laid_out)
    keep_folded(kept)
    images = [torch.randint(256, (3, *size), dtype=torch.uint8) for _ in range(count)]
    with torch.no_grad():
        difference = max(map(relative_difference, kept.pyramid(images), loaded.pyramid(images)))
    assert difference < 1e-4, difference
    what = f"{name}, {count} of {size[0]}x{size[1]}"
    ways = {"loaded": loaded, "laid out": laid_out, "kept": kept}
    seconds = interleaved({way: partial(one.predict, images) for way, one in ways.items()}, repeats=21)
    yield faster(f"P19 predict, {what}", seconds["kept"], seconds["loaded"], 1.05, f"pyramid to {difference:.0e}")
    yield faster(f"P19 of it folded once, {what}", seconds["kept"], seconds["laid out"], None, "the same weights")


if __name__ == "__main__":
    run(measure, __doc__)
