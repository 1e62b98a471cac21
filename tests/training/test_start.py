"""What a run prints before its first step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.data.exports import EXPORTS
from tests.data.files import coco_content, read_coco, write_coco

from msil.data.annotations import AnnotatedImages, range_warning
from msil.interruption import Interruption
from msil.training.build import build
from msil.training.faults import FiniteSteps
from msil.training.start import crowded, start_lines, warn

from .cases import tiny_config


def test_four_lines_and_what_may_not_be_meant(tmp_path: Path, shapes: Path) -> None:
    settings = ("data.val_split=train", "data.max_dets=1", "data.filter_empty=false", "schedule.warmup_steps=50")
    config = tiny_config(tmp_path, shapes, *settings, "schedule.lr=0.01", "schedule.warmup_factor=0.1", "run_name=it")
    parts = build(config, tmp_path / "it", Interruption(), FiniteSteps())
    net, data, steps, folder = start_lines(parts)
    assert net.startswith("net     FCOS ResNet-10, MSIL reduction=4, ")
    assert net.endswith(" M parameters, from scratch, on cpu")
    assert data == "data    shapes, 16 training images, 16 validation images, 4 classes"
    # Of 8 steps 2: 0.1 of the lr, then all of it but for half a cosine's first eighth, (1 + cos(pi / 8)) / 2 = 0.96.
    assert steps == "steps   8 of 4 images, warm-up 2 (a quarter, not 50), peak lr 0.0096"
    assert folder == f"folder  {tmp_path}/it"
    with pytest.warns(UserWarning) as said:
        warn(parts)
    same, many = (str(one.message) for one in said)
    assert same.startswith("trained and evaluated on the same split, train")
    assert "validation images hold more than 1 objects of a class" in many and "set data.max_dets=" in many


def test_a_dim_16_bit_image(tmp_path: Path) -> None:
    write_coco(tmp_path, coco_content())
    for highest, dim in ((4095, True), (40000, False)):
        pixels = np.full((30, 40), highest, dtype=np.uint16)
        Image.fromarray(pixels).save(tmp_path / "train" / "a.jpg", format="PNG")
        assert ("nearly black" in range_warning(read_coco(tmp_path, "train"))) is dim
    annotations = read_coco(tmp_path, "train").annotations  # of 40000, which 12 bits make white
    assert "data.bits=12 makes all values" in range_warning(AnnotatedImages(annotations, bits=12))
    pixels = np.full((30, 40), 4000, dtype=np.uint16)  # 250 of 255 with 12 bits
    Image.fromarray(pixels).save(tmp_path / "train" / "a.jpg", format="PNG")
    assert not range_warning(AnnotatedImages(annotations, bits=12))


def test_crowded_images_by_class(tmp_path: Path) -> None:
    content = coco_content()  # image 5: a zebra, a cat, a dog as a crowd
    content["annotations"].append({"id": 104, "image_id": 5, "category_id": 3, "bbox": [0, 0, 9, 9]})
    write_coco(tmp_path, content)
    data = read_coco(tmp_path, "train")
    assert (crowded(data, 1), crowded(data, 2)) == ((1, 2), (0, 2))


def test_a_layout_that_was_found_and_images_in_both_splits_are_said(tmp_path: Path) -> None:
    EXPORTS["cvat_coco"][0](tmp_path)
    (tmp_path / "annotations/instances_val.json").write_text(
        (tmp_path / "annotations/instances_default.json").read_text()
    )
    (tmp_path / "images/val").symlink_to("default")
    shapes_alone = (f"data.{name}=null" for name in ("num_train", "num_val", "image_size", "seed"))
    config = tiny_config(
        tmp_path / "runs", tmp_path, "data=auto", *shapes_alone, "data.train_split=default", "data.batch_size=12"
    )
    parts = build(config, tmp_path / "it", Interruption(), FiniteSteps())
    _, data, layout, *_ = start_lines(parts)
    assert data.startswith(
        f"data    {tmp_path.name[:40]}, 11 training images (1 without a box left out), 12 validation"
    )
    assert layout == f"layout  COCO json in annotations/: {tmp_path}/annotations/instances_default.json"
    parts.data.val.annotations.file_names[:2] = parts.data.train.annotations.file_names[3:5]  # pyright: ignore
    with pytest.warns(UserWarning) as said:
        warn(parts)
    both, batch = (str(one.message) for one in said)
    assert both.startswith("2 of 12 validation images are trained on too, such as images/default/img 03.jpg")
    assert batch.startswith("a step of 12 images takes some of the 11 training images twice")
