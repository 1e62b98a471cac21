"""Detections collected over updates and processes: the base of the metrics."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from msil.detection.structures import Detections
from msil.metrics.record import AnnotatedSplit, EvaluationRecord, make_record

STATES = ("boxes", "scores", "labels", "counts", "image_ids")


class DetectionMetric(Metric):
    """Accumulates detections as tensor states, which torchmetrics gathers over the processes in `compute`.

    By itself it has no numbers: for images without annotations to score against.

    truth: the annotations of a split, of which any images may be evaluated. Label i of a detection is class i.

    Call `reset` before each evaluation: an image evaluated twice is an error.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    boxes: list[Tensor]
    scores: list[Tensor]
    labels: list[Tensor]
    counts: list[Tensor]
    image_ids: list[Tensor]

    def __init__(self, truth: AnnotatedSplit) -> None:
        super().__init__()
        self.truth = truth
        self.per_class: dict[str, float | None] = {}  # AP of the last final evaluation; None: no object that counts
        self._known_images = frozenset(truth.image_ids.tolist())
        for name in STATES:
            self.add_state(name, default=[], dist_reduce_fx="cat")
        self.reset()

    def update(self, detections: list[Detections], image_ids: list[int]) -> None:
        """Add the detections of some images.

        detections: one for each image, boxes in the pixels that the ground truth is given in.
        image_ids: ids of the ground truth's images, in the same order.

        Raises ValueError for lists of different lengths or an image id that the ground truth does not have.
        """
        if len(detections) != len(image_ids):
            raise ValueError(f"{len(detections)} detections were given for {len(image_ids)} image ids")
        unknown = sorted(set(image_ids) - self._known_images)
        if unknown:
            raise ValueError(f"image ids {unknown} are not in the ground truth")
        # The states stay on the metric's device: NCCL gathers only what lies on the GPU.
        for found in detections:
            self.boxes.append(found.boxes.detach().to(self.device, torch.float32))
            self.scores.append(found.scores.detach().to(self.device, torch.float32))
            self.labels.append(found.labels.detach().to(self.device, torch.int64))
        counts = [len(found.scores) for found in detections]
        self.counts.append(torch.tensor(counts, dtype=torch.int64, device=self.device))
        self.image_ids.append(torch.tensor(image_ids, dtype=torch.int64, device=self.device))

    def reset(self) -> None:
        """Each state begins with an empty tensor of its own shape and type: where a process was never updated,
        torchmetrics would send a float32 tensor of shape (0,) for an empty list, and the gather would hang or fail."""
        super().reset()
        self.boxes.append(torch.zeros((0, 4), device=self.device))
        self.scores.append(torch.zeros(0, device=self.device))
        for state in (self.labels, self.counts, self.image_ids):
            state.append(torch.zeros(0, dtype=torch.int64, device=self.device))

    def compute(self) -> dict[str, float]:
        return {}

    def compute_final(self) -> dict[str, float]:
        """The numbers of the last evaluation of a run, which are reported."""
        return self.compute()

    def gathered(self) -> EvaluationRecord:
        """`collected` of all processes, the same on each; all of them must call it."""
        with self.sync_context():
            return self.collected()

    def collected(self) -> EvaluationRecord:
        """The detections beside the truth, independent of the order of updates and of the number of processes.

        After `sync` (inside `compute` or `sync_context`) they cover all processes.

        Raises RuntimeError for an image that was evaluated twice, ValueError for boxes or scores that are not finite
        and for labels outside the classes.
        """
        state = {name: dim_zero_cat(getattr(self, name)).cpu().numpy() for name in STATES}
        image_ids, times = np.unique(state["image_ids"], return_counts=True)
        if (times > 1).any():
            twice = image_ids[times > 1].tolist()
            raise RuntimeError(
                f"{len(twice)} image(s) were evaluated more than once, the first with id {twice[0]}: "
                "reset the metric before each evaluation and give every image to one process only"
            )
        owners = np.repeat(state["image_ids"], state["counts"])
        boxes, scores, labels = state["boxes"], state["scores"], state["labels"]
        # A NaN box compares false with every threshold, which pycocotools counts as a match.
        broken = ~(np.isfinite(boxes).all(axis=1) & np.isfinite(scores))
        if broken.any():
            raise ValueError(f"detections of image {owners[broken][0]} have boxes or scores that are not finite")
        classes = len(self.truth.classes)
        foreign = (labels < 0) | (labels >= classes)
        if foreign.any():
            label, image_id = labels[foreign][0], owners[foreign][0]
            raise ValueError(f"a detection of image {image_id} has label {label}, outside [0, {classes})")
        return make_record(self.truth, image_ids, owners, boxes, scores, labels)


def named(classes: Collection[str], values: Sequence[float]) -> dict[str, float | None]:
    """AP by class; nan, of a class without an object that counts, as None."""
    return {name: None if math.isnan(value) else value for name, value in zip(classes, values, strict=True)}
