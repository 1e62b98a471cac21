"""Training transforms: boxes by hand, sizes of the reference, and chance from the generator alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from msil.data.transforms import Augmentation, draw_augmentation, transform_image, transform_target
from msil.detection.preprocess import resize, resized_size
from msil.detection.structures import Target


def random_image(height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def target_of(boxes: Any, size: tuple[int, int]) -> Target:
    """Of boxes that are labelled by their number."""
    return Target(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), torch.arange(len(boxes)), size=size)


def drawn(size: tuple[int, int], seed: int = 0, boxes: Any = (), **changes: Any) -> Augmentation:
    settings: dict[str, Any] = {"min_size": 1, "max_size": 999, "multiscale": None, "flip": 0.0}
    return draw_augmentation(target_of(boxes, size), torch.Generator().manual_seed(seed), **{**settings, **changes})


def moved(boxes: list[list[float]], size: tuple[int, int], augmentation: Augmentation) -> Tensor:
    return transform_target(target_of(boxes, size), augmentation).boxes


def test_each_axis_is_scaled_by_its_own_rounded_side() -> None:
    # Scale min(1333/500, 800/333) = 2.4024: 333 x 500 -> 800 x 1201 (from 1201.2), so x grows by 1201/500 = 2.402.
    augmentation = drawn((333, 500), min_size=800, max_size=1333)
    assert augmentation == Augmentation(800, 1201, mirrored=False)
    boxes = moved([[100, 111, 250, 222]], (333, 500), augmentation)
    torch.testing.assert_close(boxes, torch.tensor([[240.2, 800 / 3, 600.5, 1600 / 3]]), rtol=1e-6, atol=0)


def test_sizes_of_the_reference(golden: Any) -> None:
    """Width x height -> what MMDetection's rescale to (1333, 800) gave."""
    for name, (wanted_width, wanted_height) in golden.misc()["rescale_wh_to_1333x800"].items():
        width, height = map(int, name.split("x"))
        assert drawn((height, width), min_size=800, max_size=1333)[:2] == (wanted_height, wanted_width), name


def test_mirrored_boxes_and_pixels_by_hand() -> None:
    image = torch.zeros(3, 30, 40, dtype=torch.uint8)
    image[:, 5:9, 2:6] = 255  # the box's own pixels
    mirror = Augmentation(30, 40, mirrored=True)
    boxes = moved([[2, 5, 6, 9], [0, 0, 40, 30], [39.5, 1, 40, 2]], (30, 40), mirror)
    assert boxes.tolist() == [[34, 5, 38, 9], [0, 0, 40, 30], [0, 1, 0.5, 2]]  # x -> 40 - x
    rows, columns = torch.nonzero(transform_image(image, mirror)[0], as_tuple=True)
    assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == [34, 5, 38, 9]
    assert moved([], (30, 40), mirror).numel() == 0


@pytest.mark.parametrize(("flip", "mirrored"), [(0.0, 0), (1.0, 50), (0.5, 25)])
def test_flip_is_a_probability(flip: float, mirrored: int) -> None:
    count = sum(drawn((30, 40), seed, flip=flip).mirrored for seed in range(50))
    # 50 fair throws stay within 25 +- 14 but for 1 in 10000 cases; 0 and 1 are certain.
    assert abs(count - mirrored) <= (14 if 0 < flip < 1 else 0)


def test_multiscale_draws_every_short_side_up_to_the_limit_of_the_long_one() -> None:
    sizes = {drawn((8, 8), seed, multiscale=(5, 9))[:2] for seed in range(100)}
    assert sizes == {(side, side) for side in (5, 6, 7, 8, 9)}
    # 10 x 40, short side 20..30 wants a long side of 80..120, but 60 is the limit: 15 x 60.
    assert {drawn((10, 40), seed, max_size=60, multiscale=(20, 30))[:2] for seed in range(10)} == {(15, 60)}


@pytest.mark.parametrize("size", [(60, 80), (17, 93), (30, 40), (12, 16), (47, 31)])
def test_to_mirror_before_or_after_resizing_is_the_same(size: tuple[int, int]) -> None:
    image = random_image(30, 40)
    plain, mirrored = (transform_image(image, Augmentation(*size, mirrored=m)) for m in (False, True))
    # On CPUs without AVX2 torch resizes in floating point, whose last digit may round the other way.
    assert (plain.flip(-1).int() - mirrored.int()).abs().max() <= 1


def test_part_and_place_by_hand() -> None:
    """The part (10, 10)-(30, 20) of 40 x 30 pixels becomes twice as large, at (5, 4) of 60 x 50 pixels."""
    augmentation = Augmentation(50, 60, mirrored=False, part=(10, 10, 30, 20), place=(5, 4, 45, 24))
    boxes = [
        [12, 11, 20, 19],  # -> 2 x (2, 1, 10, 9) + (5, 4)
        [5, 10, 15, 20],  # half of it
        [6, 10, 11, 20],  # a fifth of it: goes
        [0, 0, 40, 30],  # round the part: all that there is to see
        [28, 18, 36, 26],  # 2 x 2 of 8 x 8: goes
        [12, 12, 12.25, 19],  # half a pixel wide in the result: goes
        [31, 12, 35, 18],  # outside: goes
    ]
    target = transform_target(target_of(boxes, (30, 40)), augmentation)
    assert target.boxes.tolist() == [[9, 6, 25, 22], [5, 4, 15, 24], [5, 4, 45, 24]]
    assert target.labels.tolist() == [0, 1, 3]
    mirrored = transform_target(target_of(boxes, (30, 40)), augmentation._replace(mirrored=True))
    assert mirrored.boxes.tolist() == [[35, 6, 51, 22], [45, 4, 55, 24], [15, 4, 55, 24]]  # x -> 60 - x
    image = torch.full((3, 30, 40), 7, dtype=torch.uint8)
    pixels = transform_image(image, augmentation._replace(mirrored=True))
    assert pixels[:, 0, 0].tolist() == [124, 116, 104]  # ImageNet's mean
    rows, columns = torch.nonzero(pixels[0] == 7, as_tuple=True)
    assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == [15, 4, 55, 24]


@st.composite
def targets(draw: st.DrawFn) -> Target:
    """Boxes of quarter pixels, of at least a pixel a side, in an image of 1 to 200 pixels a side."""
    height, width = draw(st.integers(1, 200)), draw(st.integers(1, 200))
    boxes = []
    for _ in range(draw(st.integers(0, 5))):
        left, top = draw(st.integers(0, 4 * width - 4)), draw(st.integers(0, 4 * height - 4))
        right, bottom = draw(st.integers(left + 4, 4 * width)), draw(st.integers(top + 4, 4 * height))
        boxes.append([left / 4, top / 4, right / 4, bottom / 4])
    return target_of(boxes, (height, width))


def augmented(target: Target, seed: int, augment: str | None, **changes: Any) -> Augmentation:
    sizes: dict[str, Any] = {"min_size": 64, "max_size": 128, "multiscale": None, "flip": 0.5}
    generator = torch.Generator().manual_seed(seed)
    return draw_augmentation(target, generator, **{**sizes, **changes}, augment=augment)


augmenting = st.sampled_from(["standard", "strong"])
seeds = st.integers(0, 10**6)


@settings(max_examples=80, deadline=None)
@given(targets(), seeds, augmenting)
def test_boxes_stay_on_their_pixels(target: Target, seed: int, augment: str) -> None:
    """Read off an image whose pixels hold their own column and row; the mean colour has 104 where it has 0."""
    height, width = target.size
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[0], image[1] = torch.arange(width), torch.arange(height)[:, None]
    augmentation = augmented(target, seed, augment)
    left, top, right, bottom = augmentation.part or (0, 0, 0, 0)
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    assert augmentation.height <= 128 and augmentation.width <= 128
    result = transform_image(image, augmentation._replace(colours=None))
    assert result.shape == (3, augmentation.height, augmentation.width)
    after = transform_target(target, augmentation)
    assert after.boxes.dtype == torch.float32 and after.boxes.shape == (len(after.labels), 4)
    sides = after.boxes[:, 2:] - after.boxes[:, :2]
    assert (after.boxes >= 0).all() and (sides > 0.99).all()
    assert (after.boxes[:, [0, 2]] <= augmentation.width).all() and (
        after.boxes[:, [1, 3]] <= augmentation.height
    ).all()
    for box, label in zip(after.boxes.tolist(), after.labels.tolist(), strict=True):
        first = np.ceil(np.array(box[:2]) - 0.5).astype(int)  # the pixels whose centres are in the box
        last = np.floor(np.array(box[2:]) - 0.5).astype(int)
        seen = result[:, first[1] : last[1] + 1, first[0] : last[0] + 1].flatten(1).float()
        if not seen.numel():
            continue
        assert not seen[2].any(), "a box reaches out of the picture"
        for axis in (0, 1):
            low, high = target.boxes[label][axis::2].tolist()
            assert low - 1.5 <= seen[axis].min() + 0.5 and seen[axis].max() + 0.5 <= high + 1.5


@settings(max_examples=80, deadline=None)
@given(targets(), seeds)
def test_a_crop_keeps_the_pixel_under_a_centre(target: Target, seed: int) -> None:
    """A box whose centre is in the part that is shown stays, round that pixel, if it is not too small."""
    augmentation = augmented(target, seed, "strong", min_size=400, max_size=10**4, flip=0.0)
    assert augmentation.part is not None and augmentation.place is not None
    after = transform_target(target, augmentation)
    centres = (target.boxes[:, :2] + target.boxes[:, 2:]) / 2
    low, high = torch.tensor(augmentation.part).view(2, 2).float()
    shown, place = high - low, torch.tensor(augmentation.place).view(2, 2).float()
    for label in torch.nonzero(((centres > low) & (centres < high)).all(1)).flatten().tolist():
        centre = (centres[label] - low) / shown * (place[1] - place[0]) + place[0]
        visible = torch.minimum(target.boxes[label, 2:], high) - torch.maximum(target.boxes[label, :2], low)
        if (visible * (place[1] - place[0]) / shown > 1.01).all():
            box = after.boxes[after.labels == label]
            assert len(box) == 1 and (box[0, :2] < centre + 0.01).all() and (centre - 0.01 < box[0, 2:]).all()


def test_most_strong_draws_keep_a_box() -> None:
    boxes = [[10, 10, 40, 40], [100, 60, 180, 110]]
    draws = [drawn((120, 200), seed, boxes, min_size=120, augment="strong") for seed in range(50)]
    left = [len(transform_target(target_of(boxes, (120, 200)), draw).labels) for draw in draws]
    assert left.count(0) <= 1 and left.count(1) > 5 and left.count(2) > 5


@settings(max_examples=25, deadline=None)
@given(targets(), seeds)
def test_none_is_the_resizing_alone_and_flip_the_default(target: Target, seed: int) -> None:
    size = resized_size(*target.size, 64, 128)
    none = augmented(target, seed, "none", multiscale=(32, 96), flip=1.0)
    assert none == Augmentation(*size, mirrored=False)
    image = random_image(*target.size)
    assert torch.equal(transform_image(image, none), resize(image, size))
    after = transform_target(target, none)
    scale = np.array([size[1] / target.size[1], size[0] / target.size[0]] * 2, dtype=np.float32)
    limits = np.array([size[1], size[0]] * 2, dtype=np.float32)
    assert np.array_equal(after.boxes.numpy(), np.minimum(target.boxes.numpy() * scale, limits))
    assert torch.equal(after.labels, target.labels)
    assert augmented(target, seed, "flip", multiscale=(32, 96)) == augmented(target, seed, None, multiscale=(32, 96))


@settings(max_examples=25, deadline=None)
@given(targets(), seeds, augmenting)
def test_mirrored_twice_is_as_before(target: Target, seed: int, augment: str) -> None:
    augmentation = augmented(target, seed, augment, flip=0.0)
    plain, mirrored = (transform_target(target, augmentation._replace(mirrored=m)) for m in (False, True))
    mirror = Augmentation(augmentation.height, augmentation.width, mirrored=True)
    back = transform_target(Target(mirrored.boxes, mirrored.labels, size=mirror[:2]), mirror)
    assert torch.equal(back.labels, plain.labels)
    torch.testing.assert_close(back.boxes, plain.boxes, rtol=0, atol=1e-4)
    image = random_image(*target.size)
    pixels = [transform_image(image, augmentation._replace(mirrored=m)) for m in (False, True)]
    difference = (pixels[0].flip(-1).int() - pixels[1].int()).abs()
    assert difference.max() <= 1  # of rounding


@settings(max_examples=25, deadline=None)
@given(targets(), seeds, augmenting)
def test_chance_comes_from_the_images_stream_alone(target: Target, seed: int, augment: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = augmented(target, seed, augment)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert augmented(target, seed, augment) == first
    assert augmented(target, seed + 1, augment).colours != first.colours
    image = random_image(*target.size)
    assert torch.equal(transform_image(image, first), transform_image(image, first))
