"""P11: from a metric's collected detections to COCO's 12 numbers, 5000 images with 500,000 detections of 80 classes.

    python -m benchmarks.coco_evaluation

Both sides begin with the tensors that CocoMetric has collected, 8 images an update, and with the ground truth as
arrays; both end with the 12 numbers. Ours is what a run computes after every epoch (faster-coco-eval), the anchor what
it computes once at its end: pycocotools, on dicts without the polygon a detection that its own loadRes adds.
pycocotools takes so long that there are 2 rounds and no warm-up.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.compare import Row, faster, interleaved, run
from msil.detection import Detections
from msil.metrics.coco import CocoMetric, fast_stats
from msil.metrics.record import EvaluationRecord

IMAGES, PER_IMAGE, CLASSES = 5000, 100, 80
SIZE = (640.0, 480.0)  # width, height
CROWD = 0.012  # of the boxes, as in COCO's val2017


def ground_truth(images: int = IMAGES, seed: int = 0) -> EvaluationRecord:
    """Images with 0 to 14 boxes of 2 to 4 classes and of log-uniform sides; no detections yet."""
    rng = np.random.default_rng(seed)
    owners, labels, boxes, areas = [], [], [], []
    for image in range(images):
        classes = rng.choice(CLASSES, rng.integers(2, 5), replace=False)
        for _ in range(rng.integers(0, 15)):
            sides = np.exp(rng.uniform(np.log(8), np.log(400), 2))
            corner = rng.uniform(0, 1, 2) * (np.array(SIZE) - sides)
            owners.append(image)
            labels.append(rng.choice(classes))
            boxes.append(np.concatenate([corner, sides]).round(2))
            areas.append(sides.prod() * rng.uniform(0.4, 1))  # of the object's outline
    return EvaluationRecord(
        classes=np.array([f"class {c}" for c in range(CLASSES)]),
        category_ids=np.arange(1, CLASSES + 1),
        image_ids=np.arange(1, images + 1),
        file_names=np.array([f"{i}.jpg" for i in range(1, images + 1)]),
        sizes=np.tile((480, 640), (images, 1)),
        truth_images=np.array(owners),
        truth_boxes=np.array(boxes),
        truth_areas=np.array(areas),
        truth_labels=np.array(labels),
        truth_ignored=rng.random(len(owners)) < CROWD,
        found_images=np.zeros(0, dtype=np.int64),
        found_boxes=np.zeros((0, 4), dtype=np.float32),
        found_scores=np.zeros(0, dtype=np.float32),
        found_labels=np.zeros(0, dtype=np.int64),
    )


def detections(truth: EvaluationRecord, seed: int = 1) -> list[Detections]:
    """100 an image by descending score: every box up to three times, moved and now and then mislabelled, and others
    of low scores, three of four in the classes that the image has."""
    rng = np.random.default_rng(seed)
    found = []
    for image in range(len(truth.image_ids)):
        here = truth.truth_images == image
        xywh, classes = truth.truth_boxes[here], truth.truth_labels[here]
        times = rng.integers(0, 4, len(xywh))
        near = np.repeat(xywh, times, axis=0)
        sides = np.exp(rng.uniform(np.log(8), np.log(400), (PER_IMAGE - len(near), 2)))
        false = np.concatenate([rng.uniform(0, 1, sides.shape) * (np.array(SIZE) - sides), sides], axis=1)
        near += rng.normal(0, 0.07, near.shape) * near[:, [2, 3, 2, 3]]
        every = np.concatenate([near, false])
        present = classes if len(classes) else np.arange(CLASSES)
        labels = np.concatenate([np.repeat(classes, times), rng.choice(present, len(false))]).astype(np.int64)
        mislabelled = rng.random(PER_IMAGE) < np.where(np.arange(PER_IMAGE) < len(near), 0.1, 0.25)
        labels[mislabelled] = rng.integers(0, CLASSES, mislabelled.sum())
        scores = np.concatenate([rng.beta(4, 2, len(near)), rng.beta(1, 8, len(false))]).astype(np.float32)
        order = np.argsort(-scores)
        xyxy = np.concatenate([every[:, :2], every[:, :2] + every[:, 2:]], axis=1)[order].astype(np.float32)
        found.append(Detections(*(torch.from_numpy(x) for x in (xyxy, scores[order], labels[order]))))
    return found


def collected(truth: EvaluationRecord, found: list[Detections]) -> CocoMetric:
    """A metric at the end of an evaluation."""
    metric = CocoMetric(truth)
    for first in range(0, len(found), 8):
        batch = found[first : first + 8]
        metric.update(batch, list(range(first + 1, first + 1 + len(batch))))
    return metric


def measure() -> Iterator[Row]:
    truth = ground_truth()
    metric = collected(truth, detections(truth))
    numbers: dict[str, np.ndarray] = {}

    def ours() -> None:
        numbers["ours"] = np.array(list(fast_stats(metric.collected()).values()))

    def anchor() -> None:
        numbers["anchor"] = np.array(list(metric.compute_final().values()))

    seconds = interleaved({"ours": ours, "anchor": anchor}, repeats=2, warmup=0)
    assert len(numbers["ours"]) == 12 and np.isfinite(numbers["anchor"]).all()
    difference = float(np.abs(numbers["ours"] - numbers["anchor"]).max())
    assert difference <= 1e-8, f"a number differs by {difference:.1e}"
    yield faster(
        "P11 COCO evaluation, 500,000 detections", seconds["ours"], seconds["anchor"], 7,
        f"12 numbers differ by {difference:.0e} (AP {numbers['anchor'][0]:.3f}); 2 rounds",
    )  # fmt: skip


if __name__ == "__main__":
    run(measure, __doc__)
