"""Published detectors as a table: by what keys each is known, and what its tensors do not show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torchvision.models.detection import FCOS_ResNet50_FPN_Weights

from msil.checkpoints.assemble import head_options
from msil.data.readers.voc import VOC_CLASSES
from msil.detection.preprocess import IMAGENET_MEAN, IMAGENET_STD

_NAMES: list[str] = FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"]  # by category id, with gaps
COCO_CATEGORY_IDS = tuple(i for i, name in enumerate(_NAMES) if name not in ("__background__", "N/A"))
COCO_CLASSES = tuple(_NAMES[i] for i in COCO_CATEGORY_IDS)
CLASSES = {80: COCO_CLASSES, 20: VOC_CLASSES}  # of published detectors, by their number

MIN_SIZE, MAX_SIZE = 800, 1333
NORM_EPS = 1e-5
SOURCES = {"mmdet": "MMDetection", "torchvision": "torchvision"}
BGR_MEAN = IMAGENET_MEAN[::-1]
DETECTRON_MEAN = (102.9801, 115.9465, 122.7717)  # BGR, of the first Detectron's ResNets


@dataclass(frozen=True)
class Layout:
    """A published detector on a ResNet with an FPN.

    source: "mmdet" or "torchvision". name: what it is called there. keys: beginnings that only its keys have.
    head: of model/head. options: of that head; those that are not its defaults and do not show in tensors.
    norms: model.backbone.norm by the style of the ResNet. norm_eps: of those norms. caffe_mean: of the images, BGR, in
    the caffe style. thresholds: of ModelConfig, where they are not the usual ones. per_cell: anchors of a cell.
    """

    source: str
    name: str
    keys: tuple[str, ...]
    head: str
    options: Mapping[str, Any] = field(default_factory=dict)
    norms: Mapping[str, str] = field(default_factory=lambda: {"pytorch": "eval_bn", "caffe": "eval_bn"})
    norm_eps: float = NORM_EPS
    caffe_mean: tuple[float, ...] = BGR_MEAN
    thresholds: Mapping[str, Any] = field(default_factory=dict)
    per_cell: int = 1


_FCOS = ("bbox_head.conv_", "bbox_head.fcos_")
_PLAIN = {"name": "fcos", "conv_bias": False, "center_sampling": False, "centerness_on_reg": False,
          "norm_on_bbox": False, "loss_bbox": "iou"}  # fmt: skip
_CAFFE_FROZEN = {"pytorch": "eval_bn", "caffe": "frozen_bn"}
_FROZEN, _TRAINED = {"pytorch": "frozen_bn"}, {"pytorch": "bn"}
_NMS = {"nms_thresh": 0.5}
_V1 = {"extra_convs": "on_output", "relu_before_extra_convs": True, "whole_anchors": True}
_V2 = _V1 | {"extra_convs": "on_input"}
_MANY = {"nms_thresh": 0.5, "detections_per_img": 300}
_CLS = "head.classification_head.conv"

LAYOUTS = (
    Layout("mmdet", "FCOS", _FCOS, "fcos_plain", _PLAIN, _CAFFE_FROZEN, caffe_mean=DETECTRON_MEAN, thresholds=_NMS),
    Layout("mmdet", "FCOS", _FCOS, "fcos", norms=_CAFFE_FROZEN),
    Layout("mmdet", "VFNet", ("bbox_head.vfnet_",), "vfnet"),
    Layout("mmdet", "RetinaNet", ("bbox_head.retina_",), "retinanet", norms=_CAFFE_FROZEN, thresholds=_NMS, per_cell=9),
    Layout("mmdet", "ATSS", ("bbox_head.atss_",), "atss"),
    Layout("mmdet", "GFL", ("bbox_head.gfl_",), "gfl"),
    Layout("mmdet", "TOOD", ("bbox_head.tood_",), "tood"),
    Layout("torchvision", "fcos_resnet50_fpn", ("head.regression_head.bbox_ctrness.",), "fcos", {"point_offset": 0.0},
           _FROZEN),
    # Key names of before torchvision 0.13, which its COCO_V1 weights date from; it runs those with an eps of 0.
    Layout("torchvision", "retinanet_resnet50_fpn", (f"{_CLS}.2.weight",), "retinanet", _V1, _FROZEN, norm_eps=0,
           thresholds=_MANY, per_cell=9),
    Layout("torchvision", "retinanet_resnet50_fpn", (f"{_CLS}.0.0.bias",), "retinanet", _V1, _FROZEN, thresholds=_MANY,
           per_cell=9),
    Layout("torchvision", "retinanet_resnet50_fpn_v2", (f"{_CLS}.0.1.",), "retinanet", _V2, _TRAINED,
           thresholds=_MANY, per_cell=9),
)  # fmt: skip


def model_settings(layout: Layout, style: str, resnet: str, channels: int, shown: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a published detector, without MSIL. shown: options of the head that its tensors show."""
    caffe = style == "caffe"  # such a ResNet comes from Detectron
    head = {"name": layout.head, **layout.options, **shown}
    return {
        "backbone": {"name": resnet, "style": style, "norm": layout.norms[style], "frozen_stages": 1},
        "head": head | vars(head_options(head)),
        "msil": {"align": True, "separate": True, "apply": "none", "kernel_size": 3, "reduction": 16},
        "channels": channels,
        "image_mean": list(layout.caffe_mean if caffe else IMAGENET_MEAN),
        "image_std": [1.0, 1.0, 1.0] if caffe else list(IMAGENET_STD),
        "channel_order": "bgr" if caffe else "rgb",
        "score_thresh": 0.05,
        "nms_thresh": 0.6,
        "topk_candidates": 1000,
        "detections_per_img": 100,
        **layout.thresholds,
    }
