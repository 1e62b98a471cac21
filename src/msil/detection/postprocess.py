"""From raw scores to detections: selection and decoding for the whole batch, class-wise NMS for each image, and
test-time augmentation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torchvision.ops
from torch import Tensor

from msil.detection.structures import Detections, clip_boxes, sizes_tensor

_ROUNDS = 16  # each settles one more link of a chain in which boxes suppress each other
# NMS of the best candidates does not depend on the others: it first runs on 3 times as many as there are detections
# asked for, then, if too few are left, on 10 times as many, and on all of them last.
SHARES = (3, 10)


def select_candidates(
    logits: Tensor, level_sizes: Sequence[int], score_thresh: float, topk_candidates: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best (prior, class) pairs of each level whose class probability exceeds `score_thresh`.

    logits (N, P, K), level_sizes: priors of each level. Returns scores (N, C) float32 with 0 where a level had fewer,
    priors (N, C) in [0, P), labels (N, C), C = sum over levels of min(topk_candidates, priors * K). One prior may give
    several classes.
    """
    scores, priors, labels = [], [], []
    start = 0
    for count in level_sizes:
        best, prior, label = _best_pairs(logits[:, start : start + count], topk_candidates)
        probability = best.float().sigmoid()
        scores.append(torch.where(probability > score_thresh, probability, 0))
        priors.append(start + prior)
        labels.append(label)
        start += count
    return torch.cat(scores, 1), torch.cat(priors, 1), torch.cat(labels, 1)


def _best_pairs(logits: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """The highest min(limit, P * K) of logits (N, P, K), falling: values, priors and classes, (N, C) each.

    They lie in the `limit` priors of the highest maxima: a pair of any other prior has as many above it. So the long
    list of all pairs is never sorted.
    """
    count, classes = logits.shape[1:]
    chosen = logits.amax(-1).topk(torch.sym_min(limit, count), dim=1).indices  # sym_min is min, also of symbols
    # Whole rows, which torch.gather would collect number by number.
    pairs = torch.stack([image.index_select(0, rows) for image, rows in zip(logits, chosen, strict=True)]).flatten(1)
    best, index = pairs.topk(torch.sym_min(limit, count * classes), dim=1)
    return best, chosen.gather(1, index // classes), index % classes


def detections_from_candidates(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    image_sizes: list[tuple[int, int]],
    *,
    nms_thresh: float,
    detections_per_img: int,
    clip: bool = True,
) -> list[Detections]:
    """Clip to the images, drop empty boxes, suppress overlaps above `nms_thresh` class by class, keep the best.

    boxes (N, C, 4), scores (N, C) with 0 for "no candidate", labels (N, C); image_sizes N pairs (height, width).
    One host sync a batch, of any size. clip: False leaves boxes as they are (TOOD).
    """
    if clip:
        boxes = clip_boxes(boxes, sizes_tensor(image_sizes, boxes.device).to(boxes.dtype))
    real = (scores > 0) & (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])
    if torch.compiler.is_exporting():
        return [
            _chosen(*image, batched_nms(*image, nms_thresh)[:detections_per_img])
            for image in ((b[k], s[k], c[k]) for b, s, c, k in zip(boxes, scores, labels, real, strict=True))
        ]
    scores, order = torch.where(real, scores, 0).sort(dim=1, descending=True, stable=True)
    boxes, labels = boxes.gather(1, order[..., None].expand(-1, -1, 4)), labels.gather(1, order)
    thinned = _thinned_together if boxes.is_cuda else _thinned_one_by_one
    return thinned(boxes, scores, labels, nms_thresh, detections_per_img)


def _thinned_one_by_one(
    boxes: Tensor, scores: Tensor, labels: Tensor, nms_thresh: float, limit: int
) -> list[Detections]:
    """torchvision's NMS of each image. Boxes (N, C, 4), scores and labels (N, C), falling, 0 for no candidate."""
    counts = (scores > 0).sum(1).tolist()  # the host sync
    return [
        _thinned(image_boxes[:count], image_scores[:count], image_labels[:count], nms_thresh, limit)
        for image_boxes, image_scores, image_labels, count in zip(boxes, scores, labels, counts, strict=True)
    ]


def _thinned_together(boxes: Tensor, scores: Tensor, labels: Tensor, nms_thresh: float, limit: int) -> list[Detections]:
    """The same for all images at once, in fixed shapes and with one host sync."""
    candidates, most = (scores > 0).sum(1), SHARES[-1] * limit
    kept, settled = settled_nms(boxes[:, :most], labels[:, :most], nms_thresh)
    kept &= scores[:, :most] > 0
    place = torch.arange(kept.shape[1], device=kept.device)
    best = torch.where(kept, place, len(place)).sort(dim=1).values[:, :limit]  # the kept ones' places, rising
    counts = kept.sum(1).clamp(max=limit)
    complete = settled & ((counts == limit) | (candidates <= most))
    numbers = torch.stack([counts, candidates, complete], dim=1).tolist()  # the host sync
    return [
        _chosen(boxes[image], scores[image], labels[image], best[image, :count])
        if done
        else _thinned(boxes[image, :some], scores[image, :some], labels[image, :some], nms_thresh, limit)
        for image, (count, some, done) in enumerate(numbers)
    ]


def _thinned(boxes: Tensor, scores: Tensor, labels: Tensor, nms_thresh: float, limit: int) -> Detections:
    """The first `limit` detections of one image; boxes (C, 4), scores (C,) falling, labels (C,)."""
    for count in (*(share * limit for share in SHARES if share * limit < len(boxes)), len(boxes)):
        best = batched_nms(boxes[:count], scores[:count], labels[:count], nms_thresh)[:limit]
        if len(best) == limit:
            break
    return _chosen(boxes, scores, labels, best)


def _chosen(boxes: Tensor, scores: Tensor, labels: Tensor, index: Tensor) -> Detections:
    return Detections(boxes[index], scores[index], labels[index])


@torch.library.custom_op("msil::batched_nms", mutates_args=())
def batched_nms(boxes: Tensor, scores: Tensor, labels: Tensor, nms_thresh: float) -> Tensor:
    """torchvision.ops.batched_nms, as one operator: it branches on the number of boxes, which an export cannot follow.

    boxes (C, 4), scores (C,), labels (C,) -> indices of the boxes kept, by descending score.
    """
    return torchvision.ops.batched_nms(boxes, scores, labels, nms_thresh)


@batched_nms.register_fake
def _(boxes: Tensor, scores: Tensor, labels: Tensor, nms_thresh: float) -> Tensor:
    return labels.new_empty(torch.library.get_ctx().new_dynamic_size())


def settled_nms(boxes: Tensor, labels: Tensor, nms_thresh: float) -> tuple[Tensor, Tensor]:
    """The same for a batch, in fixed shapes and without host syncs.

    A box is kept if no better kept box overlaps it. The greedy NMS is the only solution of this rule, and iterating
    it settles the boxes from the best one downwards. boxes (N, C, 4) and labels (N, C) by falling score. Returns kept
    (N, C) bool and settled (N,) bool: False where a chain of more than 16 boxes needs more rounds.
    """
    low = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    high = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    common = (high - low).clamp(min=0).prod(-1)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    iou = common / (area[:, :, None] + area[:, None] - common)
    # [n, i, j]: i, if it stays, suppresses j.
    suppresses = ((iou > nms_thresh) & (labels[:, :, None] == labels[:, None])).triu(1)
    kept = before = torch.ones_like(labels, dtype=torch.bool)
    for _ in range(_ROUNDS):
        before = kept
        kept = ~(suppresses & kept[:, :, None]).any(1)
    return kept, (kept == before).all(1)


def scaled_limits(scales: Sequence[int], min_size: int, max_size: int) -> list[tuple[int, int] | None]:
    """(short side, limit of the long side) of each view in pixels, in the proportion of min_size and max_size:
    400 and 1200 of 800, 1333 are (400, 667) and (1200, 2000), as in MMDetection."""
    return [(scale, int(max_size * scale / min_size + 0.5)) for scale in scales]


def mirrored(detections: Detections, width: int) -> Detections:
    """Left and right exchanged in an image `width` pixels wide: x becomes width - x."""
    x1, y1, x2, y2 = detections.boxes.unbind(1)
    return Detections(torch.stack([width - x2, y1, width - x1, y2], dim=1), detections.scores, detections.labels)


def rescaled(detections: Detections, size: tuple[int, int], original: tuple[int, int], clip: bool = True) -> Detections:
    """From the pixels of an image of `size` (height, width) to those of the `original` that it was resized from. clip:
    whether the boxes were clipped to the image."""
    if size == original:
        return detections
    scale = (original[1] / size[1], original[0] / size[0])  # of x and y: numbers travel with a kernel, a tensor waits
    sides = enumerate(detections.boxes.unbind(1))
    # Rounding can carry a clipped side past the image by a few millionths of a pixel.
    most = (original[1], original[0]) if clip else (float("inf"),) * 2
    boxes = torch.stack([(side * scale[i % 2]).clamp(max=most[i % 2]) for i, side in sides], dim=1)
    return Detections(boxes, detections.scores, detections.labels)


def merged(views: Sequence[Detections], *, nms_thresh: float, detections_per_img: int) -> Detections:
    """The detections of all views of one image, in its pixels, after one class-wise NMS; the best, by falling score."""
    boxes = torch.cat([view.boxes for view in views])
    scores = torch.cat([view.scores for view in views])
    labels = torch.cat([view.labels for view in views])
    best = batched_nms(boxes, scores, labels, nms_thresh)[:detections_per_img]
    return _chosen(boxes, scores, labels, best)
