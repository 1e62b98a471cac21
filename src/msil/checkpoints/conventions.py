"""Published detectors as a table: by what keys each is known, and what its tensors do not show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from msil.config import Apply, ChannelOrder, ModelConfig, MSILConfig
from msil.detection.preprocess import IMAGENET_MEAN, IMAGENET_STD

Triple = tuple[float, float, float]

CAFFE_MEAN = (IMAGENET_MEAN[2], IMAGENET_MEAN[1], IMAGENET_MEAN[0])  # BGR
DETECTRON_MEAN = (102.9801, 115.9465, 122.7717)  # BGR, of the first Detectron's ResNets
MIN_SIZE, MAX_SIZE = 800, 1333
NORM_EPS = 1e-5
SELECTION = {"score_thresh": 0.05, "nms_thresh": 0.6, "topk_candidates": 1000, "detections_per_img": 100}
SOURCES = {"mmdet": "MMDetection", "torchvision": "torchvision"}

# FCOS's two published forms, MMDetection's 36.6 and 38.7 AP.
FORMS = {
    "plain": {"conv_bias": False, "center_sampling": False, "center_sample_radius": 1.5, "centerness_on_reg": False,
              "norm_on_bbox": False, "loss_bbox": "iou"},
    "improved": {"conv_bias": True, "center_sampling": True, "center_sample_radius": 1.5, "centerness_on_reg": True,
                 "norm_on_bbox": True, "loss_bbox": "giou"},
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """A published detector.

    source: "mmdet" or "torchvision". name: what it is called there. keys: beginnings that only its keys have.
    head, options: ours; options that its tensors do not show and that are not our defaults. form: FCOS alone.
    norms: of the ResNet, by its style. norm_eps: of those norms. caffe_mean: of the images of the caffe style, BGR.
    selection: where it is not SELECTION. per_cell: anchors of a cell.
    """

    source: str
    name: str
    keys: tuple[str, ...]
    head: str
    options: Mapping[str, Any] = field(default_factory=dict)
    form: str | None = None
    norms: Mapping[str, str] = field(default_factory=lambda: {"pytorch": "eval_bn", "caffe": "eval_bn"})
    norm_eps: float = NORM_EPS
    caffe_mean: Triple = CAFFE_MEAN
    selection: dict[str, float] = field(default_factory=dict)
    per_cell: int = 1


_CAFFE_FROZEN = {"pytorch": "eval_bn", "caffe": "frozen_bn"}
_FROZEN, _TRAINED = {"pytorch": "frozen_bn"}, {"pytorch": "bn"}
_V1 = {"extra_convs": "on_output", "relu_before_extra_convs": True, "whole_anchors": True}
_V2 = {"extra_convs": "on_input", "relu_before_extra_convs": True, "whole_anchors": True}
_RETINANET = {"nms_thresh": 0.5, "detections_per_img": 300}  # torchvision's
_CLS = "head.classification_head.conv"

LAYOUTS = (
    Layout("mmdet", "FCOS", ("bbox_head.conv_", "bbox_head.fcos_"), "fcos", FORMS["plain"], "plain",
           norms=_CAFFE_FROZEN, caffe_mean=DETECTRON_MEAN, selection={"nms_thresh": 0.5}),
    Layout("mmdet", "FCOS", ("bbox_head.conv_", "bbox_head.fcos_"), "fcos", FORMS["improved"], "improved",
           norms=_CAFFE_FROZEN),
    Layout("mmdet", "VFNet", ("bbox_head.vfnet_",), "vfnet"),
    Layout("mmdet", "RetinaNet", ("bbox_head.retina_",), "retinanet", norms=_CAFFE_FROZEN,
           selection={"nms_thresh": 0.5}, per_cell=9),
    Layout("mmdet", "ATSS", ("bbox_head.atss_",), "atss"),
    Layout("mmdet", "GFL", ("bbox_head.gfl_",), "gfl"),
    Layout("mmdet", "TOOD", ("bbox_head.tood_",), "tood"),
    Layout("torchvision", "fcos_resnet50_fpn", ("head.regression_head.bbox_ctrness.",), "fcos",
           FORMS["improved"] | {"point_offset": 0.0}, "improved", norms=_FROZEN),
    # Key names of before torchvision 0.13, which its COCO_V1 weights date from; it runs those with an eps of 0.
    Layout("torchvision", "retinanet_resnet50_fpn", (f"{_CLS}.2.weight",), "retinanet", _V1, norms=_FROZEN, norm_eps=0,
           selection=_RETINANET, per_cell=9),
    Layout("torchvision", "retinanet_resnet50_fpn", (f"{_CLS}.0.0.bias",), "retinanet", _V1, norms=_FROZEN,
           selection=_RETINANET, per_cell=9),
    Layout("torchvision", "retinanet_resnet50_fpn_v2", (f"{_CLS}.0.1.",), "retinanet", _V2, norms=_TRAINED,
           selection=_RETINANET, per_cell=9),
)  # fmt: skip


@dataclass(frozen=True)
class Images:
    """What the net takes. mean, std: of its three input channels in their order, of 0..255."""

    channel_order: str
    mean: Triple
    std: Triple
    min_size: int = MIN_SIZE
    max_size: int = MAX_SIZE


@dataclass(frozen=True)
class Settings:
    """A whole detector. head, backbone: as model.head and model.backbone. selection: SELECTION's keys.
    channels: of the FPN and the head. num_classes: None where only the weights show it."""

    head: dict[str, Any]
    backbone: dict[str, Any]
    images: Images
    selection: dict[str, Any]
    channels: int
    num_classes: int | None = None


def published(layout: Layout, style: str, resnet: str, channels: int, shown: Mapping[str, Any]) -> Settings:
    """The settings of a published layout on a ResNet of that style. shown: head's options that the tensors show."""
    rgb, bgr = Images("rgb", IMAGENET_MEAN, IMAGENET_STD), Images("bgr", layout.caffe_mean, (1.0, 1.0, 1.0))
    return Settings(
        head={"name": layout.head, **layout.options, **shown},
        backbone={"name": resnet, "style": style, "norm": layout.norms[style], "frozen_stages": 1},
        images=bgr if style == "caffe" else rgb,  # a caffe-style ResNet comes from Detectron
        selection=SELECTION | layout.selection,
        channels=channels,
    )


def model_config(settings: Settings) -> ModelConfig:
    """The settings of a whole detector without MSIL (whose other switches are as in the paper)."""
    images = settings.images
    return ModelConfig(
        backbone=settings.backbone | {"weights": None},
        head=settings.head,
        msil=MSILConfig(
            align=True, separate=True, apply=Apply.none, kernel_size=3, reduction=16, block=None, options=None
        ),
        detector=None,
        detector_weights=None,
        weights=None,
        channels=settings.channels,
        image_mean=list(images.mean),
        image_std=list(images.std),
        channel_order=ChannelOrder(images.channel_order),
        test_scales=None,
        test_flip=None,
        **settings.selection,
    )
