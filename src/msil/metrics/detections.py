"""Detections collected over updates and processes: the base of the metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from msil.detection.structures import Detections
from msil.metrics.record import EvaluationRecord, GroundTruth, make_record


@dataclass(frozen=True)
class CollectedDetections:
    """Detections of all images evaluated so far on all processes, by ascending image id; I images, D detections.

    Inside an image they keep the order in which the detector gave them.

    image_ids: (I,) int64, every image evaluated, also those without a detection.
    owners: (D,) int64, each detection's image id.
    boxes: (D, 4) float32, x1 y1 x2 y2. scores: (D,) float32. labels: (D,) int64.
    """

    image_ids: np.ndarray
    owners: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


class DetectionMetric(Metric):
    """Accumulates detections as tensor states, which torchmetrics gathers over the processes in `compute`.

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

    def __init__(self, truth: GroundTruth) -> None:
        super().__init__()
        self.truth = truth
        self._known_images = frozenset(truth.image_ids.tolist())
        for name in ("boxes", "scores", "labels", "counts", "image_ids"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

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

    def sync(
        self,
        dist_sync_fn: Callable | None = None,
        process_group: Any | None = None,
        should_sync: bool = True,
        distributed_available: Callable | None = None,
    ) -> None:
        """Gather the states of all processes, also when some of them were never updated."""
        # For an empty list torchmetrics would send a float32 tensor of shape (0,): a wrong dtype for the integer
        # states and one dimension too few for the boxes, so that the gather hangs or fails.
        for name, empty in _empty_states(self.device).items():
            state = getattr(self, name)
            if isinstance(state, list) and not state:
                state.append(empty)
        super().sync(dist_sync_fn, process_group, should_sync, distributed_available)

    def gathered(self) -> CollectedDetections:
        """The detections of all processes, the same on each. All of them must call this. Raises as `collected`."""
        with self.sync_context():
            return self.collected()

    def collected(self) -> CollectedDetections:
        """The states as arrays, independent of the order of updates and of the number of processes.

        After `sync` (inside `compute` or `sync_context`) they cover all processes.

        Raises RuntimeError for an image that was evaluated twice, ValueError for boxes or scores that are not finite
        and for labels outside the classes.
        """
        state = {name: _joined(getattr(self, name), empty) for name, empty in _empty_states(self.device).items()}
        image_ids, times = np.unique(state["image_ids"], return_counts=True)
        if (times > 1).any():
            twice = image_ids[times > 1].tolist()
            raise RuntimeError(
                f"{len(twice)} image(s) were evaluated more than once, the first with id {twice[0]}: "
                "reset the metric before each evaluation and give every image to one process only"
            )
        owners = np.repeat(state["image_ids"], state["counts"])
        order = np.argsort(owners, kind="stable")
        found = CollectedDetections(
            image_ids=image_ids,
            owners=owners[order],
            boxes=state["boxes"][order],
            scores=state["scores"][order],
            labels=state["labels"][order],
        )
        _check(found, len(self.truth.classes))
        return found

    def record(self) -> EvaluationRecord:
        """What is collected, as `collected` gives it, beside the truth."""
        return make_record(self.truth, self.collected())


def _empty_states(device: torch.device) -> dict[str, Tensor]:
    integers = torch.zeros(0, dtype=torch.int64, device=device)
    return {
        "boxes": torch.zeros((0, 4), device=device),
        "scores": torch.zeros(0, device=device),
        "labels": integers,
        "counts": integers,
        "image_ids": integers,
    }


def _joined(state: list[Tensor] | Tensor, empty: Tensor) -> np.ndarray:
    # A list before torchmetrics has gathered it, one tensor after.
    joined = state if isinstance(state, Tensor) else torch.cat([empty, *state])
    return joined.cpu().numpy()


def _check(found: CollectedDetections, num_classes: int) -> None:
    # A NaN box compares false with every threshold, which pycocotools counts as a match.
    broken = ~(np.isfinite(found.boxes).all(axis=1) & np.isfinite(found.scores))
    if broken.any():
        raise ValueError(f"detections of image {found.owners[broken][0]} have boxes or scores that are not finite")
    foreign = (found.labels < 0) | (found.labels >= num_classes)
    if foreign.any():
        label, image_id = found.labels[foreign][0], found.owners[foreign][0]
        raise ValueError(f"a detection of image {image_id} has label {label}, outside [0, {num_classes})")
