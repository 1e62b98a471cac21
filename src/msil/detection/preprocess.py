"""From an image to the net's input: size rule, resizing, normalisation, padding. Pure functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import resize_image

from msil.detection.structures import kind_of

STRIDE = 32  # of the backbone's deepest map: images are padded to a multiple of it
# Of ImageNet, RGB, in 0..255 units: what torchvision's ResNet weights expect.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


def resized_size(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """MMDetection's keep-ratio rule: the largest scale with short side <= min_size and long side <= max_size.

    Returns (height, width), each int(side * scale + 0.5) and at least 1. Scales up as well as down.
    """
    scale = min(max_size / max(height, width), min_size / min(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resizing of an image (3, H, W) to size (height, width), the dtype kept.

    Without antialiasing and with half-pixel centres, as OpenCV's INTER_LINEAR; uint8 values may differ from exact
    rounding by 1. The image itself comes back if it has that size already.
    """
    rows = image.permute(1, 2, 0)
    if rows.is_contiguous():
        # As image files are decoded: the channels of a pixel side by side. Torch has a kernel for that, four times as
        # fast and with the same result, but sees it only where the batch of one has the stride of a whole image.
        return resize_image(rows[None].permute(0, 3, 1, 2), list(size), antialias=False)[0]
    return resize_image(image, list(size), antialias=False)


def normalize(
    image: Tensor, mean: Sequence[float] | Tensor = IMAGENET_MEAN, std: Sequence[float] | Tensor = IMAGENET_STD
) -> Tensor:
    """(image - mean) / std by channel, as float32.

    image: (..., 3, H, W) RGB; uint8 in 0..255, or floating point in 0..1 (torchvision's habit), which is multiplied
    by 255 first. mean, std: three numbers in 0..255 units; give tensors on the image's device to spare the copy.

    Raises ValueError for an image that has not three channels, or of an integer type other than uint8.
    """
    if image.dim() < 3 or image.shape[-3] != 3:
        raise ValueError(f"an image must be (3, H, W), not {tuple(image.shape)}.")
    if image.is_floating_point():
        pixels = image.float() * 255
    elif image.dtype == torch.uint8:
        pixels = image.float()
    else:
        raise ValueError(f"an image must be uint8 (0..255) or floating point (0..1), not {image.dtype}.")
    mean = torch.as_tensor(mean, dtype=torch.float32, device=image.device).view(3, 1, 1)
    std = torch.as_tensor(std, dtype=torch.float32, device=image.device).view(3, 1, 1)
    return (pixels - mean) / std


def batch_images(images: Sequence[Tensor]) -> Tensor:
    """Normalised images (3, H_i, W_i) -> one batch (N, 3, H, W) of `common_size`, zeros at the right and the bottom.

    Zeros after normalisation are the mean colour, which is what MMDetection pads with.

    Raises ValueError for an empty list.
    """
    if not images:
        raise ValueError("a batch needs at least one image.")
    height, width = common_size(image_sizes(images))
    batch = images[0].new_zeros((len(images), images[0].shape[0], height, width))
    for slot, image in zip(batch, images, strict=True):
        slot[:, : image.shape[-2], : image.shape[-1]] = image
    return batch


def common_size(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(height, width) of a batch of images of those sizes (height, width): the largest, rounded up to STRIDE."""
    height, width = (-(-max(sides) // STRIDE) * STRIDE for sides in zip(*sizes, strict=True))
    return height, width


def image_sizes(images: Sequence[Tensor]) -> list[tuple[int, int]]:
    """(height, width) of each image (3, H, W)."""
    return [(image.shape[-2], image.shape[-1]) for image in images]


def image_list(images: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """One image (3, H, W), a batch (N, 3, H, W) or a sequence of images (3, H, W) as a list of images.

    Raises ValueError for anything else.
    """
    if isinstance(images, Tensor):
        if images.dim() not in (3, 4):
            raise ValueError(
                f"images must be (3, H, W), (N, 3, H, W) or a list of (3, H, W), not {tuple(images.shape)}."
            )
        return [images] if images.dim() == 3 else list(images)
    if not isinstance(images, Sequence) or isinstance(images, str):
        raise ValueError(f"images must be a tensor or a list of tensors (3, H, W), not {type(images).__name__}.")
    for number, image in enumerate(images):
        if not isinstance(image, Tensor) or image.dim() != 3:
            raise ValueError(f"image {number} must be a tensor (3, H, W), not {kind_of(image)}.")
    return list(images)


def check_values(images: Sequence[Tensor]) -> None:
    """Raises ValueError for an image without pixels, and for a floating-point one in 0..255."""
    for number, image in enumerate(images):
        if image.numel() == 0:
            raise ValueError(f"image {number} has no pixels: {tuple(image.shape)}.")
        if image.is_floating_point() and image.max() > 2:  # resampling may overshoot 1 a little
            raise ValueError(
                f"image {number} is floating point and reaches {image.max():.4g}: give uint8, or divide by 255."
            )
