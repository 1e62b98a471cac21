"""Video files through PyAV: frames in, drawn frames out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msil.errors import DataError, install
from msil.reporting.figures.pictures import image_bytes
from msil.runs import replacing, write_bytes

VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv")
ENCODERS = ("libx264", "mpeg4")  # the first that PyAV has: it comes with both, a build of one's own may not
QUALITY = {"flags": "+qscale", "global_quality": str(3 * 118)}  # for mpeg4, whose own is poor: scale 3 of 1 to 31
RATE = 25  # frames a second, where the file does not say


def read_frames(path: Path) -> Iterator[tuple[float, Tensor]]:
    """The frames of a video, upright: the time stamp in seconds, and (3, H, W) uint8 RGB.

    Warns where they end before the time that the file says it lasts: most kinds of file end without an error where
    they are cut. Raises DataError, naming the file, if PyAV is missing, or the file is no video, damaged or cut.
    """
    av, done, seconds = _pyav(path), 0, 0.0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"video file {path} holds no pictures: take it out.")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                seconds = float(done / _rate(stream) if frame.time is None else frame.time)
                done += 1
                pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                yield seconds, torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
            lasts, ends = (container.duration or 0) / av.time_base, seconds + 1 / float(_rate(stream))
            if ends < 0.9 * lasts:  # sound may go on for a little longer
                warnings.warn(
                    f"video file {path} lasts {lasts:.1f} s, but its pictures end after {ends:.1f} s, {done} frames: "
                    "replace it with an intact copy if more were filmed",
                    stacklevel=2,
                )
    except av.error.FFmpegError as error:
        raise DataError(
            f"video file {path} is truncated, damaged or of an unknown kind after {done} frames "
            f"({error.strerror or type(error).__name__}): replace it with an intact copy."
        ) from error


def describe(path: Path) -> tuple[int, Fraction]:
    """Frames of a video, 0 if the file does not say, and frames a second. Raises DataError as read_frames does."""
    av = _pyav(path)
    try:
        with av.open(str(path)) as container:
            streams = container.streams.video
            return (streams[0].frames, _rate(streams[0])) if streams else (0, Fraction(RATE))
    except av.error.FFmpegError as error:
        raise DataError(
            f"video file {path} cannot be read ({error.strerror or type(error).__name__}): replace it with an intact "
            "copy."
        ) from error


@contextmanager
def drawn_video(path: Path, rate: Fraction) -> Iterator[Callable[[np.ndarray], None]]:
    """Yields what takes the frames, uint8 (H, W, 3) RGB, one after the other; the MP4 file is there at the end.

    On an error it is not. Frames follow each other evenly at `rate` a second; an odd side gets one more row or column,
    which video formats ask for. Without an encoder each frame is an image in the folder <path>.frames.
    """
    av = _pyav(path)
    encoder = next((name for name in ENCODERS if name in av.codecs_available and _encodes(av, name)), None)
    if encoder is None:
        numbers = count()
        yield lambda picture: write_bytes(
            path.with_name(f"{path.name}.frames") / f"{next(numbers):06d}.jpg", image_bytes(picture, "JPEG", quality=95)
        )
        return
    with replacing(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream(encoder, rate=rate, pix_fmt="yuv420p", options=QUALITY)

        def write(picture: np.ndarray) -> None:
            height, width = picture.shape[:2]
            even = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), "edge")
            if not stream.codec_context.is_open:
                stream.height, stream.width = even.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))

        yield write
        container.mux(stream.encode())


def _encodes(av: Any, name: str) -> bool:
    try:
        return bool(av.codec.Codec(name, "w"))
    except av.codec.codec.UnknownCodecError:
        return False


def _rate(stream: Any) -> Fraction:
    return Fraction(stream.average_rate or RATE).limit_denominator(1001)


def _pyav(path: Path) -> Any:
    try:
        import av  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise DataError(f"{path} is a video, which needs PyAV: {install('video')}.") from None
    return av
