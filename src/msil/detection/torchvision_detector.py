"""torchvision's own detectors behind the part of Detector's interface that training and prediction use."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights, WeightsEnum, detection, get_model, get_model_builder, list_models

from msil.attach import attach_msil
from msil.detection.detector import MOST_GRAPHS
from msil.detection.structures import Detections, Target
from msil.detection.weights import differences, load_state_dict_file
from msil.errors import ConfigError, WeightsError

NAMES = [name for name in list_models(module=detection) if not name.startswith(("maskrcnn", "keypointrcnn"))]


def _of_boxes(name: str) -> property:
    """torchvision's attribute of the same name, in Faster R-CNN that of its second stage."""
    return property(
        lambda self: getattr(getattr(self.model, "roi_heads", self.model), name),
        lambda self, value: setattr(getattr(self.model, "roi_heads", self.model), name, value),
    )


class TorchvisionDetector(nn.Module):
    """A box detector of torchvision.models.detection, its state dict under `model.`.

    Images are lists of tensors (3, H, W), RGB, uint8 or float in 0..1, of any sizes; labels are in [0, num_classes),
    where torchvision's begin at 1. `loss` takes images as they are, `predict` resizes them by min_size and max_size;
    SSD and SSDlite resize to their 300 x 300 or 320 x 320 in both, whatever min_size and max_size are.

    name: one of NAMES. weights: file with a state dict of this class (or a checkpoint of a run).
    backbone_weights: "imagenet" or None. As in torchvision, "imagenet" also freezes the first layers of most
        backbones, and the norms except in v2 and SSD nets, and gives SSDlite a wider backbone, with other shapes.
    msil: keyword arguments of attach_msil; None, or apply="none": the plain net.
    min_size ... detections_per_img: None, torchvision's default for this net.

    Raises ConfigError for another name, or MSIL in a net of one tower; WeightsError for missing or unfit weights.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        *,
        weights: str | None = None,
        backbone_weights: str | None = None,
        msil: Mapping[str, Any] | None = None,
        min_size: int | None = None,
        max_size: int | None = None,
        score_thresh: float | None = None,
        nms_thresh: float | None = None,
        detections_per_img: int | None = None,
    ) -> None:
        super().__init__()
        block = None if msil is None or msil.get("apply") == "none" else msil
        _check(name, backbone_weights, one_tower_will_do=block is None)
        sizes = {"min_size": min_size, "max_size": max_size, "_skip_resize": True}  # skipped in training only
        given = {} if name.startswith("ssd") else {key: value for key, value in sizes.items() if value is not None}
        pretrained = None if backbone_weights is None else _imagenet(name)
        self.model: Any = get_model(name, weights_backbone=pretrained, num_classes=num_classes + 1, **given)
        found = {"score_thresh": score_thresh, "nms_thresh": nms_thresh, "detections_per_img": detections_per_img}
        for key, value in found.items():
            setattr(self, key, getattr(self, key) if value is None else value)
        if block is not None:
            attach_msil(self.model, **block)
        if weights is not None:
            state = load_state_dict_file(weights)
            if wrong := differences(self.state_dict(), state):
                raise WeightsError(f"{weights} does not fit {name}: it {wrong}; build the detector that it is of.")
            self.load_state_dict(state)

    min_size = property(lambda self: self.model.transform.min_size[-1])
    max_size = property(lambda self: self.model.transform.max_size)
    score_thresh, nms_thresh = _of_boxes("score_thresh"), _of_boxes("nms_thresh")
    detections_per_img = _of_boxes("detections_per_img")

    def lay_out(self, *, channels_last: bool) -> None:
        """As Detector.lay_out."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.to(memory_format=layout)  # pyright: ignore[reportCallIssue]

    def compile_parts(self, *, frozen: bool = False) -> None:
        """As Detector.compile_parts, of the backbone and FPN alone: shapes in the rest depend on the data."""
        import torch._dynamo.config as dynamo  # late: it takes a second
        import torch._inductor.config as inductor

        dynamo.recompile_limit = max(dynamo.recompile_limit, MOST_GRAPHS)
        inductor.freezing = inductor.freezing or frozen
        backbone = self.model.backbone
        backbone.forward = partial(torch.compile(type(backbone).forward), backbone)  # so that a copy gets its own

    def net(self, batch: Tensor) -> dict[str, Tensor]:
        """A normalised batch (N, 3, H, W) -> raw outputs of all layers with weights, to count FLOPs.

        SSD and SSDlite resize the batch first. Faster R-CNN's second stage gets regions of zeros, as many as it has
        proposals at most (in eval mode 1000, or 150, an image): its outputs are no predictions.
        """
        model = self.model
        if model.transform.fixed_size is not None:
            batch = F.interpolate(batch, model.transform.fixed_size)
        features = list(model.backbone(batch).values())
        if not hasattr(model, "roi_heads"):
            return model.head(features)
        model.rpn.head(features)
        heads, count = model.roi_heads, len(batch) * model.rpn.post_nms_top_n()
        regions = batch.new_zeros(count, features[0].shape[1], *heads.box_roi_pool.output_size)
        logits, deltas = heads.box_predictor(heads.box_head(regions))
        return {"cls_logits": logits, "bbox_regression": deltas}

    def loss(self, images: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
        """In train mode: N images, N targets in the images' pixels -> torchvision's loss terms, scalars.

        torchvision raises AssertionError for a box without area, and ValueError for one image alone in SSDlite, where
        the norm of a 1 x 1 map has one value a channel.
        """
        return self.model(_floats(images), [{"boxes": t.boxes, "labels": t.labels + 1} for t in targets])

    @torch.no_grad()
    def predict(self, images: list[Tensor]) -> list[Detections]:
        """N images (3, H, W) -> N Detections in their pixels, by descending score; the mode stays as it was.

        As in torchvision, images go through the net as one batch, padded to the largest, which moves what is found
        near the padding. The background, which torchvision's FCOS and RetinaNet can find as a class, is left out.
        """
        if not images:
            return []
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            found = self.model(_floats(images))
        finally:
            for module, training in modes:
                module.training = training
        real = [one["labels"] > 0 for one in found]
        return [
            Detections(one["boxes"][keep].float(), one["scores"][keep].float(), one["labels"][keep] - 1)
            for one, keep in zip(found, real, strict=True)
        ]


def _floats(images: list[Tensor]) -> list[Tensor]:
    return [image if image.is_floating_point() else image / 255 for image in images]


def _check(name: str, backbone_weights: str | None, *, one_tower_will_do: bool) -> None:
    if name not in NAMES:
        why = "finds masks or keypoints" if name in list_models(module=detection) else "is no detector of torchvision"
        near = difflib.get_close_matches(name, NAMES, cutoff=0.7) or [known for known in NAMES if name in known]
        raise ConfigError(f"model.detector={name} {why}: choose one of {', '.join(near or NAMES)}.")
    if backbone_weights not in (None, "imagenet"):
        raise ConfigError(f"model.backbone.weights is imagenet or null for {name}, not {backbone_weights}.")
    if not one_tower_will_do and not name.startswith(("fcos", "retinanet")):
        raise ConfigError(
            f"model.detector={name} has one tower for class and box, where MSIL joins two: set model.msil.apply=none, "
            "or choose fcos_resnet50_fpn, retinanet_resnet50_fpn or retinanet_resnet50_fpn_v2."
        )


def _imagenet(name: str) -> WeightsEnum:
    """What torchvision trained this detector from, by then in the cache and known to hold tensors alone."""
    default = inspect.signature(get_model_builder(name)).parameters["weights_backbone"].default
    weights = default or ResNet50_Weights.IMAGENET1K_V1  # the v2 nets have no default
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    try:
        if not cached.is_file():
            weights.get_state_dict(check_hash=True, weights_only=True)
    except (OSError, RuntimeError, HTTPException) as error:  # no network, a full disk, a wrong hash
        raise WeightsError(
            f"the ImageNet weights of {name} cannot be had from {weights.url} ({error}): put that file into "
            f"{cached.parent}, or set model.backbone.weights=null to train from scratch."
        ) from error
    load_state_dict_file(cached)  # torchvision itself would run code that a file holds
    return weights
