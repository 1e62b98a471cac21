"""TOOD: task-aligned one-stage detection (arXiv 2108.07755), in its anchor-free form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from msil.detection.assign import ATSSAssigner, GroundTruth, Match, TaskAlignedAssigner
from msil.detection.coders import Corners, Distances
from msil.detection.heads.base import DenseHead, HeadOptions, LossTerm, register, take
from msil.detection.heads.layers import ConvNormAct, init_normal, init_prior, predictor
from msil.detection.losses import box_loss, centerness_targets, quality_focal_loss, sigmoid_focal_loss
from msil.detection.priors import PriorGenerator, Priors
from msil.detection.structures import Level, Predictions, distances_to_boxes, edges


@dataclass(frozen=True, kw_only=True)
class TOODOptions(HeadOptions):
    """num_convs: of the one tower that both tasks share. warmup_epochs: in which ATSS assigns and the classification
    loss is the focal loss."""

    num_convs: int = 6
    relu_before_extra_convs: bool = False
    warmup_epochs: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("warmup_epochs", self.warmup_epochs >= 0, "at least 0")


class TaskDecomposition(nn.Module):
    """One task's features of the tower's stacked outputs: a 1x1 convolution whose inputs are weighed layer by layer
    (arXiv 2108.07755, eq. 2 to 4), then GroupNorm and ReLU."""

    def __init__(self, channels: int, num_convs: int, norm_groups: int | None) -> None:
        super().__init__()
        stacked, hidden = channels * num_convs, channels // 8
        self.layer_attention = nn.Sequential(
            nn.Conv2d(stacked, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, num_convs, 1), nn.Sigmoid()
        )
        self.reduction = ConvNormAct(channels, norm_groups, bias=norm_groups is None)
        self.reduction.conv = nn.Conv2d(stacked, channels, 1, bias=norm_groups is None)

    def forward(self, stacked: Tensor, average: Tensor) -> Tensor:
        """stacked (N, num_convs C, H, W) and its mean over H and W (N, num_convs C, 1, 1) -> (N, C, H, W)."""
        attention = self.layer_attention(average)  # (N, num_convs, 1, 1)
        scale = attention.repeat_interleave(stacked.shape[1] // attention.shape[1], dim=1)
        return self.reduction(stacked * scale)


@register("tood")
class TOODHead(DenseHead):
    """TOOD. MSIL sits behind the task decomposition, before both predictors: there are no two towers before it. The two
    alignment branches, which read the shared tower, do not pass through it.

    warmup: True while ATSS assigns, in the first epochs.
    """

    Options, title = TOODOptions, "TOOD"
    clip_to_image, deformable = False, True
    assigner: TaskAlignedAssigner  # pyright: ignore[reportIncompatibleVariableOverride]

    def build(self) -> None:
        o: TOODOptions = self.options
        self.priors = PriorGenerator(self.strides, scales=(8.0,))
        self.warmup_assigner, self.assigner = ATSSAssigner(), TaskAlignedAssigner()
        self.coder = Corners()
        self.warmup = o.warmup_epochs > 0
        channels, stacked = self.channels, self.channels * o.num_convs
        bias = o.norm_groups is None
        self.inter_convs = nn.ModuleList(ConvNormAct(channels, o.norm_groups, bias) for _ in range(o.num_convs))
        self.cls_decomp = TaskDecomposition(channels, o.num_convs, o.norm_groups)
        self.reg_decomp = TaskDecomposition(channels, o.num_convs, o.norm_groups)
        self.cls_logits = predictor(channels, self.num_classes)
        self.bbox_reg = predictor(channels, 4)
        self.cls_prob = nn.Sequential(nn.Conv2d(stacked, channels // 4, 1), nn.ReLU(), predictor(channels // 4, 1))
        self.reg_offset = nn.Sequential(nn.Conv2d(stacked, channels // 4, 1), nn.ReLU(), predictor(channels // 4, 8))
        self.scales = nn.Parameter(torch.ones(len(self.strides)))
        init_normal(self)
        for module in (self.cls_decomp.layer_attention, self.reg_decomp.layer_attention, self.reg_offset):
            init_normal(module, std=0.001)
        init_prior(self.cls_logits)
        init_prior(self.cls_prob[2])

    def set_epoch(self, epoch: int) -> None:
        self.warmup = epoch < self.options.warmup_epochs

    def features(self, level: Tensor) -> tuple[Tensor, ...]:
        layers = []
        for conv in self.inter_convs:
            level = conv(level)
            layers.append(level)
        stacked = torch.cat(layers, dim=1)
        average = stacked.mean(dim=(2, 3), keepdim=True)
        return self.cls_decomp(stacked, average), self.reg_decomp(stacked, average), stacked

    def predict(self, level: int, cls_feat: Tensor, reg_feat: Tensor, stacked: Tensor) -> Level:
        logits = geometric_mean(self.cls_logits(cls_feat).float(), self.cls_prob(stacked).float())
        distances = (self.bbox_reg(reg_feat).float().exp() * self.scales[level]).permute(0, 2, 3, 1)
        height, width = distances.shape[1:3]
        y, x = torch.meshgrid(
            torch.arange(height, device=distances.device, dtype=distances.dtype),
            torch.arange(width, device=distances.device, dtype=distances.dtype),
            indexing="ij",
        )
        cells = torch.stack([x, y], dim=-1).expand(len(distances), -1, -1, -1)
        boxes = distances_to_boxes(cells, distances).permute(0, 3, 1, 2)
        return Level(logits, resample_sides(boxes, self.reg_offset(stacked).float()))

    def match(self, predictions: Predictions, priors: Priors, truth: GroundTruth) -> Match:
        if self.warmup:
            return self.warmup_assigner(priors, truth)
        boxes = self.coder.decode(priors, predictions.box.detach())
        return self.assigner(priors, truth, predictions.logits.detach(), boxes)

    def terms(self, predictions: Predictions, priors: Priors, truth: GroundTruth) -> dict[str, LossTerm]:
        """In the warm-up focal loss and GIoU weighted by centre-ness, then quality focal loss on the alignment metric
        and GIoU weighted by it."""
        learnt = self.assign(predictions, priors, truth)
        rows = learnt.rows()
        own, boxes = priors.at(rows), take(learnt.boxes, rows)
        if learnt.metric is None:
            cls_total = sigmoid_focal_loss(predictions.logits, learnt.labels, learnt.ignored)
            cls_sum = learnt.positive.sum()
            centerness = centerness_targets(Distances().encode(own, boxes))
            weights = torch.where(take(learnt.positive, rows), centerness, 0)
        else:
            cls_total = quality_focal_loss(predictions.logits, learnt.labels, learnt.metric, learnt.ignored)
            cls_sum, weights = learnt.metric.sum(), take(learnt.metric, rows)
        predicted = take(predictions.box, rows)
        box_total = box_loss(edges(predicted), edges(self.coder.encode(own, boxes)), weights, "giou")
        return {
            "loss_cls": LossTerm(cls_total, cls_sum),
            "loss_bbox": LossTerm(box_total, weights.sum(), weight=2.0),
        }


def geometric_mean(first: Tensor, second: Tensor) -> Tensor:
    """Logits of sqrt(sigmoid(first) * sigmoid(second)), of broadcasting shapes (arXiv 2108.07755, eq. 5)."""
    # Below 0, where p would be 1 and its logit infinite.
    log_p = ((F.logsigmoid(first) + F.logsigmoid(second)) / 2).clamp(max=-torch.finfo(first.dtype).tiny)
    return log_p - (-torch.expm1(log_p)).log()


def resample_sides(boxes: Tensor, offsets: Tensor) -> Tensor:
    """Each side of a cell's box read bilinearly at an offset of its own, 0 outside the map (arXiv 2108.07755, eq. 6).

    boxes (N, 4, H, W) in strides; offsets (N, 8, H, W) in cells: y, x of each side. A box that comes out inverted stays
    as it was. Returns (N, 4, H, W).
    """
    moved = deform_conv2d(boxes, offsets, boxes.new_ones(4, 1, 1, 1))
    inverted = (moved[:, :1] > moved[:, 2:3]) | (moved[:, 1:2] > moved[:, 3:])
    return torch.where(inverted, boxes, moved)
