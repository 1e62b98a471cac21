"""Data made to harm: links out of the data set, pictures and annotation files that would fill the memory, pipes."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

import pytest
from PIL import Image

from msil.data.images import read_image
from msil.errors import DataError

from .files import coco_content, png, read_coco, read_voc, voc_object, voc_xml, write_coco, write_voc

CAT = voc_object("cat", 1, 1, 20, 20)


# Links


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    root = tmp_path / "coco"
    write_coco(root, coco_content())
    return root


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    root = tmp_path / "voc"
    write_voc(root, {"a": voc_xml(CAT), "b": voc_xml(CAT)})
    return root


def moved(path: Path, to: Path) -> Path:
    """Puts a link in the place of a file or folder, which goes elsewhere."""
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(path, to)
    path.symlink_to(to)
    return path


OUTSIDE = r"{path} leads by a symbolic link to {place}, outside the data set's folder {root}: "


@pytest.mark.parametrize("name", ["train/a.jpg", "train/sub", "JPEGImages/a.jpg", "Annotations/b.xml"])
def test_links_that_leave_the_set_are_refused(coco: Path, voc: Path, tmp_path: Path, name: str) -> None:
    root, kind = (coco, read_coco) if name.startswith("train") else (voc, read_voc)
    place = tmp_path / "elsewhere" / Path(name).name
    path = moved(root / name, place)
    with pytest.raises(DataError) as error:
        kind(root, "train")
    assert str(error.value).startswith(OUTSIDE.format(path=path, place=place, root=root))


def test_links_to_nothing_and_to_themselves_are_refused(coco: Path) -> None:
    image = coco / "train" / "a.jpg"
    image.unlink()
    image.symlink_to("nothing.jpg")
    with pytest.raises(DataError, match=r"a\.jpg is missing"):
        read_coco(coco, "train")
    image.unlink()
    image.symlink_to("a.jpg")
    with pytest.raises(DataError, match=r"a\.jpg cannot be read"):
        read_coco(coco, "train")


def test_links_that_stay_and_the_users_own_are_followed(coco: Path, voc: Path, tmp_path: Path) -> None:
    """Own: of the root, and of a split's folder, as on machines that keep images on another disk."""
    (coco / "train" / "c.jpg").unlink()
    (coco / "train" / "c.jpg").symlink_to("sub/b.jpg")
    moved(coco / "train" / "sub", coco / "val" / "sub")
    moved(coco / "train", tmp_path / "disk" / "train")
    (tmp_path / "own").symlink_to(coco)
    assert len(read_coco(tmp_path / "own", "train")) == 3
    for part in ("JPEGImages", "Annotations"):
        moved(voc / part, tmp_path / "disk" / part)
    (tmp_path / "own-voc").symlink_to(voc)
    assert len(read_voc(tmp_path / "own-voc", "train")) == 2


# Too much


def test_xml_of_100_mb_is_refused_before_it_is_parsed(voc: Path) -> None:
    file = voc / "Annotations" / "b.xml"
    file.write_bytes(b"<annotation>" + b"<object></object>" * (100 * 2**20 // 17) + b"</annotation>")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"b\.xml is 100 MB large, more than the 8 MB of any annotation file"):
        read_voc(voc, "train")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KB; parsed, it would take 1 GB
    file.unlink()


BILLION_LAUGHS = (
    "<!DOCTYPE x [<!ENTITY a0 'ha'>"
    + "".join(f"<!ENTITY a{i} '{f'&a{i - 1};' * 10}'>" for i in range(1, 10))
    + "]><annotation><object><name>&a9;</name></object></annotation>"
)
QUADRATIC = f"<!DOCTYPE x [<!ENTITY a '{'ha' * 50000}'>]><annotation><name>{'&a;' * 50000}</name></annotation>"
OUTER_FILE = (
    "<!DOCTYPE x [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><annotation><object><name>&a;</name></object></annotation>"
)


@pytest.mark.parametrize("bomb", [BILLION_LAUGHS, QUADRATIC, OUTER_FILE], ids=["billion", "quadratic", "file"])
def test_xml_entities_are_refused(voc: Path, bomb: str) -> None:
    (voc / "Annotations" / "b.xml").write_text(bomb)
    with pytest.raises(DataError, match=r"b\.xml is not safe and valid xml \(EntitiesForbidden"):
        read_voc(voc, "train")


def large(path: Path, width: int, height: int) -> None:
    """A whole picture that does decode, in a small file."""
    if path.suffix == ".png":
        path.write_bytes(png(width, height, 1, 0, [bytes((width + 7) // 8)] * height))
    else:
        Image.new("L", (width, height)).save(path)


@pytest.mark.parametrize("kind", ["png", "jpg", "bmp"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_100_megapixels_are_refused_from_the_header(coco: Path, kind: str) -> None:
    path = coco / "train" / f"a.{kind}"
    large(path, 10_000, 10_000)
    assert path.stat().st_size < 101 * 2**20
    content = coco_content()
    content["images"][0].update(file_name=path.name, width=10_000, height=10_000)
    write_coco(coco, content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    words = rf"image file .*a\.{kind} has 10000 x 10000 pixels, more than the 67 million that one image may have"
    with pytest.raises(DataError, match=words):
        read_coco(coco, "train")
    with pytest.raises(DataError, match=words):
        read_image(path)  # as `msil predict` does
    with pytest.raises(DataError, match=words):
        read_image(path, orientation=1)  # as training does: the file may have been replaced since the audit
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KB; decoded, it would take 300 MB


def test_a_header_that_lies_costs_nothing(tmp_path: Path) -> None:
    """2**31 - 1 pixels a side, and no pixels at all."""
    path = tmp_path / "a.png"
    path.write_bytes(png(2**31 - 1, 2**31 - 1, 8, 2, []))
    with pytest.raises(DataError, match=r"a\.png has far too many pixels, more than"):
        read_image(path)


# What is no file


def test_a_named_pipe_is_refused_not_waited_for(coco: Path, voc: Path) -> None:
    (coco / "train" / "a.jpg").unlink()
    os.mkfifo(coco / "train" / "a.jpg")
    with pytest.raises(DataError, match=r"a\.jpg cannot be read \(it is not a regular file\)"):
        read_coco(coco, "train")
    (voc / "Annotations" / "a.xml").unlink()
    os.mkfifo(voc / "Annotations" / "a.xml")
    with pytest.raises(DataError, match=r"a\.xml is not a regular file"):
        read_voc(voc, "train")
