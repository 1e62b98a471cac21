"""P12: 640x480 JPEG files to what a training step is given at 800x1066, one core.

    python -m benchmarks.loading

Ours is the data set of a training run as its loader's workers read it: file -> uint8 image, resized, mirrored or not,
and its boxes. The net normalises on its device. The anchor is what a user of torchvision's FCOS pays: Pillow, the
transforms of torchvision's detection reference (PILToTensor, RandomHorizontalFlip, ToDtype float scaled), then the
model's own GeneralizedRCNNTransform, which normalises and resizes in float, for one image at a time. A second row adds
our net's normalisation and padding, so that both sides end with the batch.

With data.device_transforms the workers only decode and draw, here a batch of 16; the last row has what that leaves of
decoding's speed. The files are made here: smooth noise of many scales and grain, at Pillow's quality 90, some 140 kB
each, as COCO's are. Both decoders are libjpeg-turbo.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import v2

from benchmarks.compare import Row, interleaved, run
from msil.data.annotations import AnnotatedImages, Annotations
from msil.data.module import KeyedImages, collate_training
from msil.data.transforms import Augmentation, draw_augmentation, transform_image
from msil.detection.preprocess import batch_images, normalize

IMAGES, HEIGHT, WIDTH, BOXES = 16, 480, 640, 7
SIZE = (800, 1066)  # torchvision's; our rule (MMDetection's) rounds the width up to 1067
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def picture(rng: np.random.Generator) -> np.ndarray:
    """(480, 640, 3) uint8 with detail at every scale, as photographs have it."""
    pixels = 8 * rng.standard_normal((HEIGHT, WIDTH, 1))
    for cell in (2, 4, 8, 16, 32, 64, 128):
        coarse = rng.standard_normal((3, HEIGHT // cell + 2, WIDTH // cell + 2)).astype(np.float32)
        smooth = [Image.fromarray(plane).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR) for plane in coarse]
        pixels = pixels + cell**0.75 * np.stack([np.asarray(plane) for plane in smooth], axis=-1)
    return (55 * (pixels - pixels.mean()) / pixels.std() + 115).clip(0, 255).astype(np.uint8)


def made_files(folder: Path) -> AnnotatedImages:
    """A data set of made-up JPEG files and boxes."""
    rng = np.random.default_rng(0)
    names = [f"{i}.jpg" for i in range(IMAGES)]
    for name in names:
        Image.fromarray(picture(rng)).save(folder / name, quality=90)
    corners, sides = rng.uniform(0, 200, (IMAGES * BOXES, 2)), rng.uniform(20, 200, (IMAGES * BOXES, 2))
    return AnnotatedImages(
        Annotations(
            root=folder,
            source=folder,
            classes=tuple(map(str, range(80))),
            category_ids=tuple(range(80)),
            image_ids=np.arange(IMAGES),
            file_names=names,
            sizes=np.tile((HEIGHT, WIDTH), (IMAGES, 1)),
            orientations=np.ones(IMAGES, dtype=np.uint8),
            truth_images=np.arange(IMAGES).repeat(BOXES),
            truth_ids=np.arange(IMAGES * BOXES),
            truth_boxes=np.concatenate([corners, sides], axis=1),
            truth_labels=rng.integers(0, 80, IMAGES * BOXES),
            truth_areas=sides.prod(axis=1),
            truth_ignored=np.zeros(IMAGES * BOXES, bool),
        )
    )


class TorchvisionLoading:
    """From file to batch as torchvision's detection reference and its FCOS do it."""

    def __init__(self, dataset: AnnotatedImages, flip: float) -> None:
        self.dataset = dataset
        self.loader = v2.Compose([v2.PILToTensor(), v2.RandomHorizontalFlip(flip), v2.ToDtype(torch.float, scale=True)])
        self.model = GeneralizedRCNNTransform(800, 1333, MEAN, STD)
        self.targets = [self.target(i) for i in range(len(dataset))]

    def target(self, index: int) -> dict[str, Any]:
        _, target = self.dataset[index]
        boxes: Any = tv_tensors.BoundingBoxes(target.boxes, format="XYXY", canvas_size=(HEIGHT, WIDTH))  # pyright: ignore
        return {"boxes": boxes, "labels": target.labels}

    def __call__(self, index: int) -> Tensor:
        with Image.open(self.dataset.path(index)) as file:
            image, target = self.loader(file.convert("RGB"), dict(self.targets[index]))
        batch, _ = self.model([image], [target])
        return batch.tensors


def decode_only(dataset: AnnotatedImages, index: int) -> Tensor:
    return decode_image(read_file(str(dataset.path(index))), mode=ImageReadMode.RGB)


def measure() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        dataset = made_files(Path(folder))
        draw = partial(draw_augmentation, min_size=800, max_size=1333, multiscale=None, flip=0.5)
        images = KeyedImages(dataset)
        ours = partial(collate_training, draw=draw, seed=0, postponed=False)
        gather = partial(collate_training, draw=draw, seed=0, postponed=True)
        torchvisions = TorchvisionLoading(dataset, flip=0.5)
        agreement = same_pixels(dataset)
        every = range(IMAGES)
        seconds = interleaved(
            {
                "ours": lambda: ours([images[0, i] for i in every]),
                "whole": lambda: [batch_images([normalize(image)]) for image in ours([images[0, i] for i in every])[0]],
                "anchor": lambda: [torchvisions(i) for i in every],
            }
        ) | interleaved(
            {
                "postponed": lambda: gather([images[0, i] for i in every]),
                "decoded": lambda: [decode_only(dataset, i) for i in every],
            },
            repeats=101,
        )
        took = {name: value / IMAGES for name, value in seconds.items()}

        def row(name: str, ours: str, anchor: str, at_least: float | None, agreement: str) -> Row:
            ratio = took[anchor] / took[ours]
            met = None if at_least is None else ratio >= at_least
            goal = "" if at_least is None else f">= {at_least:g}x"
            said = [f"{1 / took[way]:.0f} images/s" for way in (ours, anchor)]
            return Row(name, *said, ratio, goal, met, agreement)

        yield row("P12 loading 640x480 JPEG to 800x1066 uint8", "ours", "anchor", 4.5, agreement)
        yield row("P12 the same, normalised and in a batch", "whole", "anchor", None, agreement)
        same = all(torch.equal(images[0, i][0], decode_only(dataset, i)) for i in every)
        assert same, "what the loader postpones is not what the decoder gives"
        yield row("P12 device_transforms against decoding", "postponed", "decoded", 0.9, "the decoder's pixels")


def same_pixels(dataset: AnnotatedImages) -> str:
    """Both ways to 800x1066, in 0..255: ours rounds to whole numbers after resizing, in fixed point, theirs never."""
    theirs = TorchvisionLoading(dataset, flip=0)
    worst, total = 0.0, 0.0
    for index in range(len(dataset)):
        ours = transform_image(dataset[index][0], Augmentation(*SIZE, mirrored=False))
        normalised = theirs(index)[0, :, : SIZE[0], : SIZE[1]]
        other = 255 * (normalised * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None])
        difference = (ours - other).abs()
        worst, total = max(worst, float(difference.max())), total + float(difference.mean())
    mean = total / len(dataset)
    assert worst <= 1 and mean <= 0.3, f"pixels differ by {worst:.2f}, {mean:.3f} on average"
    return f"pixels differ by {worst:.2f} of 255 at most, {mean:.2f} on average"


if __name__ == "__main__":
    run(measure, __doc__)
