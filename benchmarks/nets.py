"""torchvision's FCOS, by default with ResNet-50, and ours with the same weights."""

from __future__ import annotations

from typing import Any

import torch
from torchvision.models import get_model
from torchvision.models.detection import FCOS
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from msil.detection import Detector, FCOSHead, ResNetOptions, build_detector
from msil.detection.renaming import from_torchvision


def torchvision_fcos(
    size: tuple[int, int], classes: int = 80, trainable_layers: int = 3, backbone: str = "resnet50"
) -> FCOS:
    """What fcos_resnet50_fpn gives with pretrained weights, but for these: without weights it would take a BatchNorm
    that is trained. size: (height, width) that images come in, so that its resizing leaves them alone."""
    torch.manual_seed(0)
    resnet: Any = get_model(backbone, norm_layer=FrozenBatchNorm2d)
    body = _resnet_fpn_extractor(
        resnet, trainable_layers, returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )  # fmt: skip
    return FCOS(body, classes, min_size=min(size), max_size=max(size))


def detector_like(net: FCOS, *, channels_last: bool = True, backbone: str = "resnet50") -> Detector:
    """Our plain FCOS with that net's weights."""
    head: Any = net.head
    detector = build_detector(
        FCOSHead.Options(point_offset=0.0),
        ResNetOptions(backbone, norm="frozen_bn", frozen_stages=1),
        head.classification_head.num_classes,
        msil=None,
    )
    detector.load_state_dict(from_torchvision(net.state_dict()))
    detector.lay_out(channels_last=channels_last)
    return detector
