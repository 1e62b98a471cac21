"""A whole detector: images in, losses or detections out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from msil.detection.backbone import build_backbone, eval_mode
from msil.detection.fpn import FPN
from msil.detection.heads import HEADS, DenseHead, HeadOptions, head_class
from msil.detection.postprocess import merged, mirrored, rescaled, scaled_limits
from msil.detection.preprocess import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    batch_images,
    check_values,
    common_size,
    image_list,
    image_sizes,
    normalize,
    resize,
    resized_size,
)
from msil.detection.structures import Detections, Predictions, Target, target_list
from msil.detection.weights import differences, load_state_dict_file
from msil.errors import WeightsError

MOST_GRAPHS = 64  # of each compiled part; small images of mixed sizes took 25 in all
Limits = tuple[int, int] | None  # short side and limit of the long side, pixels; None: as it is
Images = Tensor | Sequence[Tensor]

FULL_MSIL: Mapping[str, Any] = MappingProxyType({"align": True, "separate": True, "apply": "both"})


class Detector(nn.Module):
    """backbone -> FPN -> head, with pre- and post-processing.

    Images are tensors (3, H, W), RGB, uint8 or float in 0..1, of any sizes; their channels are put into `channel_order`
    ("rgb" or "bgr"), normalised by image_mean and image_std (in that order, 0..255 units; None: the backbone's own),
    and padded to the batch's largest size, rounded up to 32.
    min_size, max_size: if given, `predict` first resizes each image so that its short side is min_size and its
        long side at most max_size. None: images are taken as they are.
    score_thresh, nms_thresh, topk_candidates, detections_per_img: as in DenseHead.detect.
    test_scales, test_flip: `predict` takes each image at each of these short sides in place of min_size, the limit of
        the long side in proportion to max_size, and mirrored too. None, False: once.
    """

    def __init__(
        self,
        backbone: nn.Module,
        fpn: nn.Module,
        head: DenseHead,
        *,
        min_size: int | None = None,
        max_size: int | None = None,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
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
        mean = image_mean if image_mean is not None else getattr(backbone, "image_mean", IMAGENET_MEAN)
        std = image_std if image_std is not None else getattr(backbone, "image_std", IMAGENET_STD)
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(
                f"image_mean and image_std must be three numbers, the latter above 0, not {mean} and {std}."
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
        self.register_buffer("image_mean", torch.tensor(mean), persistent=False)
        self.register_buffer("image_std", torch.tensor(std), persistent=False)

    def forward(self, images: list[Tensor]) -> Predictions:
        """N images (3, H, W) -> raw Predictions over the padded batch."""
        return self.net(self.batch(images))

    def net(self, batch: Tensor) -> Predictions:
        """A batch (N, 3, H, W) as `batch` makes it -> raw Predictions: the part with the weights."""
        return self.head(self.fpn(self.backbone(batch)))

    def pyramid(self, images: list[Tensor]) -> list[Tensor]:
        """N images (3, H, W) -> P3..P7, (N, C, H / stride, W / stride) of the padded batch."""
        return self.fpn(self.backbone(self.batch(images)))

    def batch(self, images: list[Tensor]) -> Tensor:
        """N images (3, H, W) -> (N, 3, H, W) float32, normalised and padded with zeros, H and W multiples of 32."""
        if self.channel_order == "bgr":
            images = [image.flip(0) for image in images]
        batch = batch_images([normalize(image, self.image_mean, self.image_std) for image in images])
        return batch.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)

    def lay_out(self, *, channels_last: bool) -> None:
        """Memory format of weights and batches: channels last (the default, and faster) or contiguous."""
        self.channels_last = channels_last
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.to(memory_format=layout)  # pyright: ignore[reportCallIssue]

    def compile_parts(self, mode: str | None = "default", *, frozen: bool = False) -> None:
        """Run `net` and the head's loss through torch.compile, separately. Keys of the state dict stay the same.

        Compilation takes up to minutes, and again for a new kind of shape (the second size of image, batch or ground
        truth; a map one cell wide). Sets this process's limit of recompilations to MOST_GRAPHS: PyTorch's own is 8,
        beyond which it falls back to eager mode.

        mode: of torch.compile; None: nothing is compiled.
        frozen: the weights are final, so that inductor may fold them in graphs without gradients (its freezing).
            Applies to everything that this process compiles afterwards.
        """
        if mode is not None:
            allow_graphs(frozen)
            # The classes' methods, so that a copy of this detector gets its own.
            self.net = partial(torch.compile(type(self).net, mode=mode), self)
            self.head.padded_loss = partial(torch.compile(type(self.head).padded_loss, mode=mode), self.head)

    def loss(self, images: Images, targets: Sequence[Target | Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The head's loss terms, scalars, of N images and their N targets.

        images: as in `predict`. targets: Target, or torchvision's dicts {"boxes": (M, 4), "labels": (M,)}, in the
        images' pixels, with labels in [0, num_classes).
        Raises ValueError for anything else. The values in dicts, and those of the images beside them, are checked (a
        host sync); those of Targets, which msil's data sets check, are not.
        """
        images = image_list(images)
        if any(isinstance(target, Mapping) for target in targets):
            check_values(images)
        return self.head.loss(
            self(images), target_list(targets, len(images), self.head.num_classes), image_sizes(images)
        )

    @property
    def recipe(self) -> Mapping[str, float]:
        """Of the head's published recipe: warmup_factor, bias_lr_factor and bias_weight_decay."""
        return self.head.recipe

    def set_epoch(self, epoch: int) -> None:
        """Called by the training before each step; epoch counts from 0."""
        self.head.set_epoch(epoch)

    @torch.no_grad()
    def predict(self, images: Images) -> list[Detections]:
        """One image (3, H, W), a batch (N, 3, H, W) or a list of N images of any sizes -> N Detections in the pixels of
        those images. Runs in eval mode and leaves the mode as it was.

        Only images padded to the same size share a batch, so an image's detections do not depend on the others.
        Raises ValueError for any other input.
        """
        images = image_list(images)
        check_values(images)
        if not images:
            return []
        scales = [self._size] if self.test_scales is None else scaled_limits(self.test_scales, *self._size or ())
        flips = (False, True) if self.test_flip else (False,)
        with eval_mode(self):
            views = [self._view(images, limits, flip) for limits in scales for flip in flips]
        if len(views) == 1:
            return views[0]
        return [
            merged(found, nms_thresh=self.nms_thresh, detections_per_img=self.detections_per_img)
            for found in zip(*views, strict=True)
        ]

    def resized(self, image: Tensor) -> Tensor:
        """An image (3, H, W) resized by min_size and max_size, as in `predict` without test_scales; not normalised."""
        return _resized(image, self._size)

    @property
    def _size(self) -> Limits:
        return None if self.min_size is None or self.max_size is None else (self.min_size, self.max_size)

    def _view(self, images: list[Tensor], limits: Limits, flip: bool) -> list[Detections]:
        """Detections in the pixels of the images, from one view of each."""
        resized = [_resized(image, limits) for image in images]
        groups: dict[tuple[int, int], list[int]] = {}
        for place, size in enumerate(image_sizes(resized)):
            groups.setdefault(common_size([size]), []).append(place)
        results: dict[int, Detections] = {}
        for places in groups.values():
            group = [resized[place].flip(-1) if flip else resized[place] for place in places]
            found = self.head.detect(
                self(group),
                image_sizes(group),
                score_thresh=self.score_thresh,
                nms_thresh=self.nms_thresh,
                topk_candidates=self.topk_candidates,
                detections_per_img=self.detections_per_img,
            )
            sizes, originals = image_sizes(group), image_sizes([images[place] for place in places])
            for place, one, size, original in zip(places, found, sizes, originals, strict=True):
                seen = mirrored(one, size[1]) if flip else one
                results[place] = rescaled(seen, size, original, self.head.clip_to_image)
        return [results[place] for place in range(len(images))]


def allow_graphs(frozen: bool) -> None:
    """torch.compile's limits for `Detector.compile_parts`."""
    import torch._dynamo.config as dynamo  # late: it takes a second
    import torch._inductor.config as inductor

    dynamo.recompile_limit = max(dynamo.recompile_limit, MOST_GRAPHS)
    inductor.freezing = inductor.freezing or frozen


def _resized(image: Tensor, limits: Limits) -> Tensor:
    return image if limits is None else resize(image, resized_size(image.shape[-2], image.shape[-1], *limits))


def fpn_of(backbone: nn.Module, options: HeadOptions, channels: int) -> FPN:
    """The pyramid between a backbone and a head of those options."""
    return FPN(
        backbone.out_channels,  # pyright: ignore[reportArgumentType]
        channels,
        extra_convs=options.extra_convs,
        relu_before_extra_convs=options.relu_before_extra_convs,
    )


def build_detector(
    head: str | HeadOptions | DenseHead = "fcos",
    backbone: str | Any | nn.Module = "resnet50",
    num_classes: int = 80,
    *,
    msil: nn.Module | Mapping[str, Any] | None = FULL_MSIL,
    channels: int = 256,
    weights: str | None = None,
    min_size: int | None = None,
    max_size: int | None = None,
) -> Detector:
    """A Detector of a head, a backbone and an FPN between them.

    head: a name such as "fcos", "vfnet", "retinanet", "atss", "gfl", "tood"; a head's options, e.g.
        FCOSHead.Options(num_convs=2); or a DenseHead, which then has its classes and block already.
    backbone: a name such as "resnet50" or "timm:convnext_tiny"; ResNetOptions or TimmOptions; or an nn.Module with
        out_channels (3 numbers) and forward(images) -> [C3, C4, C5] at strides 8, 16, 32. See msil.detection.backbone.
    num_classes: K. channels: of the FPN and the head.
    msil: keyword arguments of MSIL (channels aside), by default the full block; a module of one's own from (cls_feat,
        reg_feat) to the same two shapes; None, or apply="none": the plain detector.
    weights: file with a Detector's state dict (or a run's checkpoint) that fits these settings;
        msil.checkpoints.load.load_detector takes the settings from a checkpoint too.
    min_size, max_size: as in Detector.

    Raises ValueError for an unknown name or an option outside its limits, WeightsError for weights that are missing or
    do not fit.
    """
    body = build_backbone(backbone)
    if isinstance(head, DenseHead):
        fpn = fpn_of(body, head.options, head.channels)
    else:
        options = head_class(head).Options() if isinstance(head, str) else head
        kind = next((kind for kind in HEADS.values() if kind.Options is type(options)), None)
        if kind is None:
            raise ValueError(f"head must be a name, a head's options or a DenseHead, not {type(options).__name__}.")
        fpn = fpn_of(body, options, channels)
        head = kind(num_classes, channels, msil=msil, **vars(options))
    built = Detector(body, fpn, head, min_size=min_size, max_size=max_size)
    if weights is not None:
        state = load_state_dict_file(weights)
        found = differences(built.state_dict(), state)
        if found:
            raise WeightsError(f"{weights} does not fit this detector: it {found}; build the detector that it is of.")
        built.load_state_dict(state)
    return built
