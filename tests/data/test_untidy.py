"""Exports in which more lies than they hold, or less, or under other names."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.data.exports import BOXES, EXPORTS, auto
from tests.data.files import write_jpeg

from msil.data.fingerprint import fingerprint
from msil.data.module import build_split
from msil.finished import title
from msil.runs import CONFIG, DETECTIONS


@pytest.mark.parametrize("name", ["label_img_yolo", "label_studio_yolo"])
def test_pictures_that_the_program_wrote_are_no_data(tmp_path: Path, name: str) -> None:
    EXPORTS[name][0](tmp_path)
    before = fingerprint(auto(tmp_path), ["train"])
    place = tmp_path / "images" if name == "label_studio_yolo" else tmp_path
    for folder, file in (("drawn", DETECTIONS), ("runs/one", CONFIG), ("figures", "data.png")):
        write_jpeg(place / folder / "sub" / "img 00.jpg", 8, 8)
        (place / folder / file).write_text(f"{title({})}\n")
    write_jpeg(tmp_path / "photos" / "img 00.jpg", 8, 8)
    if name == "label_img_yolo":
        shutil.rmtree(tmp_path / "photos")  # its images lie in the folder itself
    assert fingerprint(auto(tmp_path), ["train"]) == before
    (place / "figures/data.png").unlink()
    (place / "runs/one" / CONFIG).write_text("min_size: 3\n")
    assert len(build_split(auto(tmp_path), "train")) == len(BOXES) + 2  # the user's own
