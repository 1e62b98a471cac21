"""RetinaNet: focal loss on nine anchors a cell (arXiv 1708.02002)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from msil.detection.assign import GroundTruth, MaxIoUAssigner
from msil.detection.coders import Deltas
from msil.detection.heads.base import DenseHead, HeadOptions, LossTerm, register
from msil.detection.heads.layers import init_normal, init_prior, predictor
from msil.detection.losses import l1_loss, sigmoid_focal_loss
from msil.detection.priors import PriorGenerator, Priors
from msil.detection.structures import Level, Predictions

SCALES = tuple(4 * 2 ** (octave / 3) for octave in range(3))
RATIOS = (0.5, 1.0, 2.0)


@dataclass(frozen=True, kw_only=True)
class RetinaNetOptions(HeadOptions):
    """whole_anchors: anchors of whole pixels, as torchvision's."""

    norm_groups: int | None = None
    extra_convs: str = "on_input"
    relu_before_extra_convs: bool = False
    whole_anchors: bool = False


@register("retinanet")
class RetinaNetHead(DenseHead):
    """RetinaNet. MSIL sits behind both towers, which have no norm, before both predictors."""

    Options, title = RetinaNetOptions, "RetinaNet"

    def build(self) -> None:
        o: RetinaNetOptions = self.options
        self.priors = PriorGenerator(self.strides, scales=SCALES, ratios=RATIOS, whole=o.whole_anchors)
        self.assigner = MaxIoUAssigner()
        self.coder = Deltas()
        self.make_towers(conv_bias=o.norm_groups is None)
        self.cls_logits = predictor(self.channels, self.priors.per_cell * self.num_classes)
        self.bbox_reg = predictor(self.channels, self.priors.per_cell * 4)
        init_normal(self)
        init_prior(self.cls_logits)

    def predict(self, level: int, cls_feat: Tensor, reg_feat: Tensor) -> Level:
        return Level(self.cls_logits(cls_feat), self.bbox_reg(reg_feat).float())

    def terms(self, predictions: Predictions, priors: Priors, truth: GroundTruth) -> dict[str, LossTerm]:
        """Focal loss, and L1 of the deltas."""
        labels, boxes, positive, ignored, *_ = self.assign(predictions, priors, truth)
        num_pos = positive.sum(1).clamp(min=1).sum()  # an image without a positive counts as one
        deltas = self.coder.encode(priors, boxes)
        return {
            "loss_cls": LossTerm(sigmoid_focal_loss(predictions.logits, labels, ignored), num_pos),
            "loss_bbox": LossTerm(l1_loss(predictions.box, deltas, positive), num_pos),
        }
