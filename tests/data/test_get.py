"""`msil data get`, from a server on this machine that serves small archives made here, and fails as servers do."""

from __future__ import annotations

import hashlib
import io
import re
import resource
import shutil
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from torchvision.datasets.voc import DATASET_YEAR_DICT

from msil.cli import main
from msil.data import download
from msil.data.annotations import AnnotatedImages
from msil.data.get import PUBLIC, get_data
from msil.data.module import build_split
from msil.errors import UserError
from msil.lock import locked

from .files import coco_content, voc_object, voc_xml, write_coco, write_voc

VOC_ARCHIVES = ("VOCtrainval_06-Nov-2007.tar", "VOCtest_06-Nov-2007.tar")


class Site:
    """files: what is served, by name. ranges: whether part of one is. cuts: after how many bytes the next answers are
    cut off. asked: what was asked for, as (name, Range or None)."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.ranges = True
        self.cuts: list[int] = []
        self.asked: list[tuple[str, str | None]] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name, asked = self.path.rpartition("/")[2], self.headers["Range"]
                site.asked.append((name, asked))
                if name not in site.files:
                    return self.send_error(404)
                content, start = site.files[name], 0
                if asked and site.ranges:
                    start = int(asked.removeprefix("bytes=").removesuffix("-"))
                    if start >= len(content):
                        self.send_response(416)
                        self.send_header("Content-Range", f"bytes */{len(content)}")
                        return self.end_headers()
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                end = start + site.cuts.pop(0) if site.cuts else None
                self.wfile.write(content[start:end])
                return None

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def publish(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        """The set comes from here, with the checksums that the files have here."""
        public = PUBLIC[name]
        archives = tuple(
            archive._replace(
                url=f"{self.url}/{archive.name}",
                md5=archive.md5 and hashlib.md5(self.files[archive.name]).hexdigest(),
            )
            for archive in public.archives
        )
        monkeypatch.setitem(PUBLIC, name, public._replace(archives=archives))


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(download, "WAIT", 0.0)
    site = Site()
    thread = threading.Thread(target=site.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield site
    site.server.shutdown()
    thread.join()
    site.server.server_close()


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def tar(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return content.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return content.getvalue()


@pytest.fixture
def voc(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Published as voc2007, one image a split. Returns all files by their names below --root."""
    files: dict[str, bytes] = {}
    for archive, split, stem in zip(VOC_ARCHIVES, ("trainval", "test"), ("000001", "000002"), strict=True):
        folder = tmp_path / split
        write_voc(folder / "VOCdevkit/VOC2007", {stem: voc_xml(voc_object("cat", 3, 4, 20, 25))}, split)
        site.files[archive] = tar(tree(folder))
        files |= tree(folder)
    site.publish(monkeypatch, "voc2007")
    return files


@pytest.fixture
def coco(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Published as coco2017. Returns all files by their names below --root."""
    for split in ("train2017", "val2017"):
        write_coco(tmp_path / "made", coco_content(), split)
    files = tree(tmp_path / "made")
    for archive, folder in (
        ("annotations_trainval2017", "annotations"), ("train2017", "train2017"), ("val2017", "val2017"),
    ):  # fmt: skip
        site.files[f"{archive}.zip"] = zipped({name: data for name, data in files.items() if name.startswith(folder)})
    site.publish(monkeypatch, "coco2017")
    return files


def refusal(name: str, root: Path) -> str:
    with pytest.raises(UserError) as caught:
        list(get_data(name, root))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_published_is_torchvisions_table() -> None:
    archives = [*PUBLIC["voc2007"].archives, *PUBLIC["voc2012"].archives]
    known = [DATASET_YEAR_DICT[year] for year in ("2007", "2007-test", "2012")]
    assert [(one.url, one.md5) for one in archives] == [(one["url"], one["md5"]) for one in known]
    assert all(archive.md5 is None for archive in PUBLIC["coco2017"].archives)


def test_voc_is_fetched_once(
    site: Site, voc: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "got"
    assert main(["data", "get", "voc2007", "--root", str(root)]) == 0
    assert tree(root) == voc
    assert site.asked == [(name, None) for name in VOC_ARCHIVES]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"fetching {site.url}/{VOC_ARCHIVES[0]}"
    assert lines[1] == f"{VOC_ARCHIVES[0]}: 3 files unpacked."  # a list, an xml, an image

    assert main(["data", "get", "voc2007", "--root", str(root)]) == 0
    assert len(site.asked) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line == lines[-1]
    name, place, train, val = re.search(r"msil train data=(\w+) data.root=(\S+) \S+=(\w+) \S+=(\w+)$", line).groups()  # type: ignore
    for split in (train, val):
        found = build_split({"name": name, "root": place}, split)
        assert isinstance(found, AnnotatedImages) and len(found) == 1


def test_coco_is_fetched_and_what_is_missing_of_it_again(site: Site, coco: dict[str, bytes], tmp_path: Path) -> None:
    root = tmp_path / "got"
    list(get_data("coco2017", root))
    assert tree(root) == coco

    lost, corrected = root / "val2017/a.jpg", root / "val2017/c.jpg"
    lost.unlink()
    corrected.write_bytes(b"the user's own")
    site.asked.clear()
    lines = list(get_data("coco2017", root))
    assert site.asked == [("val2017.zip", None)]
    assert lines[0] == "annotations_trainval2017.zip: its files are there."
    assert "val2017.zip: 1 file unpacked; 1 of other sizes, which were there, are left as they were." in lines
    assert tree(root) == coco | {"val2017/c.jpg": b"the user's own"}


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_is_cut_is_made_again(
    site: Site, voc: dict[str, bytes], tmp_path: Path, ranges: bool
) -> None:
    site.ranges, site.cuts = ranges, [1000]
    list(get_data("voc2007", tmp_path / "got"))
    assert tree(tmp_path / "got") == voc
    assert site.asked == [(VOC_ARCHIVES[0], None), (VOC_ARCHIVES[0], "bytes=1000-"), (VOC_ARCHIVES[1], None)]


def test_the_next_command_goes_on_where_one_ended(site: Site, voc: dict[str, bytes], tmp_path: Path) -> None:
    root = tmp_path / "got"
    part = root / f"{VOC_ARCHIVES[0]}.part"
    site.cuts = [4000] + [0] * download.TRIES
    text = refusal("voc2007", root)
    assert f"the same command tries again and goes on from the 0.0 of 0.0 MB in {part}." in text
    assert part.read_bytes() == site.files[VOC_ARCHIVES[0]][:4000]
    assert len(site.asked) == 1 + download.TRIES
    list(get_data("voc2007", root))
    assert site.asked[1 + download.TRIES] == (VOC_ARCHIVES[0], "bytes=4000-")
    assert tree(root) == voc


@pytest.mark.parametrize("length", [0, 17])
def test_a_part_that_is_whole_is_not_fetched_and_one_too_long_is_from_the_start(
    site: Site, voc: dict[str, bytes], tmp_path: Path, length: int
) -> None:
    root = tmp_path / "got"
    root.mkdir()
    (root / f"{VOC_ARCHIVES[0]}.part").write_bytes(site.files[VOC_ARCHIVES[0]] + bytes(length))
    list(get_data("voc2007", root))
    assert tree(root) == voc
    assert site.asked[0] == (VOC_ARCHIVES[0], f"bytes={len(site.files[VOC_ARCHIVES[0]]) + length}-")
    again = [(VOC_ARCHIVES[0], None)] if length else []
    assert site.asked[1:] == [*again, (VOC_ARCHIVES[1], None)]


def test_a_server_that_always_cuts_at_the_same_byte_is_given_up(
    site: Site, voc: dict[str, bytes], tmp_path: Path
) -> None:
    site.ranges, site.cuts = False, [1000] * 100
    assert "cannot be fetched (the connection was closed)" in refusal("voc2007", tmp_path / "got")
    assert len(site.asked) == 1 + download.TRIES


def test_a_wrong_checksum(site: Site, voc: dict[str, bytes], tmp_path: Path) -> None:
    right = site.files[VOC_ARCHIVES[0]]
    site.files[VOC_ARCHIVES[0]] = right[:600] + bytes([right[600] ^ 1]) + right[601:]
    text = refusal("voc2007", tmp_path / "got")
    assert re.search(r"is not as published \(its MD5 is \w{32}, not \w{32}\): give the same command to fetch", text)
    assert tree(tmp_path / "got") == {}
    site.files[VOC_ARCHIVES[0]] = right
    list(get_data("voc2007", tmp_path / "got"))
    assert tree(tmp_path / "got") == voc


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/tmp/x", "..\\x", "C:\\x"])
def test_a_member_that_leaves_the_folder(
    site: Site, voc: dict[str, bytes], coco: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:  # fmt: skip
    site.files[VOC_ARCHIVES[0]] = tar({"a.txt": b"a", name: b"x"})
    site.publish(monkeypatch, "voc2007")
    site.files["annotations_trainval2017.zip"] = zipped({"a.txt": b"a", name: b"x"})
    before = set(tmp_path.iterdir())
    for public in ("voc2007", "coco2017"):
        assert f"(its member {name!r} would leave the folder)" in refusal(public, tmp_path / "got")
    assert tree(tmp_path / "got") == {} and set(tmp_path.iterdir()) == {*before, tmp_path / "got"}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_a_link_or_a_device(
    site: Site, voc: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: bytes
) -> None:
    content, entry = io.BytesIO(), tarfile.TarInfo("VOCdevkit")
    entry.type, entry.linkname = kind, "/tmp"
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(entry)
    site.files[VOC_ARCHIVES[0]] = content.getvalue()
    site.publish(monkeypatch, "voc2007")
    assert "(its member 'VOCdevkit' is neither a file nor a folder)" in refusal("voc2007", tmp_path / "got")


def test_a_damaged_zip(site: Site, coco: dict[str, bytes], tmp_path: Path) -> None:
    """COCO publishes no checksums; a zip has one of each of its files."""
    whole = site.files["val2017.zip"]
    place = whole.index(coco["val2017/c.jpg"]) + 50
    for damaged in (whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :], whole[:-30]):
        site.files["val2017.zip"] = damaged
        assert "val2017.zip is not as published (it is damaged: " in refusal("coco2017", tmp_path / "got")
    got = tree(tmp_path / "got")
    assert "val2017/c.jpg" not in got and got.items() <= coco.items()
    site.files["val2017.zip"] = whole
    list(get_data("coco2017", tmp_path / "got"))
    assert tree(tmp_path / "got") == coco


def test_an_archive_that_lacks_images(site: Site, coco: dict[str, bytes], tmp_path: Path) -> None:
    site.files["val2017.zip"] = zipped({"val2017/a.jpg": coco["val2017/a.jpg"]})
    assert "it lacks files: " in refusal("coco2017", tmp_path / "got")


def test_an_archive_put_there_by_hand_is_taken_and_stays(site: Site, voc: dict[str, bytes], tmp_path: Path) -> None:
    root = tmp_path / "got"
    root.mkdir()
    for name in VOC_ARCHIVES:
        (root / name).write_bytes(site.files[name])
    list(get_data("voc2007", root))
    assert site.asked == [] and tree(root) == voc | {name: site.files[name] for name in VOC_ARCHIVES}

    shutil.rmtree(root / "VOCdevkit")
    (root / VOC_ARCHIVES[1]).write_bytes(b"half")
    assert refusal("voc2007", root).endswith(f"replace {root / VOC_ARCHIVES[1]} by an intact copy.")
    assert (root / VOC_ARCHIVES[1]).read_bytes() == b"half"


def test_no_room(site: Site, voc: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, part = tmp_path / "got", f"{VOC_ARCHIVES[0]}.part"
    size = len(site.files[VOC_ARCHIVES[0]])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * size - 1))
    assert "there is no room for" in refusal("voc2007", root)
    assert tree(root) == {}

    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # the disk is full while it is fetched
    try:
        text = refusal("voc2007", root)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"there is no room for {root / part}" in text and "give the same command again" in text
    assert tree(root) == {part: site.files[VOC_ARCHIVES[0]][:4096]}
    list(get_data("voc2007", root))
    assert site.asked[-2] == (VOC_ARCHIVES[0], "bytes=4096-") and tree(root) == voc


def test_no_network(site: Site, voc: dict[str, bytes], tmp_path: Path) -> None:
    del site.files[VOC_ARCHIVES[0]]
    text = refusal("voc2007", tmp_path / "got")
    assert text == (
        f"{site.url}/{VOC_ARCHIVES[0]} cannot be fetched (404 Not Found): check the network; the same command tries "
        f"again. Or put the file, fetched elsewhere, into {tmp_path / 'got'}."
    )
    site.server.shutdown()
    site.server.server_close()
    assert "cannot be fetched ([Errno 111] Connection refused)" in refusal("voc2007", tmp_path / "got")


def test_a_folder_that_cannot_be_used(site: Site, voc: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert refusal("voc2007", tmp_path / "file").endswith(
        f"{tmp_path / 'file'} cannot be used (File exists): mend that, or name another folder with --root."
    )
    with locked(tmp_path / "got"):
        assert "another msil data get is filling" in refusal("voc2007", tmp_path / "got")
