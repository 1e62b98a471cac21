"""VFNet: an IoU-aware dense detector with varifocal loss and star-shaped box refinement (arXiv 2008.13367).

N images, P points over L levels, K classes, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from msil.detection.assign import GroundTruth, atss_assign, ground_truth
from msil.detection.boxes import LevelGrid, boxes_to_distances, distances_to_boxes, level_grid
from msil.detection.heads.base import ConvNormAct, DenseHead, build_msil, flatten_levels, init_normal
from msil.detection.losses import EPSILON, box_loss, box_quality, mean_across_ranks, varifocal_loss
from msil.detection.postprocess import detections_from_candidates, select_candidates
from msil.detection.starconv import StarConv, star_offsets
from msil.detection.structures import Detections, Predictions, Target

BBOX_WEIGHT, BBOX_REFINED_WEIGHT = 1.5, 2.0


class VFNetHead(DenseHead):
    """The VFNet head with ATSS assignment, and MSIL between towers and everything else if asked for.

    MSIL comes before the initial regression, so that both star convolutions see the enhanced features.

    num_classes: K. channels: C of every pyramid level and of the towers.
    num_convs: convolutions a tower. norm_groups: of the GroupNorms.
    msil: an nn.Module from (cls_feat, reg_feat) to the same, a dict of MSIL's keyword arguments, or None.
    init: "authors", all convolutions N(0, 0.01); or "mmdet", the star convolutions and the one before the initial
        regression by Kaiming's rule, as MMDetection 3 leaves them. Both are published with the same AP.
    strides: of the levels. regress_denoms: what the exponential of the initial regression is multiplied by, pixels.
    """

    point_offset = 0.0  # where in its cell a point lies, in strides: ATSS's, at the corner

    def __init__(
        self,
        num_classes: int,
        channels: int = 256,
        *,
        num_convs: int = 3,
        norm_groups: int = 32,
        msil: nn.Module | Mapping[str, Any] | None = None,
        init: str = "authors",
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        regress_denoms: Sequence[float] = (64, 128, 256, 512, 1024),
    ) -> None:
        super().__init__(channels, num_convs, norm_groups, conv_bias=False)
        if init not in ("authors", "mmdet"):
            raise ValueError(f"init must be authors or mmdet, not {init!r}.")
        if len(strides) != len(regress_denoms):
            raise ValueError(f"{len(strides)} strides need as many regress_denoms, not {len(regress_denoms)}.")
        self.num_classes = num_classes
        self.strides = tuple(strides)
        self.regress_denoms = tuple(float(denom) for denom in regress_denoms)

        self.reg_conv = ConvNormAct(channels, norm_groups, bias=False)
        self.bbox_reg = nn.Conv2d(channels, 4, 3, padding=1)
        self.reg_star = StarConv(channels, channels)
        self.bbox_refine = nn.Conv2d(channels, 4, 3, padding=1)
        self.cls_star = StarConv(channels, channels)
        self.cls_logits = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.act = nn.ReLU()
        self.scales = nn.Parameter(torch.ones(len(self.strides)))
        self.scales_refine = nn.Parameter(torch.ones(len(self.strides)))
        self._init_weights(init)
        # Last, so that with one seed the plain head and every MSIL variant start from the same weights.
        self.msil = build_msil(channels, msil)

    def forward(self, pyramid: list[Tensor]) -> Predictions:
        """L pyramid levels (N, C, H, W) -> Predictions; distances refined, initial_distances not, both in pixels.

        The refined distances pass no gradient to the initial ones.
        """
        if len(pyramid) != len(self.strides):
            raise ValueError(f"the head has {len(self.strides)} levels, the pyramid {len(pyramid)}.")
        logits, initial, refined = [], [], []
        for level, (cls_feat, reg_feat) in enumerate(zip(*self.towers(pyramid), strict=True)):
            distances = self._initial(reg_feat, level)
            offsets = star_offsets(distances, self.strides[level])
            refinement = self.bbox_refine(self.act(self.reg_star(reg_feat, offsets)))
            factor = (refinement.float() * self.scales_refine[level]).exp()
            initial.append(distances)
            refined.append(factor * distances.detach())
            logits.append(self.cls_logits(self.act(self.cls_star(cls_feat, offsets))))
        return Predictions(
            logits=flatten_levels(logits),
            distances=flatten_levels(refined),
            map_sizes=tuple((level.shape[-2], level.shape[-1]) for level in pyramid),
            initial_distances=flatten_levels(initial),
        )

    def targets(
        self, predictions: Predictions, targets: list[Target], image_sizes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Labels (N, P) int64, K for background, and distances (N, P, 4) in pixels.

        Distances of background points are those to an arbitrary box and mean nothing.
        """
        return self._targets(predictions, ground_truth(targets, image_sizes, predictions.logits.device))

    def _targets(self, predictions: Predictions, truth: GroundTruth) -> tuple[Tensor, Tensor]:
        assert truth.sizes is not None
        grid = self._grid(predictions)
        matched = atss_assign(truth.boxes, truth.labels, grid, predictions.map_sizes, truth.sizes)
        index = matched.clamp(min=0)
        point_labels = truth.labels.gather(1, index).masked_fill_(matched < 0, self.num_classes)
        point_boxes = truth.boxes.gather(1, index[..., None].expand(-1, -1, 4))
        return point_labels, boxes_to_distances(grid.points, point_boxes)

    def loss(
        self, predictions: Predictions, targets: list[Target], image_sizes: list[tuple[int, int]]
    ) -> dict[str, Tensor]:
        """Scalars "loss_cls" (varifocal), "loss_bbox" and "loss_bbox_rf" (GIoU of the initial and of the refined box,
        weighted by their IoU).

        N targets in pixels of the padded input; image_sizes N pairs (height, width) before padding: points beyond an
        image's own size, rounded up to 32, are never positive (but count as negatives, as in MMDetection). Divisors
        are averaged over all ranks first.
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
        if not len(targets) == len(image_sizes) == len(predictions.logits):
            raise ValueError(
                f"{len(predictions.logits)} images need as many targets and sizes, not {len(targets)} and "
                f"{len(image_sizes)}."
            )
        truth = ground_truth(targets, image_sizes, predictions.logits.device)
        return self.padded_loss(predictions, truth, divisors)

    def padded_loss(
        self, predictions: Predictions, truth: GroundTruth, divisors: Tensor | None = None
    ) -> dict[str, Tensor]:
        """As `part_loss`: tensors in, tensors out, so that it can be compiled or captured."""
        labels, distances = self._targets(predictions, truth)
        boxes = self._boxes(predictions)
        positive, qualities = self._qualities(boxes, labels, distances)
        if divisors is None:
            divisors = self.divisors(self._sums(positive, qualities))
        initial_loss, refined_loss = (box_loss(boxes, distances, qualities, "giou") / divisors[1:]).unbind()
        return {
            "loss_cls": varifocal_loss(predictions.logits, labels, qualities[1]) / divisors[0],
            "loss_bbox": BBOX_WEIGHT * initial_loss,
            "loss_bbox_rf": BBOX_REFINED_WEIGHT * refined_loss,
        }

    def sums(self, predictions: Predictions, targets: list[Target], image_sizes: list[tuple[int, int]]) -> Tensor:
        """(3,): how many points of some images are positive, and the sums of their initial and refined boxes' IoU.

        Arguments as in `loss`.
        """
        labels, distances = self.targets(predictions, targets, image_sizes)
        return self._sums(*self._qualities(self._boxes(predictions), labels, distances))

    def divisors(self, sums: Tensor) -> Tensor:
        """(3,): what this rank's loss terms are divided by, so that their mean over all ranks is the whole step's.

        sums: as `sums` gives them, of all the images that this rank has in the step.
        """
        return mean_across_ranks(sums, at_least=(1, 1, 1)) + EPSILON

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

        The score is the class probability, which varifocal loss teaches to be the IoU as well.
        topk_candidates: (point, class) pairs a level that enter the NMS.
        """
        scores, points, labels = select_candidates(
            predictions.logits, predictions.map_sizes, score_thresh, topk_candidates
        )
        distances = predictions.distances.gather(1, points[..., None].expand(-1, -1, 4))
        boxes = distances_to_boxes(self._grid(predictions).points[points], distances)
        return detections_from_candidates(
            boxes, scores, labels, image_sizes, nms_thresh=nms_thresh, detections_per_img=detections_per_img
        )

    @staticmethod
    def _boxes(predictions: Predictions) -> Tensor:
        """The initial and the refined distances, (2, N, P, 4): what is done to both is done at once."""
        assert predictions.initial_distances is not None
        return torch.stack([predictions.initial_distances, predictions.distances])

    def _qualities(self, boxes: Tensor, labels: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
        """Which points are positive (N, P) bool, and the IoU of both boxes (2, N, P) there, 0 elsewhere."""
        positive = labels < self.num_classes
        return positive, box_quality(boxes, distances, positive)

    @staticmethod
    def _sums(positive: Tensor, qualities: Tensor) -> Tensor:
        return torch.cat([positive.sum()[None], qualities.sum(dim=(1, 2))])

    def _initial(self, reg_feat: Tensor, level: int) -> Tensor:
        """The first guess of left, top, right, bottom (N, 4, H, W), pixels."""
        raw = self.bbox_reg(self.reg_conv(reg_feat)).float() * self.scales[level]
        return raw.exp() * self.regress_denoms[level]

    def _grid(self, predictions: Predictions) -> LevelGrid:
        return level_grid(predictions.map_sizes, self.strides, self.point_offset, predictions.logits.device)

    def _init_weights(self, init: str) -> None:
        init_normal(self)
        nn.init.constant_(self.cls_logits.bias, -math.log(99))  # pyright: ignore[reportArgumentType]
        if init == "authors":
            for star in (self.reg_star, self.cls_star):
                nn.init.normal_(star.weight, std=0.01)
        else:  # a star convolution comes as MMDetection's does
            nn.init.kaiming_normal_(self.reg_conv.conv.weight, mode="fan_out", nonlinearity="relu")
