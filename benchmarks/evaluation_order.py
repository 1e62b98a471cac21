"""P18: evaluating images of several sizes in the order of their padded sizes, as the data module does, against the
order of the file.

    python -m benchmarks.evaluation_order

FCOS with ResNet-10 and 64 channels, images of 240x320, 320x240, 216x320 and 240x240 in a shuffled order, eight a batch:
`predict` takes together what is padded to one size.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.compare import Row, counted, faster, interleaved, run
from msil.detection import Detections, build_detector

SIZES = {(240, 320): 16, (320, 240): 8, (216, 320): 4, (240, 240): 4}  # and how many
BATCH = 8


@torch.no_grad()
def measure() -> Iterator[Row]:
    torch.manual_seed(0)
    detector = build_detector("fcos", "resnet10", 20, channels=64, msil=None, min_size=240, max_size=320)
    detector.lay_out(channels_last=True)
    detector.eval()
    nn.init.ones_(detector.head.get_parameter("cls_logits.bias"))  # so that it finds something
    images = [torch.randint(256, (3, *size), dtype=torch.uint8) for size, count in SIZES.items() for _ in range(count)]
    in_file = [images[index] for index in torch.randperm(len(images)).tolist()]
    ordered = sorted(in_file, key=lambda image: [-(-side // 32) for side in image.shape[1:]])
    passes: list[int] = []
    hook = detector.backbone.register_forward_pre_hook(lambda _, given: passes.append(len(given[0])))

    def evaluated(order: list[Tensor]) -> list[Detections]:
        return [one for i in range(0, len(order), BATCH) for one in detector.predict(order[i : i + BATCH])]

    calls = {}
    boxes = {}
    for name, order in (("ordered", ordered), ("file", in_file)):
        passes.clear()
        found = evaluated(order)
        calls[name] = len(passes)
        boxes[name] = {id(image): one.boxes for image, one in zip(order, found, strict=True)}
    hook.remove()
    apart = max((boxes["ordered"][key] - other).abs().max().item() for key, other in boxes["file"].items())
    assert apart < 1e-2, apart
    agreement = f"the same boxes to {apart:.0e} px"
    yield counted("P18 forward passes of an evaluation", calls["ordered"], calls["file"], None, agreement)
    seconds = interleaved({"ordered": partial(evaluated, ordered), "file": partial(evaluated, in_file)})
    yield faster("P18 the same, time of all of it", seconds["ordered"], seconds["file"], None, agreement)


if __name__ == "__main__":
    run(measure, __doc__)
