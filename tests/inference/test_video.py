"""Videos in and out, where PyAV is installed: frames, their order, what is written, what is said of damaged ones."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from msil.detection import Detections, Detector
from msil.errors import DataError
from msil.inference import video
from msil.inference.predict import predict_files
from msil.inference.video import read_frames

av = pytest.importorskip("av", reason='needs pip install -e ".[video]"')

LEVELS = [20, 60, 100, 140, 180, 220]  # the gray of the frames


class Bright(torch.nn.Module):
    """Finds one cat, as high as the image and 10 pixels wide, whose score is the image's mean over 255."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def predict(self, images: list[Tensor]) -> list[Detections]:
        return [
            Detections(
                torch.tensor([[0.0, 0, 10, image.shape[1]]]), image.float().mean()[None] / 255, torch.tensor([0])
            )
            for image in images
        ]


def predict(source: Path, out: Path, **options: Any) -> dict[str, Any]:
    detector = cast(Detector, Bright())
    return predict_files(detector, ["cat"], [source], out, checkpoint="x.ckpt", **{"threshold": 0.0, **options})


def film(path: Path, width: int = 400, height: int = 300, levels: list[int] = LEVELS) -> Path:
    path.parent.mkdir(exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for level in levels:
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("name", ["a.mp4", "a.AVI"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_video(tmp_path: Path, name: str, batch_size: int) -> None:
    out = tmp_path / "out"
    film(tmp_path / "in" / name, 400, 300)
    content = predict(tmp_path / "in", out, form="yolo", batch_size=batch_size)
    assert content == json.loads((out / "detections.json").read_text()) and content["failed"] == []
    found = [(image["file"], image["frame"], image["seconds"], image["width"]) for image in content["images"]]
    assert found == [(name, place, place / 10, 400) for place in range(6)]
    scores = [image["detections"][0]["score"] for image in content["images"]]
    assert scores == pytest.approx([level / 255 for level in LEVELS], abs=0.02)
    drawn = out / ("a.mp4" if name == "a.mp4" else "a.AVI.mp4")
    assert video.describe(drawn) == (6, Fraction(10))
    frames = [image for _, image in read_frames(drawn)]
    assert [frame.shape for frame in frames] == [(3, 300, 400)] * 6
    assert [frame[:, :, 200:].float().mean() for frame in frames] == pytest.approx(
        LEVELS, abs=15
    )  # lossy, and 40 apart
    assert (out / "yolo" / "a_000005.txt").read_text().startswith("0 0.012500 0.500000 0.025000 1.000000")
    assert not list(out.glob(".*"))


def test_videos_and_images_together(tmp_path: Path) -> None:
    film(tmp_path / "in" / "a.mp4")
    Image.new("RGB", (400, 300)).save(tmp_path / "in" / "b.png")
    film(tmp_path / "in" / "c.mp4", 100, 50, LEVELS[:3])  # drawn six times as large
    found = predict(tmp_path / "in", tmp_path / "out", batch_size=4, form="coco")["images"]
    assert [(one["file"], one.get("frame")) for one in found] == [
        *(("a.mp4", place) for place in range(6)), ("b.png", None), *(("c.mp4", place) for place in range(3)),
    ]  # fmt: skip
    assert [image.shape for _, image in read_frames(tmp_path / "out" / "c.mp4")] == [(3, 300, 600)] * 3
    assert len(list(read_frames(tmp_path / "out" / "a.mp4"))) == 6
    images = json.loads((tmp_path / "out" / "coco_images.json").read_text())["images"]
    assert images[-1] == {"id": 10, "file_name": "c.mp4", "frame": 2, "width": 100, "height": 50}


def test_a_turned_video_is_upright(tmp_path: Path) -> None:
    plain = film(tmp_path / "a.mp4")
    content = plain.read_bytes()

    def matrix(*values: int) -> bytes:
        return b"".join(value.to_bytes(4, "big", signed=True) for value in (*values, 0, 0, 1 << 30))

    one = 1 << 16
    at = content.rindex(matrix(one, 0, 0, 0, one, 0))  # of the track; a quarter turn clockwise, as telephones write
    turned = tmp_path / "b.mp4"
    turned.write_bytes(content[:at] + matrix(0, one, 0, -one, 0, 0) + content[at + 36 :])
    for (_, image), (_, expected) in zip(read_frames(turned), read_frames(plain), strict=True):
        assert torch.equal(image, expected.rot90(-1, (1, 2)))


def test_damaged_videos(tmp_path: Path) -> None:
    whole = film(tmp_path / "in" / "a.mkv").read_bytes()
    (tmp_path / "in" / "a.mkv").write_bytes(whole[: len(whole) * 6 // 10])
    with pytest.warns(UserWarning, match=r"a\.mkv lasts 0\.6 s, but its pictures end after 0\.[1-5] s"):
        content = predict(tmp_path / "in", tmp_path / "out")
    assert 0 < len(content["images"]) < 6
    (tmp_path / "in" / "a.mkv").write_bytes(b"no video")
    with pytest.raises(DataError, match=r"a\.mkv is truncated, damaged or of an unknown kind"):
        predict(tmp_path / "in", tmp_path / "out")


def test_a_drawn_video_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Bright, images: list[Tensor]) -> list[Detections]:
        if images[0].float().mean() > 120:
            raise KeyboardInterrupt
        return found(self, images)

    found = Bright.predict
    monkeypatch.setattr(Bright, "predict", stop)
    with pytest.raises(KeyboardInterrupt):
        predict(film(tmp_path / "a.mp4"), tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["detections.json"]
    assert len(json.loads((tmp_path / "out" / "detections.json").read_text())["images"]) == 3


def test_frames_without_an_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "ENCODERS", ("no such encoder",))
    predict(film(tmp_path / "a.mp4"), tmp_path / "out")
    folder = tmp_path / "out" / "a.mp4.frames"
    assert sorted(file.name for file in folder.iterdir()) == [f"{place:06d}.jpg" for place in range(6)]
    assert Image.open(folder / "000005.jpg").size == (400, 300)
