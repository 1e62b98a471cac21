"""A whole detector: images in, losses or detections out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from msil.detection.backbone import ResNet
from msil.detection.fpn import FPN
from msil.detection.heads.fcos import FCOSHead
from msil.detection.heads.vfnet import VFNetHead
from msil.detection.preprocess import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    batch_images,
    normalize,
    resize,
    resized_size,
)
from msil.detection.structures import Detections, Predictions, Target
from msil.detection.weights import differences, load_state_dict_file
from msil.errors import WeightsError

FULL_MSIL: Mapping[str, Any] = MappingProxyType({"align": True, "separate": True, "apply": "both"})


class Detector(nn.Module):
    """backbone -> FPN -> head, with pre- and post-processing.

    Images are lists of tensors (3, H, W), RGB, uint8 or float in 0..1, of any sizes; their channels are put into
    `channel_order` ("rgb" or "bgr"), normalised by image_mean and image_std (in that order, 0..255 units), and padded
    to the batch's largest size, rounded up to 32.
    min_size, max_size: if given, `predict` first resizes each image so that its short side is min_size and its
        long side at most max_size. None: images are taken as they are.
    score_thresh, nms_thresh, topk_candidates, detections_per_img: as in FCOSHead.detect.
    """

    def __init__(
        self,
        backbone: nn.Module,
        fpn: nn.Module,
        head: FCOSHead | VFNetHead,
        *,
        min_size: int | None = None,
        max_size: int | None = None,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        channel_order: str = "rgb",
        score_thresh: float = 0.05,
        nms_thresh: float = 0.6,
        topk_candidates: int = 1000,
        detections_per_img: int = 100,
    ) -> None:
        super().__init__()
        if (min_size is None) != (max_size is None):
            raise ValueError("min_size and max_size go together: give both or neither.")
        if channel_order not in ("rgb", "bgr"):
            raise ValueError(f"channel_order must be rgb or bgr, not {channel_order!r}.")
        if len(image_mean) != 3 or len(image_std) != 3 or min(image_std) <= 0:
            raise ValueError(
                f"image_mean and image_std must be three numbers, the latter above 0, not {image_mean} and {image_std}."
            )
        self.backbone = backbone
        self.fpn = fpn
        self.head = head
        self.min_size = min_size
        self.max_size = max_size
        self.score_thresh = score_thresh
        self.nms_thresh = nms_thresh
        self.topk_candidates = topk_candidates
        self.detections_per_img = detections_per_img
        self.channel_order = channel_order
        self.image_mean: Tensor
        self.image_std: Tensor
        self.register_buffer("image_mean", torch.tensor(image_mean), persistent=False)
        self.register_buffer("image_std", torch.tensor(image_std), persistent=False)

    def forward(self, images: list[Tensor]) -> Predictions:
        """N images (3, H, W) -> raw Predictions over the padded batch."""
        return self.head(self.pyramid(images))

    def pyramid(self, images: list[Tensor]) -> list[Tensor]:
        """N images (3, H, W) -> P3..P7, (N, C, H / stride, W / stride) of the padded batch."""
        if self.channel_order == "bgr":
            images = [image.flip(0) for image in images]
        batch = batch_images([normalize(image, self.image_mean, self.image_std) for image in images])
        return self.fpn(self.backbone(batch.contiguous(memory_format=torch.channels_last)))

    def loss(self, images: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
        """N images and their N targets in the images' pixels -> the head's loss terms, scalars."""
        return self.head.loss(self(images), targets, image_sizes(images))

    @torch.no_grad()
    def predict(self, images: list[Tensor]) -> list[Detections]:
        """N images (3, H, W) -> N Detections in the pixels of those images. Runs in eval mode and leaves the mode
        as it was."""
        if not images:
            return []
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            resized = [self.resized(image) for image in images]
            found = self.head.detect(
                self(resized),
                image_sizes(resized),
                score_thresh=self.score_thresh,
                nms_thresh=self.nms_thresh,
                topk_candidates=self.topk_candidates,
                detections_per_img=self.detections_per_img,
            )
        finally:
            for module, training in modes:
                module.training = training
        return [
            _rescale(detections, small, large)
            for detections, small, large in zip(found, image_sizes(resized), image_sizes(images), strict=True)
        ]

    def resized(self, image: Tensor) -> Tensor:
        """An image (3, H, W) as `predict` gives it to the net: resized by min_size and max_size, not yet normalised."""
        if self.min_size is None or self.max_size is None:
            return image
        return resize(image, resized_size(image.shape[-2], image.shape[-1], self.min_size, self.max_size))


def image_sizes(images: list[Tensor]) -> list[tuple[int, int]]:
    """(height, width) of each image (3, H, W)."""
    return [(image.shape[-2], image.shape[-1]) for image in images]


def _rescale(detections: Detections, size: tuple[int, int], original: tuple[int, int]) -> Detections:
    if size == original:
        return detections
    y, x = original[0] / size[0], original[1] / size[1]
    scaled = detections.boxes * detections.boxes.new_tensor([x, y, x, y])
    # Rounding can carry a side past the image by a few millionths of a pixel.
    boxes = torch.stack([scaled[:, i].clamp(max=original[1 - i % 2]) for i in range(4)], dim=1)
    return Detections(boxes, detections.scores, detections.labels)


def build_detector(
    head: str = "fcos",
    backbone: str = "resnet50",
    num_classes: int = 80,
    *,
    msil: Mapping[str, Any] | None = FULL_MSIL,
    weights: str | None = None,
    backbone_weights: str | None = None,
    frozen_stages: int | None = None,
    norm: str | None = None,
    style: str = "pytorch",
    channels: int = 256,
    num_convs: int | None = None,
    norm_groups: int = 32,
    conv_bias: bool | None = None,
    center_sampling: bool | None = None,
    center_sample_radius: float | None = None,
    centerness_on_reg: bool | None = None,
    norm_on_bbox: bool | None = None,
    loss_bbox: str | None = None,
    point_offset: float | None = None,
    init: str | None = None,
    min_size: int | None = None,
    max_size: int | None = None,
    image_mean: Sequence[float] = IMAGENET_MEAN,
    image_std: Sequence[float] = IMAGENET_STD,
    channel_order: str = "rgb",
    score_thresh: float = 0.05,
    nms_thresh: float = 0.6,
    topk_candidates: int = 1000,
    detections_per_img: int = 100,
) -> Detector:
    """A Detector by name.

    head: "fcos" or "vfnet". backbone: "resnet10", "resnet18", "resnet34", "resnet50" or "resnet101".
    msil: keyword arguments of MSIL (channels aside), by default the full block; None, or apply="none": the plain
        detector.
    weights: file with a Detector's state dict (or a checkpoint of a run), loaded after building. Whether the other
        settings are those that it was trained with cannot be seen from a state dict alone:
        msil.checkpoints.load.load_detector reads them from the file too.
    backbone_weights, frozen_stages, norm, style: as ResNet's weights, frozen_stages, norm and style.
    channels: of the FPN and the head.
    num_convs ... init: as in FCOSHead or VFNetHead; None, the head's default.
    The rest: as in Detector.

    Raises ValueError for an unknown name or an option that the head does not have, WeightsError for weights that are
    missing or do not fit.
    """
    options = {
        "num_convs": num_convs,
        "conv_bias": conv_bias,
        "center_sampling": center_sampling,
        "center_sample_radius": center_sample_radius,
        "centerness_on_reg": centerness_on_reg,
        "norm_on_bbox": norm_on_bbox,
        "loss_bbox": loss_bbox,
        "point_offset": point_offset,
        "init": init,
    }
    given = {name: value for name, value in options.items() if value is not None}
    match head:
        case "fcos":
            head_class = FCOSHead
        case "vfnet":
            head_class = VFNetHead
        case _:
            raise ValueError(f"unknown head {head!r}; known: fcos, vfnet.")
    foreign = given.keys() - inspect.signature(head_class).parameters.keys()
    if foreign:
        raise ValueError(f"the head {head} has no option {', '.join(sorted(foreign))}: leave it out.")
    body = ResNet(backbone, weights=backbone_weights, norm=norm, frozen_stages=frozen_stages, style=style)
    detector = Detector(
        body,
        FPN(body.out_channels, channels),
        head_class(num_classes, channels, norm_groups=norm_groups, msil=msil, **given),
        min_size=min_size,
        max_size=max_size,
        image_mean=image_mean,
        image_std=image_std,
        channel_order=channel_order,
        score_thresh=score_thresh,
        nms_thresh=nms_thresh,
        topk_candidates=topk_candidates,
        detections_per_img=detections_per_img,
    )
    if weights is not None:
        state = load_state_dict_file(weights)
        found = differences(detector.state_dict(), state)
        if found:
            raise WeightsError(f"{weights} does not fit this detector: it {found}; build the detector that it is of.")
        detector.load_state_dict(state)
    return detector
