"""VFNet: an IoU-aware dense detector with varifocal loss and star-shaped box refinement (arXiv 2008.13367)."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from msil.detection.assign import ATSSAssigner, GroundTruth
from msil.detection.coders import Distances
from msil.detection.heads.base import DenseHead, HeadOptions, LossTerm, register
from msil.detection.heads.layers import ConvNormAct, init_normal, init_prior, predictor
from msil.detection.losses import box_loss, box_quality, varifocal_loss
from msil.detection.priors import PriorGenerator, Priors
from msil.detection.starconv import StarConv, star_offsets
from msil.detection.structures import Level, Predictions


@dataclass(frozen=True, kw_only=True)
class VFNetOptions(HeadOptions):
    """init: "authors", all convolutions N(0, 0.01); or "mmdet", the star convolutions and the one before the first
        regression by Kaiming's rule, as MMDetection 3 leaves them. Both are published with the same AP.
    regress_denoms: what the exponential of the first regression is multiplied by, a level, pixels.
    """

    num_convs: int = 3
    init: str = "authors"
    regress_denoms: tuple[float, ...] = (64, 128, 256, 512, 1024)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("init", self.init in ("authors", "mmdet"), "authors or mmdet")
        self.check("regress_denoms", len(self.regress_denoms) == len(self.strides), "as many as strides")


@register("vfnet")
class VFNetHead(DenseHead):
    """VFNet with ATSS assignment.

    MSIL sits behind both towers, before the first regression, so that both star convolutions get the enhanced features.
    """

    Options, title = VFNetOptions, "VFNet"
    deformable = True
    recipe = MappingProxyType({"warmup_factor": 0.1, "bias_lr_factor": 2.0, "bias_weight_decay": 0.0})

    def build(self) -> None:
        o: VFNetOptions = self.options
        self.priors = PriorGenerator(self.strides, scales=(8.0,))
        self.assigner = ATSSAssigner()
        self.coder = Distances()
        self.make_towers(conv_bias=False)
        self.reg_conv = ConvNormAct(self.channels, o.norm_groups, bias=False)
        self.bbox_reg = predictor(self.channels, 4)
        self.reg_star = StarConv(self.channels, self.channels)
        self.bbox_refine = predictor(self.channels, 4)
        self.cls_star = StarConv(self.channels, self.channels)
        self.cls_logits = predictor(self.channels, self.num_classes)
        self.act = nn.ReLU()
        self.scales = nn.Parameter(torch.ones(len(self.strides)))
        self.scales_refine = nn.Parameter(torch.ones(len(self.strides)))
        init_normal(self)
        init_prior(self.cls_logits)
        if o.init == "authors":
            for star in (self.reg_star, self.cls_star):
                nn.init.normal_(star.weight, std=0.01)
        else:  # a star convolution starts as MMDetection's
            nn.init.kaiming_normal_(self.reg_conv.conv.weight, mode="fan_out", nonlinearity="relu")

    def start_fast(self) -> None:
        """Also the star convolutions, which have a ReLU and no norm behind them."""
        super().start_fast()
        for star in (self.reg_star, self.cls_star):
            nn.init.kaiming_normal_(star.weight, nonlinearity="relu")

    def predict(self, level: int, cls_feat: Tensor, reg_feat: Tensor) -> Level:
        """Both boxes are distances in pixels. The refined one passes no gradient to the first one."""
        raw = self.bbox_reg(self.reg_conv(reg_feat)).float() * self.scales[level]
        first = raw.exp() * self.options.regress_denoms[level]
        offsets = star_offsets(first, self.strides[level])
        refinement = self.bbox_refine(self.act(self.reg_star(reg_feat, offsets))).float()
        refined = (refinement * self.scales_refine[level]).exp() * first.detach()
        logits = self.cls_logits(self.act(self.cls_star(cls_feat, offsets)))
        return Level(logits, refined, first_box=first)

    def terms(self, predictions: Predictions, priors: Priors, truth: GroundTruth) -> dict[str, LossTerm]:
        """Varifocal loss, and GIoU of the first and of the refined box, each weighted by its IoU.

        Points in the batch's padding are never positive but count as negatives, as in MMDetection.
        """
        assert predictions.first_box is not None
        labels, boxes, positive, *_ = self.assign(predictions, priors, truth)
        distances = self.coder.encode(priors, boxes)
        both = torch.stack([predictions.first_box, predictions.box])  # what is done to both is done at once
        quality = box_quality(both, distances, positive)
        first, refined = box_loss(both, distances, quality, "giou").unbind()
        first_sum, refined_sum = quality.sum(dim=(1, 2)).unbind()
        return {
            "loss_cls": LossTerm(varifocal_loss(predictions.logits, labels, quality[1]), positive.sum()),
            "loss_bbox": LossTerm(first, first_sum, weight=1.5),
            "loss_bbox_rf": LossTerm(refined, refined_sum, weight=2.0),
        }
