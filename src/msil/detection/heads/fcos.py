"""FCOS: fully convolutional one-stage detection (arXiv 1904.01355; improved: arXiv 2006.09214).

N images, P points over L levels, K classes, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from msil.detection.assign import GroundTruth, fcos_assign, ground_truth, pad_ground_truth
from msil.detection.boxes import LevelGrid, boxes_to_distances, distances_to_boxes, level_grid
from msil.detection.heads.base import DenseHead, build_msil, flatten_levels, init_normal
from msil.detection.losses import (
    EPSILON,
    box_loss,
    centerness_loss,
    centerness_targets,
    mean_across_ranks,
    sigmoid_focal_loss,
)
from msil.detection.postprocess import detections_from_candidates, select_candidates
from msil.detection.structures import Detections, Predictions, Target


class FCOSHead(DenseHead):
    """The FCOS head, by default in its improved form, with MSIL between towers and predictors if asked for.

    num_classes: K. channels: C of every pyramid level and of the towers.
    num_convs: convolutions a tower. norm_groups: of the towers' GroupNorm.
    msil: an nn.Module from (cls_feat, reg_feat) to the same, a dict of MSIL's keyword arguments, or None.
    conv_bias: biases in the towers, beside the norms.
    center_sampling, center_sample_radius: only points within so many strides of a box's centre are its positives.
    centerness_on_reg: predict centre-ness from the regression tower, else from the classification tower.
    norm_on_bbox: distances are max(scale * conv, 0) in strides, else exp(scale * conv) in pixels.
    loss_bbox: "giou" or "iou" (-log IoU).
    point_offset: where in its cell a point lies, in strides: 0.5, the middle; 0, the corner, as in torchvision.
    strides, regress_ranges: of the levels, in pixels; a box belongs to the levels whose range holds the largest
        distance from point to side.

    The original form (36.6 AP in MMDetection) is conv_bias=False, center_sampling=False, centerness_on_reg=False,
    norm_on_bbox=False, loss_bbox="iou", detected with nms_thresh 0.5.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int = 256,
        *,
        num_convs: int = 4,
        norm_groups: int = 32,
        msil: nn.Module | Mapping[str, Any] | None = None,
        conv_bias: bool = True,
        center_sampling: bool = True,
        center_sample_radius: float = 1.5,
        centerness_on_reg: bool = True,
        norm_on_bbox: bool = True,
        loss_bbox: str = "giou",
        point_offset: float = 0.5,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        regress_ranges: Sequence[tuple[float, float]] = ((-1, 64), (64, 128), (128, 256), (256, 512), (512, 1e8)),
    ) -> None:
        super().__init__(channels, num_convs, norm_groups, conv_bias)
        if loss_bbox not in ("giou", "iou"):
            raise ValueError(f"loss_bbox must be giou or iou, not {loss_bbox!r}.")
        if center_sampling and center_sample_radius <= 0:
            raise ValueError(f"center_sample_radius must be positive, not {center_sample_radius}.")
        if not 0 <= point_offset < 1:
            raise ValueError(f"point_offset must be at least 0 and below 1, not {point_offset}.")
        if len(strides) != len(regress_ranges):
            raise ValueError(f"{len(strides)} strides need as many regress_ranges, not {len(regress_ranges)}.")
        self.num_classes = num_classes
        self.center_sample_radius = float(center_sample_radius) if center_sampling else None
        self.centerness_on_reg = centerness_on_reg
        self.norm_on_bbox = norm_on_bbox
        self.loss_bbox = loss_bbox
        self.point_offset = float(point_offset)
        self.strides = tuple(strides)
        self.regress_ranges = tuple((float(low), float(high)) for low, high in regress_ranges)

        self.cls_logits = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.bbox_reg = nn.Conv2d(channels, 4, 3, padding=1)
        self.bbox_ctrness = nn.Conv2d(channels, 1, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(len(self.strides)))
        init_normal(self)
        nn.init.constant_(self.cls_logits.bias, -math.log(99))  # pyright: ignore[reportArgumentType]
        # Last, so that with one seed the plain head and every MSIL variant start from the same weights.
        self.msil = build_msil(channels, msil)

    def forward(self, pyramid: list[Tensor]) -> Predictions:
        """L pyramid levels (N, C, H, W) -> Predictions; distances in strides with norm_on_bbox, else in pixels."""
        if len(pyramid) != len(self.strides):
            raise ValueError(f"the head has {len(self.strides)} levels, the pyramid {len(pyramid)}.")
        cls_feats, reg_feats = self.towers(pyramid)
        logits = [self.cls_logits(feat) for feat in cls_feats]
        distances = [self.bbox_reg(feat) * scale for feat, scale in zip(reg_feats, self.scales, strict=True)]
        centerness = [self.bbox_ctrness(feat) for feat in (reg_feats if self.centerness_on_reg else cls_feats)]
        flat = flatten_levels(distances).float()
        return Predictions(
            logits=flatten_levels(logits),
            distances=flat.clamp(min=0) if self.norm_on_bbox else flat.exp(),
            map_sizes=tuple((level.shape[-2], level.shape[-1]) for level in pyramid),
            centerness=flatten_levels(centerness).squeeze(-1),
        )

    def targets(self, predictions: Predictions, targets: list[Target]) -> tuple[Tensor, Tensor]:
        """Labels (N, P) int64, K for background, and distances (N, P, 4) in the units of `predictions.distances`.

        Distances of background points are those to an arbitrary box and mean nothing.
        """
        return self._targets(predictions.map_sizes, *pad_ground_truth(targets, predictions.logits.device))

    def _targets(self, map_sizes: tuple[tuple[int, int], ...], boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        grid = level_grid(map_sizes, self.strides, self.point_offset, boxes.device)
        matched = fcos_assign(
            boxes, labels, grid, map_sizes, self.strides, self.regress_ranges, self.center_sample_radius,
            self.point_offset,
        )  # fmt: skip
        index = matched.clamp(min=0)
        point_labels = labels.gather(1, index).masked_fill_(matched < 0, self.num_classes)
        point_boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4))
        distances = boxes_to_distances(grid.points, point_boxes)
        if self.norm_on_bbox:
            distances = distances / grid.point_strides[:, None]
        return point_labels, distances

    def loss(
        self, predictions: Predictions, targets: list[Target], image_sizes: list[tuple[int, int]]
    ) -> dict[str, Tensor]:
        """Scalars "loss_cls" (focal), "loss_bbox" (IoU or GIoU, weighted by centre-ness), "loss_centerness" (BCE).

        N targets in pixels of the padded input. Divisors are averaged over all ranks first. image_sizes is not used:
        to FCOS a point in the padding is a point like any other.
        """
        return self.part_loss(predictions, targets, image_sizes, None)

    def part_loss(
        self,
        predictions: Predictions,
        targets: list[Target],
        image_sizes: list[tuple[int, int]],
        divisors: Tensor | None,
    ) -> dict[str, Tensor]:
        """As `loss`, for a part of a step's images. divisors: the whole step's, as `divisors` gives them; None: the
        part is the whole."""
        if len(targets) != len(predictions.logits):
            raise ValueError(f"{len(predictions.logits)} images need as many targets, not {len(targets)}.")
        truth = ground_truth(targets, None, predictions.logits.device)
        return self.padded_loss(predictions, truth, divisors)

    def padded_loss(
        self, predictions: Predictions, truth: GroundTruth, divisors: Tensor | None = None
    ) -> dict[str, Tensor]:
        """As `part_loss`: tensors in, tensors out, so that it can be compiled or captured."""
        assert predictions.centerness is not None
        labels, distances = self._targets(predictions.map_sizes, truth.boxes, truth.labels)
        positive, centerness = self._positives(labels, distances)
        if divisors is None:
            divisors = self.divisors(torch.stack([positive.sum().float(), centerness.sum()]))
        num_pos, centerness_sum = divisors.unbind()
        return {
            "loss_cls": sigmoid_focal_loss(predictions.logits, labels) / num_pos,
            "loss_bbox": box_loss(predictions.distances, distances, centerness, self.loss_bbox) / centerness_sum,
            "loss_centerness": centerness_loss(predictions.centerness, centerness, positive) / num_pos,
        }

    def sums(self, map_sizes: tuple[tuple[int, int], ...], targets: list[Target]) -> Tensor:
        """(2,): how many points of some images are positive, and the sum of their centre-ness.

        map_sizes: (height, width) of each level, as in Predictions; the targets decide the rest.
        """
        boxes, labels = pad_ground_truth(targets, self.scales.device)
        positive, centerness = self._positives(*self._targets(map_sizes, boxes, labels))
        return torch.stack([positive.sum().float(), centerness.sum()])

    def divisors(self, sums: Tensor) -> Tensor:
        """(2,): what this rank's loss terms are divided by, so that their mean over all ranks is the whole step's.

        sums: as `sums` gives them, of all the images that this rank has in the step.
        """
        return mean_across_ranks(sums, at_least=(1, 1e-6)) + EPSILON

    def detect(
        self,
        predictions: Predictions,
        image_sizes: list[tuple[int, int]],
        *,
        score_thresh: float = 0.05,
        nms_thresh: float = 0.6,
        topk_candidates: int = 1000,
        detections_per_img: int = 100,
    ) -> list[Detections]:
        """N Detections, clipped to image_sizes (height, width), in pixels of the padded input.

        score_thresh: of the class probability alone; the final score is that times the centre-ness.
        topk_candidates: (point, class) pairs a level that enter the NMS.
        """
        assert predictions.centerness is not None
        scores, points, labels = select_candidates(
            predictions.logits, predictions.map_sizes, score_thresh, topk_candidates
        )
        grid = self._grid(predictions)
        distances = predictions.distances.gather(1, points[..., None].expand(-1, -1, 4))
        if self.norm_on_bbox:
            distances = distances * grid.point_strides[points][..., None]
        boxes = distances_to_boxes(grid.points[points], distances)
        scores = scores * predictions.centerness.float().gather(1, points).sigmoid()
        return detections_from_candidates(
            boxes, scores, labels, image_sizes, nms_thresh=nms_thresh, detections_per_img=detections_per_img
        )

    def _positives(self, labels: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
        """Which points are positive (N, P) bool, and their centre-ness (N, P), 0 elsewhere."""
        positive = labels < self.num_classes
        return positive, torch.where(positive, centerness_targets(distances), 0)

    def _grid(self, predictions: Predictions) -> LevelGrid:
        return level_grid(predictions.map_sizes, self.strides, self.point_offset, predictions.logits.device)
