"""FCOS: fully convolutional one-stage detection (arXiv 1904.01355; improved: arXiv 2006.09214)."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from msil.detection.assign import FCOSAssigner, GroundTruth
from msil.detection.coders import Distances
from msil.detection.heads.base import DenseHead, HeadOptions, LossTerm, register
from msil.detection.heads.layers import init_normal, init_prior, predictor
from msil.detection.losses import box_loss, centerness_loss, centerness_targets, sigmoid_focal_loss
from msil.detection.priors import PriorGenerator, Priors
from msil.detection.structures import Level, Predictions


@dataclass(frozen=True, kw_only=True)
class FCOSOptions(HeadOptions):
    """conv_bias: biases in the towers, beside the norms.
    center_sampling, center_sample_radius: only points within so many strides of a box's centre are its positives.
    centerness_on_reg: predict centre-ness from the regression tower, else from the classification tower.
    norm_on_bbox: distances are max(scale * conv, 0) in strides, else exp(scale * conv) in pixels.
    loss_bbox: "giou" or "iou" (-log IoU).
    point_offset: where in its cell a point lies, in strides: 0.5, the middle; 0, the corner, as in torchvision.
    regress_ranges: of the levels, in pixels; a box belongs to the levels whose range holds the largest distance from
        point to side.

    The original form (36.6 AP in MMDetection) is conv_bias=False, center_sampling=False, centerness_on_reg=False,
    norm_on_bbox=False, loss_bbox="iou", detected with nms_thresh 0.5.
    """

    conv_bias: bool = True
    center_sampling: bool = True
    center_sample_radius: float = 1.5
    centerness_on_reg: bool = True
    norm_on_bbox: bool = True
    loss_bbox: str = "giou"
    point_offset: float = 0.5
    regress_ranges: tuple[tuple[float, float], ...] = ((-1, 64), (64, 128), (128, 256), (256, 512), (512, 1e8))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("center_sample_radius", self.center_sample_radius > 0, "above 0")
        self.check("loss_bbox", self.loss_bbox in ("giou", "iou"), "giou or iou")
        self.check("point_offset", 0 <= self.point_offset < 1, "at least 0 and below 1")
        self.check("regress_ranges", len(self.regress_ranges) == len(self.strides), "as many as strides")


@register("fcos")
class FCOSHead(DenseHead):
    """FCOS, by default in its improved form. MSIL sits behind both towers, before every predictor."""

    Options, title = FCOSOptions, "FCOS"
    recipe = MappingProxyType({"warmup_factor": 1 / 3, "bias_lr_factor": 2.0, "bias_weight_decay": 0.0})

    def build(self) -> None:
        o: FCOSOptions = self.options
        self.priors = PriorGenerator(self.strides, offset=o.point_offset)
        ranges = tuple((float(low), float(high)) for low, high in o.regress_ranges)
        self.assigner = FCOSAssigner(ranges, float(o.center_sample_radius) if o.center_sampling else None)
        self.coder = Distances(by_stride=o.norm_on_bbox)
        self.make_towers(o.conv_bias)
        self.cls_logits = predictor(self.channels, self.num_classes)
        self.bbox_reg = predictor(self.channels, 4)
        self.bbox_ctrness = predictor(self.channels, 1)
        self.scales = nn.Parameter(torch.ones(len(self.strides)))
        init_normal(self)
        init_prior(self.cls_logits)

    def start_fast(self) -> None:
        """Also distances of one stride, where those near 0 have no gradient through their ReLU."""
        super().start_fast()
        if self.options.norm_on_bbox:
            assert self.bbox_reg.bias is not None
            nn.init.ones_(self.bbox_reg.bias)

    def predict(self, level: int, cls_feat: Tensor, reg_feat: Tensor) -> Level:
        raw = (self.bbox_reg(reg_feat) * self.scales[level]).float()
        distances = raw.clamp(min=0) if self.options.norm_on_bbox else raw.exp()
        centerness = self.bbox_ctrness(reg_feat if self.options.centerness_on_reg else cls_feat)
        return Level(self.cls_logits(cls_feat), distances, centerness)

    def terms(self, predictions: Predictions, priors: Priors, truth: GroundTruth) -> dict[str, LossTerm]:
        """Focal loss, IoU or GIoU weighted by centre-ness, and BCE of the centre-ness."""
        assert predictions.quality is not None
        labels, boxes, positive, *_ = self.assign(predictions, priors, truth)
        distances = self.coder.encode(priors, boxes)
        centerness = torch.where(positive, centerness_targets(distances), 0)
        num_pos = positive.sum()
        return {
            "loss_cls": LossTerm(sigmoid_focal_loss(predictions.logits, labels), num_pos),
            "loss_bbox": LossTerm(
                box_loss(predictions.box, distances, centerness, self.options.loss_bbox), centerness.sum(), floor=1e-6
            ),
            "loss_centerness": LossTerm(centerness_loss(predictions.quality, centerness, positive), num_pos),
        }
