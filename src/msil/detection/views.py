"""Several views of one image: multi-scale and mirrored testing. Pure functions of tensors.

As in Detectron2 and MMDetection: each view gives its own detections, which are mapped back into the image, put together
and thinned out by one NMS more, class by class.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from msil.detection.nms import batched_nms
from msil.detection.structures import Detections


def scaled_limits(scales: Sequence[int], min_size: int, max_size: int) -> list[tuple[int, int] | None]:
    """(short side, limit of the long side) of each view in pixels.

    The limit keeps its proportion to the short side, as in MMDetection's scales of testing: 400, 800 and 1200 of
    800, 1333 are (400, 667), (800, 1333), (1200, 2000).
    """
    return [(scale, int(max_size * scale / min_size + 0.5)) for scale in scales]


def mirrored(detections: Detections, width: int) -> Detections:
    """Left and right exchanged in an image `width` pixels wide: x becomes width - x."""
    x1, y1, x2, y2 = detections.boxes.unbind(1)
    return Detections(torch.stack([width - x2, y1, width - x1, y2], dim=1), detections.scores, detections.labels)


def rescaled(detections: Detections, size: tuple[int, int], original: tuple[int, int]) -> Detections:
    """From the pixels of an image of `size` (height, width) to those of the `original` that it was resized from."""
    if size == original:
        return detections
    y, x = original[0] / size[0], original[1] / size[1]
    scaled = detections.boxes * detections.boxes.new_tensor([x, y, x, y])
    # Rounding can carry a side past the image by a few millionths of a pixel.
    boxes = torch.stack([scaled[:, i].clamp(max=original[1 - i % 2]) for i in range(4)], dim=1)
    return Detections(boxes, detections.scores, detections.labels)


def merged(views: Sequence[Detections], *, nms_thresh: float, detections_per_img: int) -> Detections:
    """The detections of all views of one image, in its pixels, after one class-wise NMS; the best, by falling score."""
    boxes = torch.cat([view.boxes for view in views])
    scores = torch.cat([view.scores for view in views])
    labels = torch.cat([view.labels for view in views])
    best = batched_nms(boxes, scores, labels, nms_thresh)[:detections_per_img]
    return Detections(boxes[best], scores[best], labels[best])
