"""The dense head: towers, the MSIL seam, predictors, and three replaceable parts - priors, assigner, box coder.

N images, P priors over L levels, K classes, C channels, D channels of the box coder, G padded boxes an image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Signature, signature
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from msil.detection.assign import Assigner, GroundTruth, Match, ground_truth
from msil.detection.assign.base import IGNORED
from msil.detection.coders import BoxCoder
from msil.detection.heads.layers import ConvNormAct, init_he
from msil.detection.losses import EPSILON, mean_across_ranks
from msil.detection.postprocess import detections_from_candidates, select_candidates
from msil.detection.priors import PriorGenerator, Priors
from msil.detection.structures import Detections, Level, Predictions, Target
from msil.interaction import MSIL, Deeper

HEADS: dict[str, type[DenseHead]] = {}


def register(name: str) -> Callable[[type[DenseHead]], type[DenseHead]]:
    """Class decorator: build_detector and `model/head` find the head by `name`, its options by `Options`."""

    def add(head: type[DenseHead]) -> type[DenseHead]:
        HEADS[name] = head
        return head

    return add


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """What every head has.

    num_convs: convolutions a tower. norm_groups: of their GroupNorms; None: no norm. strides: of the levels, pixels.
    fast_start: for short trainings, in the place of the references' N(0, 0.01): see start_fast of the head.
    extra_convs: what P6 is made of: "on_output", P5, or "on_input", C5. relu_before_extra_convs: P7 is made of
    ReLU(P6), else of P6 (both as in MMDetection).

    Raises ValueError for a value outside its limits.
    """

    num_convs: int = 4
    norm_groups: int | None = 32
    fast_start: bool = False
    strides: tuple[int, ...] = (8, 16, 32, 64, 128)
    extra_convs: str = "on_output"
    relu_before_extra_convs: bool = True

    def __post_init__(self) -> None:
        self.check("num_convs", self.num_convs >= 1, "at least 1")
        self.check("norm_groups", self.norm_groups is None or self.norm_groups >= 1, "at least 1, or null for no norm")
        self.check("extra_convs", self.extra_convs in ("on_output", "on_input"), "on_output or on_input")

    def check(self, name: str, holds: bool, wanted: str) -> None:
        """Raises ValueError if a field does not hold."""
        if not holds:
            raise ValueError(f"{name}={getattr(self, name)} must be {wanted}.")


class LossTerm(NamedTuple):
    """loss = weight * total / normalizer, the latter averaged over all ranks.

    total: sum over this rank's images, scalar. normalizer: this rank's share of what all ranks' totals are divided by,
    scalar. floor: the least that their sum over all ranks counts as.
    """

    total: Tensor
    normalizer: Tensor
    weight: float = 1.0
    floor: float = 1.0


class Targets(NamedTuple):
    """What each prior learns.

    labels (N, P) int64, K for background. boxes (N, P, 4) in pixels, any box's for background. positive, ignored
    (N, P) bool. metric (N, P) of the assigner, or None. most: no image has more positives, or None.
    """

    labels: Tensor
    boxes: Tensor
    positive: Tensor
    ignored: Tensor
    metric: Tensor | None
    most: int | None

    def rows(self) -> Tensor:
        """The priors that box losses need: all positives and some others, (N, min(most, P)) int64."""
        count = self.positive.shape[1]
        return self.positive.int().topk(min(self.most or count, count), dim=1, sorted=False).indices


class DenseHead(nn.Module, ABC):
    """Pyramid levels -> Predictions -> losses or detections. A subclass adds `build`, `predict` and `terms`.

    num_classes: K. channels: C of every pyramid level and of the towers.
    msil: an nn.Module from (cls_feat, reg_feat) to the same two shapes, a dict of MSIL's keyword arguments, or None.
    options: the fields of the head's Options.
    """

    Options: ClassVar[type[HeadOptions]] = HeadOptions
    title: ClassVar[str]  # in tables and charts
    # Of the published recipe, under the names of `schedule`: where a schedule leaves them open.
    recipe: ClassVar[Mapping[str, float]] = MappingProxyType(
        {"warmup_factor": 0.001, "bias_lr_factor": 1.0, "bias_weight_decay": 1e-4}
    )
    clip_to_image: ClassVar[bool] = True  # detections
    deformable: ClassVar[bool] = False  # uses torchvision's deformable convolution
    msil: nn.Module | None
    cls_tower: nn.Module
    reg_tower: nn.Module
    priors: PriorGenerator
    assigner: Assigner
    coder: BoxCoder

    def __init_subclass__(cls) -> None:
        # What an editor, help() and inspect.signature show: the options stand in one place, the dataclass.
        first = ("self", "num_classes", "channels", "num_convs", "norm_groups", "msil")
        own = signature(DenseHead.__init__).parameters
        found = {**own, **signature(cls.Options).parameters}
        names = [*first[1:], *(name for name in found if name not in (*first, "options"))]
        cls.__signature__ = Signature([found[name] for name in names])  # pyright: ignore[reportAttributeAccessIssue]

    def __init__(
        self,
        num_classes: int,
        channels: int = 256,
        *,
        msil: nn.Module | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.channels = channels
        self.options: Any = self.Options(**options)
        self.strides = tuple(self.options.strides)
        groups = self.options.norm_groups
        if groups is not None and channels % groups:
            raise ValueError(f"channels ({channels}) must be a multiple of norm_groups ({groups}).")
        self.build()
        if self.options.fast_start:
            self.start_fast()
        # Last, so that with one seed the plain head and every MSIL variant start from the same weights.
        self.set_msil(msil)

    @abstractmethod
    def build(self) -> None:
        """Layers with their initial weights, and priors, assigner and coder, from `self.options`."""

    def start_fast(self) -> None:
        """The towers' weights by `init_he`; the block's follow in `set_msil`."""
        init_he(self)

    def set_msil(self, msil: nn.Module | Mapping[str, Any] | None) -> None:
        """Puts a block at the seam, as the constructor's argument; MSIL with apply="none" is none. With fast_start MSIL
        and Deeper, not a user's own block, start by `init_he`, and MSIL's gates open.

        Raises TypeError for what is no block, ValueError for MSIL of other channels or switches outside their values.
        """
        if isinstance(msil, Mapping):
            msil = MSIL(self.channels, **msil)
        elif msil is not None and not isinstance(msil, nn.Module):
            raise TypeError(f"msil must be a module, a dict of MSIL's keyword arguments or None, not {msil!r}.")
        if isinstance(msil, MSIL) and msil.channels != self.channels:
            raise ValueError(f"the MSIL block has {msil.channels} channels, the head {self.channels}.")
        if isinstance(msil, MSIL) and not (msil.to_cls or msil.to_reg):
            msil = None
        if self.options.fast_start and isinstance(msil, MSIL | Deeper):
            init_he(msil)
            if isinstance(msil, MSIL):
                msil.open_gates()
        self.msil = msil

    @abstractmethod
    def predict(self, level: int, cls_feat: Tensor, reg_feat: Tensor, *shared: Tensor) -> Level:
        """Both features (N, C, H, W) of one level behind the MSIL seam -> its raw outputs."""

    @abstractmethod
    def terms(self, predictions: Predictions, priors: Priors, truth: GroundTruth) -> dict[str, LossTerm]:
        """The loss terms by MMDetection's names."""

    def make_towers(self, conv_bias: bool) -> None:
        """cls_tower and reg_tower, num_convs layers each."""
        for name in ("cls_tower", "reg_tower"):
            layers = (
                ConvNormAct(self.channels, self.options.norm_groups, conv_bias) for _ in range(self.options.num_convs)
            )
            setattr(self, name, nn.Sequential(*layers))

    def features(self, level: Tensor) -> tuple[Tensor, ...]:
        """A pyramid level (N, C, H, W) -> cls_feat and reg_feat of the same shape, before the seam; anything behind
        them is handed on to `predict`."""
        return self.cls_tower(level), self.reg_tower(level)

    def interact(self, cls_feat: Tensor, reg_feat: Tensor) -> tuple[Tensor, Tensor]:
        """The MSIL seam."""
        return (cls_feat, reg_feat) if self.msil is None else self.msil(cls_feat, reg_feat)

    def towers(self, pyramid: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Pyramid levels (N, C, H, W) -> cls_feats and reg_feats, the same shapes, behind the MSIL seam."""
        pairs = [self.interact(*self.features(level)[:2]) for level in pyramid]
        return [cls_feat for cls_feat, _ in pairs], [reg_feat for _, reg_feat in pairs]

    def forward(self, pyramid: list[Tensor]) -> Predictions:
        """L pyramid levels (N, C, H, W) -> Predictions."""
        if len(pyramid) != len(self.strides):
            raise ValueError(f"the head has {len(self.strides)} levels, the pyramid {len(pyramid)}.")
        levels = []
        for number, level in enumerate(pyramid):
            cls_feat, reg_feat, *shared = self.features(level)
            levels.append(self.predict(number, *self.interact(cls_feat, reg_feat), *shared))
        logits, box, quality, first_box = (
            None if maps[0] is None else flatten_levels(maps, self.priors.per_cell)
            for maps in zip(*levels, strict=True)
        )
        assert logits is not None and box is not None
        sizes = tuple((level.shape[-2], level.shape[-1]) for level in pyramid)
        return Predictions(logits, box, sizes, None if quality is None else quality.squeeze(-1), first_box)

    def priors_of(self, predictions: Predictions) -> Priors:
        return self.priors(predictions.map_sizes, predictions.logits.device)

    def targets(self, predictions: Predictions, targets: list[Target], image_sizes: list[tuple[int, int]]) -> Targets:
        """What each prior learns of N targets in pixels of the padded input."""
        truth = ground_truth(targets, image_sizes, predictions.logits.device)
        return self.assign(predictions, self.priors_of(predictions), truth)

    def match(self, predictions: Predictions, priors: Priors, truth: GroundTruth) -> Match:
        return self.assigner(priors, truth)

    def assign(self, predictions: Predictions, priors: Priors, truth: GroundTruth) -> Targets:
        match = self.match(predictions, priors, truth)
        index = match.index.clamp(min=0)
        background = match.index < 0
        labels = truth.labels.gather(1, index).masked_fill_(background, self.num_classes)
        boxes = take(truth.boxes, index)
        return Targets(labels, boxes, ~background, match.index == IGNORED, match.metric, match.most)

    def loss(
        self, predictions: Predictions, targets: list[Target], image_sizes: list[tuple[int, int]]
    ) -> dict[str, Tensor]:
        """The loss terms, scalars, by MMDetection's names.

        N targets in pixels of the padded input; image_sizes: N pairs (height, width) before padding. Normalizers are
        averaged over all ranks first, so that the mean of the ranks' losses is the loss of all their images.
        Raises ValueError for other counts.
        """
        if not len(targets) == len(image_sizes) == len(predictions.logits):
            raise ValueError(
                f"{len(predictions.logits)} images need as many targets and sizes, not {len(targets)} and "
                f"{len(image_sizes)}."
            )
        return self.padded_loss(predictions, ground_truth(targets, image_sizes, predictions.logits.device))

    def padded_loss(self, predictions: Predictions, truth: GroundTruth) -> dict[str, Tensor]:
        """As `loss`: tensors in, tensors out, so that it can be compiled or captured."""
        terms = self.terms(predictions, self.priors_of(predictions), truth)
        normalizers = mean_across_ranks(
            torch.stack([term.normalizer.float() for term in terms.values()]), [term.floor for term in terms.values()]
        )
        losses = {}
        for (name, term), normalizer in zip(terms.items(), (normalizers + EPSILON).unbind(), strict=True):
            loss = term.total / normalizer
            losses[name] = loss if term.weight == 1 else loss * term.weight
        return losses

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

        score_thresh: of the class probability alone; the final score is that times the quality, where there is one.
        topk_candidates: (prior, class) pairs a level that enter the NMS.
        """
        per_cell = self.priors.per_cell
        level_sizes = [height * width * per_cell for height, width in predictions.map_sizes]
        scores, index, labels = select_candidates(predictions.logits, level_sizes, score_thresh, topk_candidates)
        boxes = self.coder.decode(self.priors_of(predictions).at(index), take(predictions.box, index))
        if predictions.quality is not None:
            scores = scores * take(predictions.quality, index).float().sigmoid()
        return detections_from_candidates(
            boxes,
            scores,
            labels,
            image_sizes,
            nms_thresh=nms_thresh,
            detections_per_img=detections_per_img,
            clip=self.clip_to_image,
        )

    def set_epoch(self, epoch: int) -> None:
        """For heads whose assignment changes during training; epoch counts from 0."""


def take(values: Tensor, rows: Tensor) -> Tensor:
    """Of values (N, P, D) or (N, P) those of the priors rows (N, C) -> (N, C, D) or (N, C)."""
    if values.dim() == 2:
        return values.gather(1, rows)
    return values.gather(1, rows[..., None].expand(-1, -1, values.shape[-1]))


def flatten_levels(maps: Sequence[Tensor], per_cell: int = 1) -> Tensor:
    """Maps (N, A C, H, W) of all levels -> (N, P, C), level by level, row-major, a cell's A priors side by side."""
    flat = torch.cat([level.permute(0, 2, 3, 1).flatten(1, 2) for level in maps], dim=1)
    return flat if per_cell == 1 else flat.unflatten(-1, (per_cell, -1)).flatten(1, 2)
