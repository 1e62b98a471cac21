"""What the parts share: sizes, checks that each leave a row, nets and scenes, clocks."""

from __future__ import annotations

import itertools
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.compare import Row
from benchmarks.scenes import IMAGE, ground_truth
from msil.detection import Detector, ResNetOptions, Target, build_detector
from msil.detection.heads import HEADS

EAGER, DEFAULT, REDUCED = "eager", "default", "reduce-overhead"  # the latter two: of torch.compile


@dataclass(frozen=True)
class Setup:
    """All sizes. size: of images. batch: the most images a step. rounds: in which each way has
    its turn of images_a_turn. uncounted: the first steps of a turn. small: of nets for correctness alone. anchors:
    torchvision's FCOS has its turn too."""

    device: str = "cuda"
    size: tuple[int, int] = IMAGE
    batch: int = 8
    backbone: str = "resnet50"
    channels: int = 256
    rounds: int = 3
    images_a_turn: int = 40
    uncounted: int = 3
    small: tuple[int, int] = (128, 160)
    anchors: bool = True

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def accelerator(self) -> str:
        return f"trainer.accelerator={'gpu' if self.on_gpu else 'cpu'}"


SETUP = Setup()
TOY = Setup("cpu", (64, 96), 2, "resnet18", 32, 1, 1, 1, (64, 96))


def emit(ok: bool, **row: Any) -> None:
    # At once, at the beginning of a line: other threads and processes write there too.
    sys.stdout.write("\n@@" + json.dumps({"ok": ok, **row}, default=str) + "\n")
    sys.stdout.flush()


def emit_rows(name: str, rows: Iterable[Row]) -> None:
    """Of the table of docs/performance.md; a failure among them is one row more."""
    try:
        for row in rows:
            print(row.line(), flush=True)
            emit(row.ours != "failed", row=asdict(row))
    except Exception as error:
        emit(False, row=asdict(failed(name, error)))


def failed(name: str, error: Exception) -> Row:
    return Row(name, "failed", "", None, "", False, ending(error))


def ending(error: Exception) -> str:
    """The error, and where it came from; the whole traceback goes into the log."""
    traceback.print_exc(file=sys.stderr)
    places = traceback.extract_tb(error.__traceback__)[-4:]
    where = " < ".join(f"{place.filename.rsplit('/', 1)[-1]}:{place.lineno}" for place in reversed(places))
    return f"{type(error).__name__}: {str(error).strip()[:500]} ({where})"


def check(name: str, act: Callable[..., tuple[bool, Any]], *arguments: Any) -> None:
    """act returns whether it is right, and what was found."""
    began = time.monotonic()
    try:
        right, detail = act(*arguments)
    except Exception as error:
        right, detail = False, ending(error)
    emit(bool(right), check=name, detail=detail, s=round(time.monotonic() - began, 1))


def exact() -> None:
    """Float32 as float32: no TF32 anywhere."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def off(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest value of `theirs`."""
    ours, theirs = ours.detach().double().cpu(), theirs.detach().double().cpu()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)) if theirs.numel() else 0.0


def built(setup: Setup, head: str, kernel_size: int | None = None, backbone: Any = None) -> Detector:
    """80 classes, ResNet with frozen norms. kernel_size: of MSIL; None: without."""
    torch.manual_seed(0)
    options = HEADS[head].Options()
    if options.norm_groups is not None:
        options = replace(options, norm_groups=setup.channels // 8)
    msil = None if kernel_size is None else {"kernel_size": kernel_size}
    body = backbone or ResNetOptions(setup.backbone, norm="frozen_bn", frozen_stages=1)
    return build_detector(options, body, 80, msil=msil, channels=setup.channels)


def prepared(detector: Detector, setup: Setup, mode: str) -> Detector:
    detector.to(setup.device).lay_out(channels_last=True)
    if mode != EAGER:
        detector.compile_parts(mode, frozen=not detector.training)
    return detector


@torch.no_grad()
def raise_scores(*heads: Any) -> None:
    """Scores above the threshold, and for FCOS boxes of some size, as random weights have neither."""
    for head in heads:
        if hasattr(head, "cls_logits"):
            head.cls_logits.bias.fill_(-2)
        if hasattr(head, "bbox_ctrness"):  # torchvision's
            head.bbox_reg.bias.fill_(4)


@dataclass(frozen=True)
class Scene:
    """A batch as ours takes it, uint8 with targets of the host, and as torchvision's does, all on the device."""

    images: list[Tensor]
    targets: list[Target]
    floats: list[Tensor]
    dicts: list[dict[str, Tensor]]


def scene(setup: Setup, batch: int, size: tuple[int, int] | None = None) -> Scene:
    size = size or setup.size
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (batch, 3, *size), dtype=torch.uint8, generator=generator).to(setup.device)
    targets = ground_truth(batch, 7, 80, size)
    dicts = [{"boxes": t.boxes.to(setup.device), "labels": t.labels.to(setup.device)} for t in targets]
    return Scene(list(images), targets, list(images / 255), dicts)


def autocast(setup: Setup, mixed: bool = True) -> torch.autocast:
    return torch.autocast(setup.device, torch.bfloat16, enabled=mixed)


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def milliseconds(setup: Setup, act: Callable[[], object], times: int = 10) -> float:
    """Of a call, the median of `times`, by the GPU's own clock: the host has the next one queued before."""
    if not setup.on_gpu:
        began = now()
        act()
        return 1000 * (now() - began)
    for _ in range(3):
        act()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    for mark in marks[:-1]:
        mark.record()
        act()
    marks[-1].record()
    torch.cuda.synchronize()
    spans = sorted(one.elapsed_time(next_) for one, next_ in itertools.pairwise(marks))
    return spans[times // 2]
