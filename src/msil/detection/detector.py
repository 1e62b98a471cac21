"""A whole detector: images in, losses or detections out."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from functools import partial
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
    common_size,
    normalize,
    resize,
    resized_size,
)
from msil.detection.structures import Detections, Predictions, Target
from msil.detection.views import merged, mirrored, rescaled, scaled_limits
from msil.detection.weights import differences, load_state_dict_file
from msil.errors import WeightsError

STRIDE = 32  # of the backbone's deepest map: images are padded to a multiple of it
MOST_GRAPHS = 64  # of each compiled part; small images of mixed sizes took 25 in all
Limits = tuple[int, int] | None  # short side and limit of the long side, pixels; None: as it is

FULL_MSIL: Mapping[str, Any] = MappingProxyType({"align": True, "separate": True, "apply": "both"})


class Detector(nn.Module):
    """backbone -> FPN -> head, with pre- and post-processing.

    Images are lists of tensors (3, H, W), RGB, uint8 or float in 0..1, of any sizes; their channels are put into
    `channel_order` ("rgb" or "bgr"), normalised by image_mean and image_std (in that order, 0..255 units), and padded
    to the batch's largest size, rounded up to 32.
    min_size, max_size: if given, `predict` first resizes each image so that its short side is min_size and its
        long side at most max_size. None: images are taken as they are.
    score_thresh, nms_thresh, topk_candidates, detections_per_img: as in FCOSHead.detect.
    test_scales, test_flip: `predict` looks at each image at each of these short sides in place of min_size, the long
        side's limit in proportion to max_size, and mirrored too; see msil.detection.views. None, False: once.
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
        test_scales: Sequence[int] | None = None,
        test_flip: bool = False,
    ) -> None:
        super().__init__()
        if (min_size is None) != (max_size is None):
            raise ValueError("min_size and max_size go together: give both or neither.")
        if test_scales is not None and (min_size is None or not test_scales or min(test_scales) < 1):
            raise ValueError(f"test_scales must be short sides in pixels beside min_size, not {test_scales}.")
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
        self.test_scales = None if test_scales is None else tuple(test_scales)
        self.test_flip = test_flip
        self.channel_order = channel_order
        self.channels_last = True
        self.image_mean: Tensor
        self.image_std: Tensor
        self.register_buffer("image_mean", torch.tensor(image_mean), persistent=False)
        self.register_buffer("image_std", torch.tensor(image_std), persistent=False)

    def forward(self, images: list[Tensor], pad_to: tuple[int, int] = (0, 0)) -> Predictions:
        """N images (3, H, W) -> raw Predictions over the padded batch; pad_to: at least so high and wide."""
        return self.net(self.batch(images, pad_to))

    def net(self, batch: Tensor) -> Predictions:
        """A batch (N, 3, H, W) as `batch` makes it -> raw Predictions: the part with the weights."""
        return self.head(self.fpn(self.backbone(batch)))

    def pyramid(self, images: list[Tensor], pad_to: tuple[int, int] = (0, 0)) -> list[Tensor]:
        """N images (3, H, W) -> P3..P7, (N, C, H / stride, W / stride) of the padded batch."""
        return self.fpn(self.backbone(self.batch(images, pad_to)))

    def batch(self, images: list[Tensor], pad_to: tuple[int, int] = (0, 0)) -> Tensor:
        """N images (3, H, W) -> (N, 3, H, W) float32, normalised and padded with zeros, H and W multiples of 32."""
        if self.channel_order == "bgr":
            images = [image.flip(0) for image in images]
        batch = batch_images(
            [normalize(image, self.image_mean, self.image_std) for image in images], STRIDE, at_least=pad_to
        )
        return batch.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)

    def lay_out(self, *, channels_last: bool) -> None:
        """Choose how feature maps lie in memory: channels last (the default, and faster), or channel by channel."""
        self.channels_last = channels_last
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.to(memory_format=layout)  # pyright: ignore[reportCallIssue]

    def compile_parts(self, *, frozen: bool = False) -> None:
        """From now on run `net` and the head's loss through torch.compile, each for itself.

        It costs up to minutes when a mode, or a size that differs in kind from those before (the second of image, batch
        or ground truth; a map one cell wide), comes for the first time, and pays in long runs. Keys of the state dict
        stay as they are. What this process compiles from now on may be compiled MOST_GRAPHS times: PyTorch's own limit
        is 8, beyond which it would go on eagerly.

        frozen: the weights will not change any more, so that what is computed without gradients can hold them in the
            order that the machine likes best. Holds for all that this process compiles from now on.
        """
        import torch._dynamo.config as dynamo  # late: it takes a second
        import torch._inductor.config as inductor

        dynamo.recompile_limit = max(dynamo.recompile_limit, MOST_GRAPHS)
        inductor.freezing = inductor.freezing or frozen
        # Not the methods of this detector: a copy of it has to get its own.
        self.net = partial(torch.compile(type(self).net), self)
        self.head.padded_loss = partial(torch.compile(type(self.head).padded_loss), self.head)

    def loss(self, images: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
        """N images and their N targets in the images' pixels -> the head's loss terms, scalars."""
        return self.head.loss(self(images), targets, image_sizes(images))

    def part_loss(
        self, images: list[Tensor], targets: list[Target], *, pad_to: tuple[int, int], divisors: Tensor | None
    ) -> dict[str, Tensor]:
        """As `loss`, for a part of a step's images: the parts' terms add up to the step's, and so do their gradients.

        pad_to: the largest (height, width) of the step's images, for points in the padding count too. divisors: the
        head's `divisors` of the sum of all parts' `loss_sums`; None: this rank has no other part.
        """
        return self.head.part_loss(self(images, pad_to), targets, image_sizes(images), divisors)

    @torch.no_grad()
    def loss_sums(self, images: list[Tensor], targets: list[Target], *, pad_to: tuple[int, int]) -> Tensor:
        """What the head's `divisors` are made of, for a part of a step's images as in `part_loss`.

        FCOS's come from the targets. VFNet's need the predicted boxes: a forward pass without gradients, which leaves
        the running statistics of norms alone.
        """
        sizes = image_sizes(images)
        if isinstance(self.head, FCOSHead):
            height, width = common_size([*sizes, pad_to], STRIDE)
            maps = tuple((math.ceil(height / stride), math.ceil(width / stride)) for stride in self.head.strides)
            return self.head.sums(maps, targets)
        norms = [m for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
        statistics = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
        try:
            return self.head.sums(self(images, pad_to), targets, sizes)
        finally:
            for buffer, before in statistics:
                buffer.copy_(before)

    @torch.no_grad()
    def predict(self, images: list[Tensor]) -> list[Detections]:
        """N images (3, H, W) -> N Detections in the pixels of those images. Runs in eval mode and leaves the mode
        as it was.

        What is found in an image does not depend on the others: only images that are padded to the same size go
        through the net together.
        """
        if not images:
            return []
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            views = [self._look(images, limits, flip) for limits in self._limits() for flip in self._flips()]
        finally:
            for module, training in modes:
                module.training = training
        if len(views) == 1:
            return views[0]
        return [
            merged(list(found), nms_thresh=self.nms_thresh, detections_per_img=self.detections_per_img)
            for found in zip(*views, strict=True)
        ]

    def resized(self, image: Tensor) -> Tensor:
        """An image (3, H, W) as `predict` gives it to the net: resized by min_size and max_size, not yet normalised.
        Of several test_scales none counts here."""
        return _resized(image, self._size())

    def _size(self) -> Limits:
        return None if self.min_size is None or self.max_size is None else (self.min_size, self.max_size)

    def _limits(self) -> list[Limits]:
        if self.test_scales is None or self.min_size is None or self.max_size is None:
            return [self._size()]
        return scaled_limits(self.test_scales, self.min_size, self.max_size)

    def _flips(self) -> tuple[bool, ...]:
        return (False, True) if self.test_flip else (False,)

    def _look(self, images: list[Tensor], limits: Limits, flip: bool) -> list[Detections]:
        """Detections in the pixels of the images, from one view of each."""
        resized = [_resized(image, limits) for image in images]
        groups: dict[tuple[int, int], list[int]] = {}
        for place, size in enumerate(image_sizes(resized)):
            groups.setdefault(common_size([size], STRIDE), []).append(place)
        found: dict[int, Detections] = {}
        for places in groups.values():
            group = [resized[place].flip(-1) if flip else resized[place] for place in places]
            found |= zip(places, self._detect(group), strict=True)
        results = []
        for place, image in enumerate(images):
            own = resized[place]
            detections = mirrored(found[place], own.shape[-1]) if flip else found[place]
            results.append(rescaled(detections, (own.shape[-2], own.shape[-1]), (image.shape[-2], image.shape[-1])))
        return results

    def _detect(self, images: list[Tensor]) -> list[Detections]:
        return self.head.detect(
            self(images),
            image_sizes(images),
            score_thresh=self.score_thresh,
            nms_thresh=self.nms_thresh,
            topk_candidates=self.topk_candidates,
            detections_per_img=self.detections_per_img,
        )


def image_sizes(images: list[Tensor]) -> list[tuple[int, int]]:
    """(height, width) of each image (3, H, W)."""
    return [(image.shape[-2], image.shape[-1]) for image in images]


def _resized(image: Tensor, limits: Limits) -> Tensor:
    if limits is None:
        return image
    return resize(image, resized_size(image.shape[-2], image.shape[-1], *limits))


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
    test_scales: Sequence[int] | None = None,
    test_flip: bool = False,
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
        test_scales=test_scales,
        test_flip=test_flip,
    )
    if weights is not None:
        state = load_state_dict_file(weights)
        found = differences(detector.state_dict(), state)
        if found:
            raise WeightsError(f"{weights} does not fit this detector: it {found}; build the detector that it is of.")
        detector.load_state_dict(state)
    return detector
