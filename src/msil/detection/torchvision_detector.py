"""torchvision's own detectors behind the part of Detector's interface that training and prediction use."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights, detection, get_model, get_model_builder, list_models

from msil.attach import attach_msil
from msil.detection.backbone import eval_mode
from msil.detection.detector import Detector, allow_graphs
from msil.detection.heads import DenseHead
from msil.detection.structures import Detections, Target
from msil.detection.weights import torchvision_state_dict
from msil.errors import ConfigError

NAMES = [name for name in list_models(module=detection) if not name.startswith(("maskrcnn", "keypointrcnn"))]


class TorchvisionDetector(nn.Module):
    """A box detector of torchvision.models.detection, its state dict under `model.`; labels are in [0, num_classes).

    name: one of NAMES. backbone_weights: "imagenet", which also freezes what torchvision freezes then, or None.
    msil: keyword arguments of attach_msil; None: the plain net. min_size, max_size: of the images in `predict`, pixels;
        SSD's are 300 and SSDlite's 320, in training too. limits: score_thresh, nms_thresh, detections_per_img.

    Raises ConfigError for another name, or MSIL in a net of one tower; WeightsError for weights that are missing.
    """

    recipe = DenseHead.recipe
    lay_out, set_epoch = Detector.lay_out, DenseHead.set_epoch

    def __init__(
        self,
        name: str,
        num_classes: int,
        *,
        backbone_weights: str | None = None,
        msil: Mapping[str, Any] | None = None,
        min_size: int | None = None,
        max_size: int | None = None,
        limits: Mapping[str, float | None] | None = None,
    ) -> None:
        super().__init__()
        check_name(name, with_msil=msil is not None)
        sizes = {"min_size": min_size, "max_size": max_size, "_skip_resize": True}  # skipped in training only
        given = {} if name.startswith("ssd") else {key: value for key, value in sizes.items() if value is not None}
        weights = None
        if backbone_weights is not None:
            weights = inspect.signature(get_model_builder(name)).parameters["weights_backbone"].default
            weights = weights or ResNet50_Weights.IMAGENET1K_V1  # the v2 nets have no default
            torchvision_state_dict(weights, name, "model.detector_weights=null to train from scratch")
        self.model: Any = get_model(name, weights_backbone=weights, num_classes=num_classes + 1, **given)
        self.min_size, self.max_size = min_size, max_size
        vars(self._boxes).update({key: value for key, value in (limits or {}).items() if value is not None})
        if msil is not None:
            attach_msil(self.model, **msil)

    @property
    def _boxes(self) -> Any:
        return getattr(self.model, "roi_heads", self.model)  # the former is Faster R-CNN's second stage

    @property
    def backbone(self) -> nn.Module:
        """The net without its FPN."""
        return getattr(self.model.backbone, "body", self.model.backbone)

    score_thresh = property(
        lambda self: self._boxes.score_thresh, lambda self, value: setattr(self._boxes, "score_thresh", value)
    )

    def compile_parts(self, mode: str | None = "default", *, frozen: bool = False) -> None:
        """As Detector.compile_parts, of the backbone and FPN alone: shapes in the rest depend on the data."""
        if mode is not None:
            allow_graphs(frozen)
            backbone = self.model.backbone  # its class's method, so that a copy of this detector gets its own
            backbone.forward = partial(torch.compile(type(backbone).forward, mode=mode), backbone)

    def net(self, batch: Tensor) -> None:
        """All layers on a batch (N, 3, H, W), to count FLOPs; Faster R-CNN's second stage on the most proposals."""
        if self.model.transform.fixed_size is not None:
            batch = F.interpolate(batch, self.model.transform.fixed_size)
        features = list(self.model.backbone(batch).values())
        if not hasattr(self.model, "roi_heads"):
            return self.model.head(features)
        self.model.rpn.head(features)
        heads, count = self.model.roi_heads, len(batch) * self.model.rpn.post_nms_top_n()
        regions = batch.new_zeros(count, features[0].shape[1], *heads.box_roi_pool.output_size)
        return heads.box_predictor(heads.box_head(regions))

    def loss(self, images: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
        """In train mode: N images (3, H, W) and N targets in their pixels -> torchvision's loss terms, scalars."""
        moved = [target.to(image.device) for image, target in zip(images, targets, strict=True)]
        return self.model(_floats(images), [{"boxes": t.boxes, "labels": t.labels + 1} for t in moved])

    @torch.no_grad()
    def predict(self, images: list[Tensor]) -> list[Detections]:
        """N images (3, H, W) -> N Detections in their pixels; detected background (FCOS, RetinaNet) is dropped."""
        with eval_mode(self):
            found = self.model(_floats(images)) if images else []
        real = [{key: one[key][one["labels"] > 0] for key in one} for one in found]
        return [Detections(one["boxes"].float(), one["scores"].float(), one["labels"] - 1) for one in real]


def check_name(name: str, *, with_msil: bool) -> None:
    """Raises ConfigError for a name that is not in NAMES, or with MSIL for a net of one tower."""
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES) or NAMES
        raise ConfigError(f"model.detector={name} is not a box detector of torchvision; try {', '.join(near)}.")
    if with_msil and not name.startswith(("fcos_", "retinanet_")):
        two = ", ".join(one for one in NAMES if one.startswith(("fcos_", "retinanet_")))
        raise ConfigError(f"model.detector={name} has no two towers: set model.msil.apply=none, or take one of {two}.")


def _floats(images: list[Tensor]) -> list[Tensor]:
    return [image if image.is_floating_point() else image / 255 for image in images]


AnyDetector = Detector | TorchvisionDetector
