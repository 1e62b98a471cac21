"""Settings that a checkpoint does not tell: the published recipes of MMDetection and torchvision."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from msil.config import Apply, ChannelOrder, ModelConfig, MSILConfig
from msil.detection.preprocess import IMAGENET_MEAN, IMAGENET_STD

DETECTRON_MEAN = (102.9801, 115.9465, 122.7717)  # BGR, of the first Detectron's ResNets
MIN_SIZE, MAX_SIZE = 800, 1333


@dataclass(frozen=True)
class Form:
    """FCOSHead's switches."""

    conv_bias: bool
    center_sampling: bool
    center_sample_radius: float
    centerness_on_reg: bool
    norm_on_bbox: bool
    loss_bbox: str
    point_offset: float = 0.5


# The two published forms of FCOS, MMDetection's 36.6 and 38.7 AP, and what they are tested with.
FORMS = {
    "plain": Form(False, False, 1.5, False, False, "iou"),
    "improved": Form(True, True, 1.5, True, True, "giou"),
}
NMS = {"plain": 0.5, "improved": 0.6}


@dataclass(frozen=True)
class Images:
    """What the net takes. mean, std: of its three input channels in their order, of 0..255."""

    channel_order: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    min_size: int = MIN_SIZE
    max_size: int = MAX_SIZE


@dataclass(frozen=True)
class Backbone:
    """As ResNet's arguments."""

    name: str
    style: str
    norm: str
    frozen_stages: int


@dataclass(frozen=True)
class Head:
    """name: fcos or vfnet. form: FCOS alone. num_classes: None where only the weights tell."""

    name: str
    num_convs: int
    channels: int
    norm_groups: int
    form: Form | None
    num_classes: int | None = None


@dataclass(frozen=True)
class Selection:
    """From scores to detections, as in FCOSHead.detect."""

    score_thresh: float = 0.05
    nms_thresh: float = 0.6
    topk_candidates: int = 1000
    detections_per_img: int = 100


@dataclass(frozen=True)
class Settings:
    backbone: Backbone
    head: Head
    images: Images
    selection: Selection


def images_of(style: str, form: str | None) -> Images:
    """MMDetection's images for a published net: a caffe-style ResNet comes from Detectron and takes BGR."""
    if style == "pytorch":
        return Images("rgb", IMAGENET_MEAN, IMAGENET_STD)
    mean = DETECTRON_MEAN if form == "plain" else (IMAGENET_MEAN[2], IMAGENET_MEAN[1], IMAGENET_MEAN[0])
    return Images("bgr", mean, (1.0, 1.0, 1.0))


def norm_of(style: str, head: str) -> str:
    """MMDetection trains the norms' scale and shift, but for the caffe-style FCOS."""
    return "frozen_bn" if head == "fcos" and style == "caffe" else "eval_bn"


def model_config(settings: Settings) -> ModelConfig:
    """The settings of a whole detector without MSIL (whose other switches are as in the paper)."""
    backbone, head, images, selection = settings.backbone, settings.head, settings.images, settings.selection
    return ModelConfig(
        backbone=dataclasses.asdict(backbone) | {"weights": None},
        head={
            "name": head.name,
            "num_convs": head.num_convs,
            "norm_groups": head.norm_groups,
            **({} if head.form is None else dataclasses.asdict(head.form)),
        },
        msil=MSILConfig(
            align=True, separate=True, apply=Apply.none, kernel_size=3, reduction=16, block=None, options=None
        ),
        detector=None,
        detector_weights=None,
        weights=None,
        channels=head.channels,
        image_mean=list(images.mean),
        image_std=list(images.std),
        channel_order=ChannelOrder(images.channel_order),
        score_thresh=selection.score_thresh,
        nms_thresh=selection.nms_thresh,
        topk_candidates=selection.topk_candidates,
        detections_per_img=selection.detections_per_img,
        test_scales=None,
        test_flip=None,
    )
