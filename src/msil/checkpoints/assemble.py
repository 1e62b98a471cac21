"""From settings to a detector."""

from __future__ import annotations

import dataclasses

from msil.config import ModelConfig
from msil.detection import Detector, build_detector


def detector_from_config(model: ModelConfig, num_classes: int, min_size: int, max_size: int) -> Detector:
    """The Detector that `model` describes, resizing images to min_size and max_size in predict.

    model.weights is not read here: see msil.checkpoints.load.
    """
    backbone, head, msil = model.backbone, model.head, model.msil
    return build_detector(
        str(head.name),
        str(backbone.name),
        num_classes,
        msil={**dataclasses.asdict(msil), "apply": str(msil.apply)},
        backbone_weights=backbone.weights,
        frozen_stages=backbone.frozen_stages,
        norm=None if backbone.norm is None else str(backbone.norm),
        style=str(backbone.style),
        channels=model.channels,
        num_convs=head.num_convs,
        norm_groups=head.norm_groups,
        conv_bias=head.conv_bias,
        center_sampling=head.center_sampling,
        center_sample_radius=head.center_sample_radius,
        centerness_on_reg=head.centerness_on_reg,
        norm_on_bbox=head.norm_on_bbox,
        loss_bbox=None if head.loss_bbox is None else str(head.loss_bbox),
        point_offset=head.point_offset,
        init=None if head.init is None else str(head.init),
        min_size=min_size,
        max_size=max_size,
        image_mean=model.image_mean,
        image_std=model.image_std,
        channel_order=str(model.channel_order),
        score_thresh=0.05 if model.score_thresh is None else model.score_thresh,
        nms_thresh=0.6 if model.nms_thresh is None else model.nms_thresh,
        topk_candidates=1000 if model.topk_candidates is None else model.topk_candidates,
        detections_per_img=100 if model.detections_per_img is None else model.detections_per_img,
        test_scales=model.test_scales,
        test_flip=bool(model.test_flip),
    )
