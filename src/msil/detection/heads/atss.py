"""ATSS: adaptive training sample selection on one square anchor a cell (arXiv 1912.02424)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from msil.detection.assign import ATSSAssigner, GroundTruth
from msil.detection.coders import Deltas, Distances
from msil.detection.heads.base import DenseHead, HeadOptions, LossTerm, register
from msil.detection.heads.layers import init_normal, init_prior, predictor
from msil.detection.losses import box_loss, centerness_loss, centerness_targets, sigmoid_focal_loss
from msil.detection.priors import PriorGenerator, Priors
from msil.detection.structures import Level, Predictions, edges


@dataclass(frozen=True, kw_only=True)
class ATSSOptions(HeadOptions):
    relu_before_extra_convs: bool = False


@register("atss")
class ATSSHead(DenseHead):
    """ATSS. MSIL sits behind both towers, before every predictor; centre-ness is the regression tower's."""

    Options, title = ATSSOptions, "ATSS"

    def build(self) -> None:
        self.priors = PriorGenerator(self.strides, scales=(8.0,))
        self.assigner = ATSSAssigner()
        self.coder = Deltas(stds=(0.1, 0.2))
        self.make_towers(conv_bias=self.options.norm_groups is None)
        self.cls_logits = predictor(self.channels, self.num_classes)
        self.bbox_reg = predictor(self.channels, 4)
        self.bbox_ctrness = predictor(self.channels, 1)
        self.scales = nn.Parameter(torch.ones(len(self.strides)))
        init_normal(self)
        init_prior(self.cls_logits)

    def predict(self, level: int, cls_feat: Tensor, reg_feat: Tensor) -> Level:
        deltas = (self.bbox_reg(reg_feat) * self.scales[level]).float()
        return Level(self.cls_logits(cls_feat), deltas, self.bbox_ctrness(reg_feat))

    def terms(self, predictions: Predictions, priors: Priors, truth: GroundTruth) -> dict[str, LossTerm]:
        """Focal loss, GIoU of the decoded box weighted by centre-ness, and BCE of the centre-ness."""
        assert predictions.quality is not None
        labels, boxes, positive, ignored, *_ = self.assign(predictions, priors, truth)
        centerness = torch.where(positive, centerness_targets(Distances().encode(priors, boxes)), 0)
        num_pos = positive.sum(1).clamp(min=1).sum()  # an image without a positive counts as one
        decoded = self.coder.decode(priors, predictions.box)
        return {
            "loss_cls": LossTerm(sigmoid_focal_loss(predictions.logits, labels, ignored), num_pos),
            "loss_bbox": LossTerm(
                box_loss(edges(decoded), edges(boxes), centerness, "giou"), centerness.sum(), weight=2.0
            ),
            "loss_centerness": LossTerm(centerness_loss(predictions.quality, centerness, positive), num_pos),
        }
