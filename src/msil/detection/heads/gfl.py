"""GFL: generalized focal loss, a joint score and a distribution for each side (arXiv 2006.04388)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from msil.detection.assign import ATSSAssigner, GroundTruth
from msil.detection.coders import Integral
from msil.detection.heads.base import DenseHead, HeadOptions, LossTerm, register, take
from msil.detection.heads.layers import init_normal, init_prior, predictor
from msil.detection.losses import box_loss, box_quality, distribution_focal_loss, quality_focal_loss
from msil.detection.priors import PriorGenerator, Priors
from msil.detection.structures import Level, Predictions


@dataclass(frozen=True, kw_only=True)
class GFLOptions(HeadOptions):
    """reg_max: the largest distance that a side's distribution holds, in strides."""

    relu_before_extra_convs: bool = False
    reg_max: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("reg_max", self.reg_max >= 1, "at least 1")


@register("gfl")
class GFLHead(DenseHead):
    """GFL with ATSS assignment. MSIL sits behind both towers, before both predictors."""

    Options, title = GFLOptions, "GFL"
    coder: Integral

    def build(self) -> None:
        self.priors = PriorGenerator(self.strides, scales=(8.0,))
        self.assigner = ATSSAssigner()
        self.coder = Integral(self.options.reg_max)
        self.make_towers(conv_bias=self.options.norm_groups is None)
        self.cls_logits = predictor(self.channels, self.num_classes)
        self.bbox_reg = predictor(self.channels, self.coder.channels)
        self.scales = nn.Parameter(torch.ones(len(self.strides)))
        init_normal(self)
        init_prior(self.cls_logits)

    def predict(self, level: int, cls_feat: Tensor, reg_feat: Tensor) -> Level:
        return Level(self.cls_logits(cls_feat), (self.bbox_reg(reg_feat) * self.scales[level]).float())

    def terms(self, predictions: Predictions, priors: Priors, truth: GroundTruth) -> dict[str, LossTerm]:
        """Quality focal loss on the predicted box's IoU; GIoU and distribution focal loss, both weighted by the highest
        class probability."""
        learnt = self.assign(predictions, priors, truth)
        num_pos = learnt.positive.sum(1).clamp(min=1).sum()  # an image without a positive counts as one
        rows = learnt.rows()
        positive, raw = take(learnt.positive, rows), take(predictions.box, rows)
        targets = self.coder.encode(priors.at(rows), take(learnt.boxes, rows))
        distances = self.coder.distances(raw)
        qualities = box_quality(distances, targets, positive)
        quality = torch.zeros_like(learnt.positive, dtype=qualities.dtype).scatter_(1, rows, qualities)
        weights = torch.where(positive, take(predictions.logits.detach(), rows).amax(-1).float().sigmoid(), 0)
        weight_sum = weights.sum()
        cls_total = quality_focal_loss(predictions.logits, learnt.labels, quality, learnt.ignored)
        return {
            "loss_cls": LossTerm(cls_total, num_pos),
            "loss_bbox": LossTerm(box_loss(distances, targets, weights, "giou"), weight_sum, weight=2.0),
            "loss_dfl": LossTerm(distribution_focal_loss(raw, targets, weights), weight_sum, weight=0.25 / 4),
        }
