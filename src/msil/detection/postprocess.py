"""From raw scores to detections: one selection and decoding for the whole batch, one NMS an image."""

from __future__ import annotations

import torch
import torchvision.ops
from torch import Tensor

from msil.detection.boxes import clip_boxes
from msil.detection.structures import Detections


def select_candidates(
    logits: Tensor, map_sizes: tuple[tuple[int, int], ...], score_thresh: float, topk_candidates: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best (point, class) pairs of each level whose class probability exceeds `score_thresh`.

    logits (N, P, K). Returns scores (N, C) with 0 where a level had fewer, points (N, C) in [0, P), labels (N, C),
    C = sum over levels of min(topk_candidates, points * K). One point may give several classes.
    """
    num_classes = logits.shape[-1]
    scores, points, labels = [], [], []
    start = 0
    for height, width in map_sizes:
        count = height * width
        probability = logits[:, start : start + count].flatten(1).sigmoid()
        probability = torch.where(probability > score_thresh, probability, 0)
        # sym_min is min, also for the symbolic sizes of an export.
        best, index = probability.topk(torch.sym_min(topk_candidates, count * num_classes), dim=1)
        scores.append(best)
        points.append(start + index // num_classes)
        labels.append(index % num_classes)
        start += count
    return torch.cat(scores, 1), torch.cat(points, 1), torch.cat(labels, 1)


def detections_from_candidates(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    image_sizes: list[tuple[int, int]],
    *,
    nms_thresh: float,
    detections_per_img: int,
) -> list[Detections]:
    """Clip to the images, drop empty boxes, suppress overlaps above `nms_thresh` class by class, keep the best.

    boxes (N, C, 4), scores (N, C) with 0 for "no candidate", labels (N, C); image_sizes N pairs (height, width).
    """
    sizes = torch.tensor(image_sizes, dtype=boxes.dtype, device=boxes.device)
    boxes = clip_boxes(boxes, sizes)
    real = (scores > 0) & (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])
    detections = []
    for image_boxes, image_scores, image_labels, kept in zip(boxes, scores, labels, real, strict=True):
        image_boxes, image_scores, image_labels = image_boxes[kept], image_scores[kept], image_labels[kept]
        best = batched_nms(image_boxes, image_scores, image_labels, nms_thresh)[:detections_per_img]
        detections.append(Detections(image_boxes[best], image_scores[best], image_labels[best]))
    return detections


@torch.library.custom_op("msil::batched_nms", mutates_args=())
def batched_nms(boxes: Tensor, scores: Tensor, labels: Tensor, nms_thresh: float) -> Tensor:
    """torchvision.ops.batched_nms, as one operator: it branches on the number of boxes, which an export cannot follow.

    boxes (C, 4), scores (C,), labels (C,) -> indices of the boxes kept, by descending score.
    """
    return torchvision.ops.batched_nms(boxes, scores, labels, nms_thresh)


@batched_nms.register_fake
def _(boxes: Tensor, scores: Tensor, labels: Tensor, nms_thresh: float) -> Tensor:
    return labels.new_empty(torch.library.get_ctx().new_dynamic_size())
