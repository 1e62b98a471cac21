"""Made-up predictions and ground truth of the goals' sizes; torchvision's FCOS and ours with its weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchvision.models import get_model
from torchvision.models.detection import FCOS
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from msil.detection import Detector, FCOSHead, ResNetOptions, Target, build_detector
from msil.detection.weights import from_torchvision

STRIDES = (8, 16, 32, 64, 128)
IMAGE = (800, 1344)  # height, width: 22,400 points


def map_sizes(size: tuple[int, int] = IMAGE) -> tuple[tuple[int, int], ...]:
    """(height, width) of P3..P7."""
    return tuple((math.ceil(size[0] / stride), math.ceil(size[1] / stride)) for stride in STRIDES)


def num_points(size: tuple[int, int] = IMAGE) -> int:
    return sum(height * width for height, width in map_sizes(size))


def ground_truth(
    images: int, boxes: int, classes: int = 80, size: tuple[int, int] = IMAGE, seed: int = 0
) -> list[Target]:
    """`boxes` boxes in each of `images` images, sides from 8 to 600 pixels, log-uniform, as COCO's roughly are."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    targets = []
    for image in range(images):
        sides = torch.exp(torch.empty(boxes, 2).uniform_(math.log(8), math.log(600), generator=generator))
        sides = torch.minimum(sides, torch.tensor([width - 1.0, height - 1.0]))
        corner = torch.rand(boxes, 2, generator=generator) * (torch.tensor([width, height]) - sides)
        labels = torch.randint(classes, (boxes,), generator=generator)
        targets.append(Target(torch.cat([corner, corner + sides], dim=1), labels, image, size))
    return targets


def raw_outputs(
    images: int, classes: int = 80, size: tuple[int, int] = IMAGE, seed: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (N, P, K), distances (N, P, 4) in strides, centre-ness logits (N, P), as of a net early in training."""
    generator = torch.Generator().manual_seed(seed)
    points = num_points(size)
    logits = torch.randn(images, points, classes, generator=generator) - 4
    distances = torch.rand(images, points, 4, generator=generator) * 8
    return logits, distances, torch.randn(images, points, generator=generator)


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
