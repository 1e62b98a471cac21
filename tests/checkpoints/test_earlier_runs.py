"""load_detector on checkpoints of an earlier version's runs: FCOS and VFNet with MSIL, on ResNet-10.

files/NAME.ckpt: last.ckpt of `schedule=smoke`, whose tensors repeat their first numbers to save space, and under
"expected" what that version put out for the image below.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from msil.checkpoints.load import load_detector

from .cases import image


@pytest.mark.parametrize("head", ["fcos", "vfnet"])
def test_a_checkpoint_of_an_earlier_run_loads_and_puts_out_the_same(head: str) -> None:
    file = Path(__file__).parent / "files" / f"{head}.ckpt"
    detector, description = load_detector(file)
    content = torch.load(file, weights_only=True)
    own = detector.state_dict()
    assert content["state_dict"].keys() == {f"detector.{key}" for key in own}
    assert all(torch.equal(own[key.removeprefix("detector.")], value) for key, value in content["state_dict"].items())
    assert description.classes == ("circle", "square", "triangle", "cross")
    assert (description.min_size, description.max_size, description.source) == (64, 64, f"run {head}")
    assert description.model.msil.apply == "both" and description.model.head["name"] == head
    with torch.no_grad():
        found = detector([image(size=(64, 64))])
    for name, expected in content["expected"].items():
        torch.testing.assert_close(getattr(found, name), expected, rtol=1e-4, atol=1e-5)
