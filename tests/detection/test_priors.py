"""Points and anchors against MMDetection's numbers, torchvision's anchors and hand arithmetic."""

from __future__ import annotations

from weakref import ref

import pytest
import torch
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import _default_anchorgen

from msil.detection.heads.retinanet import RATIOS, SCALES
from msil.detection.priors import PriorGenerator

from .cases import MAP_SIZES, STRIDES, map_sizes_of

CPU = torch.device("cpu")
GENERATORS = {
    "atss": PriorGenerator(STRIDES, scales=(8.0,)),
    "retina": PriorGenerator(STRIDES, scales=SCALES, ratios=RATIOS),
}


@pytest.mark.parametrize("name", GENERATORS)
def test_anchors_of_the_reference(golden, name: str) -> None:
    generator, case = GENERATORS[name], golden("primitives", f"anchors/{name}/")
    priors = generator(MAP_SIZES, CPU)
    for level, ((height, width), start) in enumerate(zip(MAP_SIZES, priors.grid.starts.tolist(), strict=True)):
        base = case[f"base/{level}"]
        assert torch.equal(priors.boxes[start : start + len(base)], base) and len(base) == generator.per_cell
        if level == 2:
            assert torch.equal(priors.boxes[start : start + height * width * len(base)], case["level2"])
    valid = priors.valid(torch.tensor([[210, 275], [256, 320]]))
    expected = torch.cat([case[f"valid_img1/{level}"] for level in range(5)])
    assert torch.equal(valid[0], expected) and not expected.all()
    assert valid[1].all()


def test_whole_anchors_are_torchvisions() -> None:
    generator = PriorGenerator(STRIDES, scales=SCALES, ratios=RATIOS, whole=True)
    # Sides that all strides divide: else torchvision's strides are not those of its levels.
    maps = [torch.zeros(1, 1, *size) for size in map_sizes_of(256, 384)]
    (theirs,) = _default_anchorgen()(ImageList(torch.zeros(1, 3, 256, 384), [(256, 384)]), maps)
    assert torch.equal(generator(map_sizes_of(256, 384), CPU).boxes, theirs)


def test_priors_by_hand() -> None:
    # sides 8 x 8 of ratio 1, 4 x 16 of ratio 4 (its height over its width); then 20 x 20 and 10 x 40
    priors = PriorGenerator((4, 10), offset=0.5, scales=(2.0,), ratios=(1.0, 4.0))(((1, 2), (2, 1)), CPU)
    centers = [[2, 2], [2, 2], [6, 2], [6, 2], [5, 5], [5, 5], [5, 15], [5, 15]]
    assert priors.centers.tolist() == centers
    halves = [[4, 4], [2, 8]] * 2 + [[10, 10], [5, 20]] * 2
    assert priors.boxes.tolist() == [
        [x - w, y - h, x + w, y + h] for (x, y), (w, h) in zip(centers, halves, strict=True)
    ]
    assert priors.strides.tolist() == [4] * 4 + [10] * 4
    grid = priors.grid
    assert grid.strides.tolist() == [4, 10] and grid.per_cell == 2
    assert (grid.heights.tolist(), grid.widths.tolist(), grid.starts.tolist()) == ([1, 2], [2, 1], [0, 4])

    chosen = priors.at(torch.tensor([[5, 0], [2, 7]]))
    assert chosen.centers.tolist() == [[[5, 5], [2, 2]], [[6, 2], [5, 15]]]
    assert chosen.strides.tolist() == [[10, 4], [4, 10]]
    assert chosen.boxes[1, 1].tolist() == [0, -5, 10, 35]


def test_priors_first_made_in_inference_mode_serve_training() -> None:
    sizes = ((3, 7), (2, 5))  # no other test uses these, so nothing is cached yet
    with torch.inference_mode():
        PriorGenerator((8, 16), 0.5)(sizes, CPU)
    weight = torch.ones((), requires_grad=True)
    (PriorGenerator((8, 16), 0.5)(sizes, CPU).centers * weight).sum().backward()  # inference tensors raise here
    assert weight.grad is not None


def test_few_sizes_stay_in_the_cache() -> None:
    """Of anchors of 6 MB each, less than half a gigabyte."""
    generator = PriorGenerator((8,), offset=0.25)  # of no other test
    made = [ref(generator(((1, width),), CPU).boxes) for width in range(1, 301)]
    assert 0 < sum(boxes() is not None for boxes in made) * 6 < 500
