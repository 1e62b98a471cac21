"""P9: from raw outputs to detections, a batch of two at 800 x 1344 with 1000 candidates a level, against torchvision's.

    python -m benchmarks.postprocessing

Ours is FCOSHead.detect, torchvision's FCOS.postprocess_detections; NMS at 0.6, 100 detections an image. torchvision
scores by sqrt(class * centre-ness) before it thresholds and selects, MMDetection (and so ours) selects by the class
alone and multiplies by the centre-ness after it. With a centre-ness of 1 everywhere these are one rule, and both must
find the same boxes, labels and (torchvision's squared) scores: that is asserted. Timed is a random centre-ness, with
many candidates and with few.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxLinearCoder
from torchvision.models.detection.fcos import FCOS

from benchmarks.compare import MANY, Row, faster, interleaved, run
from benchmarks.fcos_assignment import anchors
from benchmarks.scenes import IMAGE, map_sizes, num_points
from msil.detection import Detections, FCOSHead, Predictions

IMAGES = 2
THRESHOLD = 0.05


def outputs(shift: float) -> tuple[Tensor, Tensor]:
    """Logits (N, P, 80) and distances (N, P, 4) in strides. shift: added to normal noise; -4 leaves thousands of scores
    above the threshold on each level, as a net does early in training, -6.5 some hundreds in all."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(IMAGES, num_points(), 80, generator=generator) + shift
    return logits, 1 + 3 * torch.rand(IMAGES, num_points(), 4, generator=generator)


def ours(head: FCOSHead, predictions: Predictions) -> list[Detections]:
    return head.detect(predictions, [IMAGE] * IMAGES, score_thresh=THRESHOLD)


class Torchvision:
    """FCOS.postprocess_detections. score_thresh: of sqrt(class * centre-ness)."""

    def __init__(self, score_thresh: float) -> None:
        boxes, levels = anchors(IMAGES)
        self.anchors = [list(image.split(levels)) for image in boxes]
        self.levels = levels
        self.net = mock.Mock(
            score_thresh=score_thresh, topk_candidates=1000, nms_thresh=0.6, detections_per_img=100,
            box_coder=BoxLinearCoder(normalize_by_size=True),
        )  # fmt: skip

    def __call__(self, logits: Tensor, distances: Tensor, centerness: Tensor) -> Any:
        named = {"cls_logits": logits, "bbox_regression": distances, "bbox_ctrness": centerness[..., None]}
        levels = {name: list(value.split(self.levels, dim=1)) for name, value in named.items()}
        return FCOS.postprocess_detections(self.net, levels, self.anchors, [IMAGE] * IMAGES)  # pyright: ignore


def check(head: FCOSHead, logits: Tensor, distances: Tensor) -> str:
    sure = torch.full(logits.shape[:2], 50.0)  # a probability of 1
    found = ours(head, Predictions(logits, distances, map_sizes(), sure))
    expected = Torchvision(THRESHOLD**0.5)(logits, distances, sure)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine.labels, theirs["labels"])
        torch.testing.assert_close(mine.boxes, theirs["boxes"], rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(mine.scores, theirs["scores"] ** 2, rtol=1e-5, atol=1e-6)
    return f"the same {sum(len(image.scores) for image in found)} detections"


@torch.no_grad()
def measure() -> Iterator[Row]:
    head = FCOSHead(80, point_offset=0.0)
    theirs = Torchvision(0.2)
    for shift, goal, words in ((-4.0, 3.5, "1000 candidates a level"), (-6.5, None, "few candidates")):
        logits, distances = outputs(shift)
        agreement = check(head, logits, distances)
        centerness = torch.randn(IMAGES, num_points(), generator=torch.Generator().manual_seed(1))
        predictions = Predictions(logits, distances, map_sizes(), centerness)
        seconds = interleaved(
            {"ours": partial(ours, head, predictions), "anchor": partial(theirs, logits, distances, centerness)},
            repeats=MANY,
        )
        yield faster(f"P9 post-processing, {words}", seconds["ours"], seconds["anchor"], goal, agreement)


if __name__ == "__main__":
    run(measure, __doc__)
