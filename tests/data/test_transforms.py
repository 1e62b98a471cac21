"""Training transforms: boxes by hand, sizes of the reference, and chance from the generator alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from msil.data.transforms import Augmentation, draw_augmentation, transform_boxes, transform_image


def random_image(height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def drawn(size: tuple[int, int], seed: int = 0, **changes: Any) -> Augmentation:
    settings: dict[str, Any] = {"min_size": 1, "max_size": 999, "multiscale": None, "flip": 0.0}
    return draw_augmentation(*size, torch.Generator().manual_seed(seed), **{**settings, **changes})


def moved(boxes: list[list[float]], size: tuple[int, int], augmentation: Augmentation) -> Tensor:
    return transform_boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), size, augmentation)


def test_each_axis_is_scaled_by_its_own_rounded_side() -> None:
    # Scale min(1333/500, 800/333) = 2.4024: 333 x 500 -> 800 x 1201 (from 1201.2), so x grows by 1201/500 = 2.402.
    augmentation = drawn((333, 500), min_size=800, max_size=1333)
    assert augmentation == (800, 1201, False)
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
