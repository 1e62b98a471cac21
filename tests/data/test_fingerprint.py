"""A split's digests change with its own annotations and images, and with nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.data.files import coco_content, voc_object, voc_xml, write_coco, write_jpeg, write_voc

from msil.data.fingerprint import differing, fingerprint


def changes(root: Path, name: str, before: dict[str, dict[str, str]]) -> str:
    return differing(before, fingerprint({"name": name, "root": str(root)}, ["train"]))


@pytest.mark.parametrize("name", ["coco", "voc"])
def test_what_changes_a_splits_digests(tmp_path: Path, name: str) -> None:
    cat, dog = voc_xml(voc_object("cat", 1, 1, 9, 9)), voc_xml(voc_object("dog", 1, 1, 9, 9))
    if name == "coco":
        annotations, image = write_coco(tmp_path, coco_content()), tmp_path / "train/sub/b.jpg"
        other, stray = write_coco(tmp_path, coco_content(), "val"), tmp_path / "train/stray.jpg"
    else:
        write_voc(tmp_path, {"a": cat, "b": cat})
        annotations, image = tmp_path / "Annotations/b.xml", tmp_path / "JPEGImages/b.jpg"
        write_voc(tmp_path, {"c": cat}, "val")
        other, stray = tmp_path / "Annotations/c.xml", tmp_path / "JPEGImages/d.jpg"
    before = fingerprint({"name": name, "root": str(tmp_path)}, ["train"])

    write_jpeg(stray, 40, 30)  # that no split lists
    other.write_text(other.read_text().replace("cat", "dog"))
    assert changes(tmp_path, name, before) == ""
    content, pixels = annotations.read_text(), image.read_bytes()
    annotations.write_text(dog if name == "voc" else content.replace("zebra", "horse"))
    assert changes(tmp_path, name, before) == "the annotations of train"
    annotations.write_text(content)
    image.write_bytes(pixels + b" ")
    assert changes(tmp_path, name, before) == "the images of train"
    image.unlink()
    assert "the images of train" in changes(tmp_path, name, before)
