"""Heat maps of the towers: what they show, where, and the energy of whole splits."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msil import build_detector
from msil.detection import Detector
from msil.detection.heads import head_class
from msil.detection.priors import PriorGenerator
from msil.errors import ConfigError, DataError
from msil.reporting.energy import REGIONS, energy_json, energy_lines, split_energy
from msil.reporting.heatmaps import (
    CELL_SIDE,
    HeatmapRow,
    draw_heatmaps,
    level_names,
    tower_maps,
)

BOX = torch.tensor([[16.0, 8, 48, 40]])


class Brightness(nn.Module):
    """In place of a detector: the classification tower sees the image's brightness, the regression tower nothing."""

    strides: tuple[int, ...] = (8, 16)
    priors = PriorGenerator(strides, offset=0.5)

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.image_mean = torch.zeros(3)
        self.gain = gain
        self.eval()

    @property
    def head(self) -> Brightness:
        return self

    def resized(self, image: Tensor) -> Tensor:
        return image

    def pyramid(self, images: list[Tensor]) -> list[Tensor]:
        return [F.avg_pool2d(images[0][None].float(), stride) for stride in self.strides]

    def towers(self, pyramid: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return [level**self.gain for level in pyramid], [torch.ones_like(level) for level in pyramid]


def brightness(gain: float = 1.0) -> Detector:
    return cast(Detector, Brightness(gain))


def bright_box(background: int = 0) -> Tensor:
    """64 x 80 with BOX in white; the box fills whole cells of both levels but for P4's rows."""
    image = torch.full((3, 64, 80), background, dtype=torch.uint8)
    image[:, 8:40, 16:48] = 255
    return image


def small_detector(head: str = "fcos", **settings: Any) -> Detector:
    torch.manual_seed(0)
    options = head_class(head).Options(num_convs=1, norm_groups=4)
    return build_detector(options, "resnet10", 3, channels=16, **settings)


@pytest.mark.parametrize("head", ["fcos", "vfnet", "tood"])
def test_maps_are_the_features_behind_the_seam(head: str) -> None:
    block = {"align": True, "separate": True, "apply": "both", "reduction": 4}
    detector = small_detector(head, msil=block, min_size=64, max_size=96).eval()
    image = torch.randint(256, (3, 30, 50), dtype=torch.uint8)
    maps = tower_maps(detector, image)
    # 96 / 50 is the smaller scale: 58 x 96, padded to 64 x 96.
    assert (maps.extent, maps.size) == ((58, 96), (30, 50))
    assert [one.shape for one in maps.cls] == [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
    assert maps.offset == {"fcos": 0.5, "vfnet": 0.0, "tood": 0.0}[head]
    with torch.no_grad():
        cls_feats, reg_feats = detector.head.towers(detector.pyramid([detector.resized(image)]))
    for ours, feats in ((maps.cls, cls_feats), (maps.reg, reg_feats)):
        for one, feat in zip(ours, feats, strict=True):
            np.testing.assert_allclose(one, feat[0].abs().mean(0).numpy(), rtol=1e-6)
    for tower in ("cls", "reg"):
        merged = maps.at_pixels(tower, "merged")
        assert merged.shape == (30, 50) and merged.sum() == pytest.approx(1)
        assert (merged >= 0).all()


def test_a_detector_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="call eval"):
        tower_maps(small_detector(msil=None).train(), torch.zeros(3, 32, 32, dtype=torch.uint8))


def test_maps_lie_where_the_image_is_bright() -> None:
    maps = tower_maps(brightness(), bright_box())
    at_pixels = maps.at_pixels("cls", "P3")
    # Cells of 8 pixels: between the middle of the last dark one, x = 12, and of the first white one, 20, it rises.
    assert at_pixels[20, 30] == 255 and at_pixels[60, 70] == 0
    assert at_pixels[20, 15:17] == pytest.approx([255 * 3.5 / 8, 255 * 4.5 / 8])
    assert (maps.at_pixels("reg", "P4") == 1).all()
    large = maps.at_pixels("cls", "P3", (128, 160))
    assert large[41, 61] == 255 and large.shape == (128, 160)


def test_level_names() -> None:
    assert level_names((8, 16, 32, 64, 128)) == ("P3", "P4", "P5", "P6", "P7", "merged")


def row(image: Tensor, *detectors: Detector, side: int = CELL_SIDE) -> HeatmapRow:
    drawn = np.full((side * 4 // 5, side, 3), 200, dtype=np.uint8)
    return HeatmapRow(
        image, ("a.png", "ground truth: 1"), drawn, BOX.numpy(), [tower_maps(d, image) for d in detectors]
    )


def test_the_picture_is_red_where_the_map_is_highest_and_blue_where_lowest() -> None:
    image = bright_box()
    picture = draw_heatmaps([row(image, brightness())], ["one"], "P3").astype(int)
    scale = CELL_SIDE // 80  # whole: the image is small
    left = 8 + (CELL_SIDE + 8) + (CELL_SIDE - 80 * scale) // 2
    top = 2 * 8 + 19 + 2 * 19  # margins, the towers' names, and two lines of titles

    def at(y: int, x: int) -> np.ndarray:
        return picture[top + y * scale, left + x * scale]

    red, blue = at(24, 32), at(60, 76)
    assert red[0] > red[2] + 50 and blue[2] > blue[0] + 50
    # A flat map has no high place: all blue.
    flat = picture[top + 60 * scale, left + CELL_SIDE + 8 + 76 * scale]
    assert flat[2] > flat[0] + 50


def test_size_of_the_picture() -> None:
    image = bright_box()
    one = draw_heatmaps([row(image, brightness())], ["one"])
    three = draw_heatmaps([row(image, *[brightness()] * 3)] * 2, ["one", "two", "a name\nof two lines " * 20])
    assert one.dtype == np.uint8 and one.shape[1] == 8 + 3 * (CELL_SIDE + 8)
    assert three.shape[1] == 8 + 7 * (CELL_SIDE + 8)
    assert three.shape[0] > one.shape[0] + CELL_SIDE // 2
    with pytest.raises(ConfigError, match="no level 'P9': choose one of P3, P4, merged"):
        draw_heatmaps([row(image, brightness())], ["one"], "P9")


def test_energy_of_a_split() -> None:
    samples = [(bright_box(20), BOX), (bright_box(120), BOX), (bright_box(), torch.zeros(0, 4))]
    energy = split_energy({"weak": brightness(), "strong": brightness(3.0)}, samples)
    assert energy.shares.shape == (2, 2, 2, 3, 2) and energy.skipped == 1
    # 32 x 32 of 64 x 80 pixels; 3.2 pixels on either side of the outline: the centres of 3 pixels, so inside
    # 32 * 32 - 26 * 26, outside 4 * 32 * 3 and at each corner those of 3 x 3 within 3.2: all but (2.5, 2.5) and twice
    # (1.5, 2.5), at distances 3.54 and 2.92: 8.
    assert energy.uniform_mean("inside") == 32 * 32 / (64 * 80)
    assert energy.uniform_mean("border") == pytest.approx((32 * 32 - 26 * 26 + 4 * 32 * 3 + 4 * 8) / (64 * 80))
    for i in range(2):
        for region in REGIONS:  # the regression tower sees nothing
            assert energy.over_uniform(i, "reg", "merged", region).estimate == pytest.approx(0, abs=1e-12)
    weak, strong = (energy.mean(i, "cls", "P3", "inside").estimate for i in (0, 1))
    assert energy.uniform_mean("inside") < weak < strong < 1
    difference = energy.difference(1, "cls", "P3", "inside")
    assert difference.estimate == pytest.approx(strong - weak) and difference.low > 0
    assert energy.difference(0, "cls", "P3", "inside").high == 0
    merged = [energy.mean(0, "cls", level, "border").estimate for level in energy.levels]
    assert merged[2] == pytest.approx((merged[0] + merged[1]) / 2)


def test_table_and_json() -> None:
    energy = split_energy({"weak": brightness(), "strong": brightness(3.0)}, [(bright_box(20), BOX)] * 3)
    lines = energy_lines(energy)
    assert lines[0] == "share of a map's energy inside the boxes, percent, 3 images"
    assert lines[1].split("  ")[-1].strip() == "strong - weak [95 %]"
    assert lines[2].startswith("cls  P3") and lines[5].startswith("reg  P3") and " 20.0 " in lines[2]
    # Three equal images: intervals of no width, starred where they are not zero, which a flat map's is but for
    # rounding.
    assert lines[2].count("*") == 2 + 1 and "*" not in lines[5]
    content = energy_json(energy)
    assert (content["images"], content["border"], len(content["rows"])) == (3, 0.1, 2 * 2 * 3)
    first = content["rows"][0]
    assert (first["region"], first["tower"], first["level"]) == ("inside", "cls", "P3")
    assert first["uniform"] == pytest.approx(0.2)
    assert set(first["shares"]) == {"weak", "strong"} and set(first["differences_to_first"]) == {"strong"}
    assert set(first["shares"]["weak"]) == {"estimate", "low", "high"}


def test_splits_and_detectors_that_cannot_be_compared() -> None:
    with pytest.raises(DataError, match="no image of the split has a box"):
        split_energy({"one": brightness()}, [(bright_box(), torch.zeros(0, 4))])
    other = Brightness()
    other.strides = (8, 16, 32)
    with pytest.raises(ConfigError, match="different pyramid levels"):
        split_energy({"one": brightness(), "other": cast(Detector, other)}, [(bright_box(), BOX)])
