"""Heat maps of the towers: what they show, where, and the energy of whole splits."""

from __future__ import annotations

import json
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
from msil.reporting.figures.heatmaps import (
    CELL_SIDE,
    HeatmapRow,
    draw_heatmaps,
    energy_json,
    energy_table,
    heatmap_row,
    split_energy,
    tower_maps,
)
from msil.reporting.tables import to_text

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


def test_a_detector_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="call eval"):
        tower_maps(small_detector(msil=None).train(), torch.zeros(3, 32, 32, dtype=torch.uint8))


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
    regions = np.random.default_rng(0).random((2, 30, 50)) < 0.3
    for tower in ("cls", "reg"):
        merged = maps.at_pixels(tower, "merged")
        assert merged.shape == (30, 50) and merged.sum() == pytest.approx(1)
        assert (merged >= 0).all()
        assert maps.shares(tower, regions)[-1] == pytest.approx([merged[region].sum() for region in regions])


def test_maps_lie_where_the_image_is_bright() -> None:
    maps = tower_maps(brightness(), bright_box())
    at_pixels = maps.at_pixels("cls", "P3")
    # Cells of 8 pixels: between the middle of the last dark one, x = 12, and of the first white one, 20, it rises.
    assert at_pixels[20, 30] == 255 and at_pixels[60, 70] == 0
    assert at_pixels[20, 15:17] == pytest.approx([255 * 3.5 / 8, 255 * 4.5 / 8])
    assert (maps.at_pixels("reg", "P4") == 1).all()
    large = maps.at_pixels("cls", "P3", (128, 160))
    assert large[41, 61] == 255 and large.shape == (128, 160)


def row(image: Tensor, *detectors: Detector) -> HeatmapRow:
    named = {str(i): detector for i, detector in enumerate(detectors)}
    return heatmap_row(named, image, ("$a_{.png", "ground truth: 1"), BOX, [0], ["$x"])  # no formula


def test_the_picture_is_red_where_the_map_is_highest_and_blue_where_lowest() -> None:
    picture = draw_heatmaps([row(bright_box(), brightness())], ["one"], "P3").astype(int)
    assert picture.shape[1] == 3 * CELL_SIDE
    red, blue = (picture[..., one] - picture[..., other] > 60 for one, other in ((0, 2), (2, 0)))
    maps = slice(CELL_SIDE, 2 * CELL_SIDE)  # of the classification tower; the colours of the bar are below
    top = np.flatnonzero(blue[:, maps].any(axis=1))
    upper = red[top[0] : top[0] + 100, maps], red[top[0] + 150 : top[0] + 200, maps]  # the box is in the upper part
    assert upper[0].sum() > 2000 and not upper[1].any()
    # A flat map has no high place: all blue.
    assert not red[top[0] : top[0] + 200, 2 * CELL_SIDE :].any()
    with pytest.raises(ConfigError, match="no level 'P9': choose one of P3, P4, merged"):
        draw_heatmaps([row(bright_box(), brightness())], ["one"], "P9")


def test_energy_of_a_split() -> None:
    samples = [(bright_box(20), BOX), (bright_box(120), BOX), (bright_box(), torch.zeros(0, 4))]
    energy = split_energy({"weak": brightness(), "strong": brightness(3.0)}, samples)
    assert energy.shares.shape == (2, 2, 2, 3, 2) and energy.skipped == 1
    rows = {(one["region"], one["tower"], one["level"]): one for one in energy_table(energy).rows}
    inside, border = (rows[words, "cls", "P3"] for words in ("inside", "border"))
    # 32 x 32 of 64 x 80 pixels; 3.2 pixels on either side of the outline: the centres of 3 pixels, so inside
    # 32 * 32 - 26 * 26, outside 4 * 32 * 3 and at each corner those of 3 x 3 within 3.2: all but (2.5, 2.5) and twice
    # (1.5, 2.5), at distances 3.54 and 2.92: 8.
    assert inside["uniform"] == 32 * 32 / (64 * 80)
    assert border["uniform"] == pytest.approx((32 * 32 - 26 * 26 + 4 * 32 * 3 + 4 * 8) / (64 * 80))
    for words in ("inside", "border"):  # the regression tower sees nothing
        for name in ("weak", "strong"):
            assert rows[words, "reg", "merged"][f"{name} over uniform"][0] == pytest.approx(0, abs=1e-12)
    assert inside["uniform"] < inside["weak"][0] < inside["strong"][0] < 1
    estimate, low, _ = inside["strong - weak"]
    assert estimate == pytest.approx(inside["strong"][0] - inside["weak"][0]) and low > 0


def test_energy_as_text_and_json() -> None:
    energy = split_energy({"weak": brightness(), "strong": brightness(3.0)}, [(bright_box(20), BOX)] * 3)
    text = to_text(energy_table(energy))
    rows = [line.split() for line in text.splitlines() if line.startswith(("inside", "border "))]
    assert len(rows) == 2 * 2 * 3 and rows[0][:4] == ["inside", "cls", "P3", "20.0"]
    # Three equal images: intervals of no width, starred where they are not zero, which a flat map's is but for
    # rounding.
    assert [sum("*" in part for part in rows[i]) for i in (0, 3)] == [2 + 1, 0]
    content = json.loads(json.dumps(energy_json(energy)))
    assert (content["images"], content["border"], len(content["rows"])) == (3, 0.1, 2 * 2 * 3)
    assert content["rows"][0]["uniform"] == pytest.approx(0.2) and len(content["rows"][0]["strong - weak"]) == 3


def test_splits_and_detectors_that_cannot_be_compared() -> None:
    with pytest.raises(DataError, match="no image of the split has a box"):
        split_energy({"one": brightness()}, [(bright_box(), torch.zeros(0, 4))])
    other = Brightness()
    other.strides = (8, 16, 32)
    with pytest.raises(ConfigError, match="different pyramid levels"):
        split_energy({"one": brightness(), "other": cast(Detector, other)}, [(bright_box(), BOX)])
