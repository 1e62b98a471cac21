"""Input preparation against MMDetection's numbers and hand arithmetic."""

from __future__ import annotations

import pytest
import torch

from msil.detection.preprocess import batch_images, normalize, resize, resized_size


def row(*values: float, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """Image (3, 1, W) with these values in every channel."""
    return torch.tensor(values, dtype=dtype).expand(3, 1, -1).contiguous()


def test_resized_size_is_the_references(golden) -> None:
    for size, (new_width, new_height) in golden.misc()["rescale_wh_to_1333x800"].items():
        width, height = map(int, size.split("x"))
        assert resized_size(height, width, 800, 1333) == (new_height, new_width), size


def test_resize_interpolates_between_pixel_centres() -> None:
    # Centres of 4 new pixels lie at -0.25, 0.25, 0.75, 1.25 of the old ones; outside the border value holds.
    assert resize(row(0, 100), (1, 4))[0].tolist() == [[0, 25, 75, 100]]


def test_resize_does_not_antialias() -> None:
    # Scale 4: the new centres lie at 1.5 and 5.5, so only old pixels 1, 2 and 5, 6 count: (0 + 8) / 2, (40 + 0) / 2.
    # Antialiasing would mix in the 200s.
    assert resize(row(200, 0, 8, 200, 200, 40, 0, 200), (1, 2))[0].tolist() == [[4, 20]]


@pytest.mark.parametrize("size", [(90, 121), (31, 20)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_resize_of_a_decoders_layout_is_the_same_and_stays_in_it(size: tuple[int, int], dtype: torch.dtype) -> None:
    pixels = torch.randint(0, 256, (3, 40, 50), generator=torch.Generator().manual_seed(0)).to(dtype)
    interleaved = pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # red, green, blue of a pixel side by side
    resized = resize(interleaved, size)
    torch.testing.assert_close(resized, resize(pixels, size), rtol=0, atol=0 if dtype == torch.uint8 else 1e-4)
    assert resized.permute(1, 2, 0).is_contiguous()
    assert torch.equal(interleaved, pixels)


def test_normalised_padded_batch_is_the_references(golden) -> None:
    case = golden("preprocess")
    rgb = case["img_bgr"].flip(0)
    assert torch.equal(batch_images([normalize(rgb)]), case["pytorch"])


def test_normalise_by_hand() -> None:
    # (128 - 64) / 32 = 2, (0 - 64) / 64 = -1, (255 - 0) / 51 = 5
    image = torch.tensor([128, 0, 255], dtype=torch.uint8).view(3, 1, 1)
    mean, std = (64.0, 64.0, 0.0), (32.0, 64.0, 51.0)
    assert normalize(image, mean, std).flatten().tolist() == [2.0, -1.0, 5.0]
    assert torch.equal(normalize(image, torch.tensor(mean), torch.tensor(std)), normalize(image, mean, std))


def test_float_images_are_in_0_to_1() -> None:
    image = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    torch.testing.assert_close(normalize(image.float() / 255), normalize(image))
    assert normalize((image / 255).double()).dtype == torch.float32


def test_batch_is_padded_right_and_below_to_the_largest() -> None:
    tall, wide = torch.ones(3, 33, 20), torch.full((3, 10, 64), 2.0)
    batch = batch_images([tall, wide])
    assert batch.shape == (2, 3, 64, 64)
    assert torch.equal(batch[0, :, :33, :20], tall)
    assert torch.equal(batch[1, :, :10, :64], wide)
    assert batch.sum() == tall.sum() + wide.sum()  # zeros everywhere else


def test_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        batch_images([])
