"""G1 to G5, and P4 on a GPU: FCOS with ResNet-50 at 800 x 1344 in bf16 and channels last, against torchvision's FCOS.

    python -m benchmarks.gpu_training

Wall time of whole training steps of `python run.py`'s own module and callbacks, between two waits for the device; data
lie on the device. torchvision's runs as shipped (float32) and, better than shipped, in bf16 and channels last; the nets
hold the same weights. G1: images/s against torchvision's. G2: images/s, and the share of what an H100's memory and
matrix units would allow. G3: a step as one CUDA graph at 2 images, where the host is the limit. G4: peak memory.
G5: images/s from images to detections. P4: the same steps raise no error under set_sync_debug_mode("error"). A part
that fails says so in its row, and the others go on.
"""

from __future__ import annotations

import gc
import logging
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torchvision.models.detection import FCOS

from benchmarks.compare import NotRun, Row, run
from benchmarks.gpu_ways import Setup, Way, our_training, shipped, their_training
from benchmarks.host_syncs import settings
from benchmarks.nets import detector_like
from benchmarks.wall_clock import WallClock, medians
from msil.detection import Detector, build_detector
from msil.training import experiment
from msil.training.module import DetectionModule

PRECISION = "bf16-mixed"
# Images/s of a training step on an H100 by its memory and matrix units: each operator by itself, and all fused.
ROOFLINE = {"eager": 191, "compiled": 317}
AT_LEAST = {"eager": 115, "compiled": 160}  # images/s
LARGE, SMALL = 8, 2  # images a step


def ours(setup: Setup) -> Detector:
    """With torchvision's weights."""
    return detector_like(shipped(setup))


def other(setup: Setup, head: str, msil: dict[str, Any] | None) -> Detector:
    torch.manual_seed(0)
    detector = build_detector(head, "resnet50", 80, msil=msil, norm="frozen_bn", frozen_stages=1)
    detector.lay_out(channels_last=True)
    return detector


def training_ways(setup: Setup, images: int, *, on_gpu: bool) -> dict[str, Way]:
    """on_gpu: those too that need one, or minutes for compiling."""
    way = partial(our_training, setup, images=images, precision=PRECISION)
    ways = {
        "eager": way(detector=ours(setup)),
        "shipped": their_training(setup, shipped(setup), images, better=False),
        "better": their_training(setup, shipped(setup), images, better=True),
    }
    if on_gpu:
        ways["compiled"] = way(detector=ours(setup), compiled=True)
        ways["CUDA graph"] = way(detector=ours(setup), cuda_graph=True)
    return ways


def training(setup: Setup, images: int, *, on_gpu: bool = True) -> Iterator[Row]:
    """G1, G2 and at few images G3."""
    ways = training_ways(setup, images, on_gpu=on_gpu)
    seconds = medians({name: way.turn for name, way in ways.items()}, setup.rounds)
    rate = {name: images / value for name, value in seconds.items()}
    same = agreement(ways)
    for way in ("eager", "compiled", "CUDA graph"):
        if way not in rate:
            continue
        what = f"training, {images} images, {way}"
        yield against(f"G1 {what}", rate[way], rate["shipped"], 2.5, f"torchvision as shipped; {same}")
        yield against(f"G1 {what}", rate[way], rate["better"], 1.3, "torchvision in bf16 and channels last")
        if images == LARGE and way in AT_LEAST:
            least, share = AT_LEAST[way], rate[way] / ROOFLINE[way]
            said = f"{100 * share:.0f} % of an H100's roofline"
            yield Row(f"G2 {what}", f"{rate[way]:.1f} img/s", "", None, f">= {least} img/s", rate[way] >= least, said)
    if "CUDA graph" in rate:
        goal = 1.4 if images == SMALL else None
        yield against(f"G3 CUDA graph against eager, {images} images", rate["CUDA graph"], rate["eager"], goal, same)


def agreement(ways: dict[str, Way]) -> str:
    """Asserts that after as many steps on the same batch all of our ways have the same losses, to bf16's rounding."""
    eager = ways["eager"].losses()
    worst = 0.0
    for name in set(ways) - {"eager", "shipped", "better"}:
        found = ways[name].losses()
        worst = max(worst, *(abs(found[term] - value) / value for term, value in eager.items()))
    assert worst < 0.02, (worst, eager)
    return f"our ways' losses to {worst:.0e}"


def against(name: str, rate: float, anchor: float, at_least: float | None, said: str) -> Row:
    """A row about two numbers of images/s."""
    goal = "" if at_least is None else f">= {at_least:g}x"
    met = None if at_least is None else rate >= at_least * anchor
    return Row(name, f"{rate:.1f} img/s", f"{anchor:.1f} img/s", rate / anchor, goal, met, said)


def weights(setup: Setup) -> Iterator[Row]:
    """Asserts that both nets predict the same in float32."""
    net = shipped(setup).to(setup.device).eval()
    detector = detector_like(net).to(setup.device).eval()
    image = setup.images(1)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        batch, _ = net.transform([image[0] / 255])
        expected = net.head(list(net.backbone(batch.tensors).values()))["cls_logits"]
        difference = float((detector(image).logits - expected).abs().max())
    assert difference < 1e-3, difference
    said = "float32 logits of the same weights, the largest difference"
    yield Row("G1 the same nets", f"{difference:.0e}", "", None, "", None, said)


def variants(setup: Setup, images: int) -> Iterator[Row]:
    """VFNet and MSIL, without a goal."""
    plain = None
    for name, head, msil in (
        ("FCOS", "fcos", None),
        ("FCOS + MSIL 3x3", "fcos", {"kernel_size": 3}),
        ("FCOS + MSIL 1x1", "fcos", {"kernel_size": 1}),
        ("VFNet", "vfnet", None),
    ):
        way = our_training(setup, other(setup, head, msil), images, precision=PRECISION)
        rate = images / medians({name: way.turn}, setup.rounds)[name]
        plain = plain or rate
        yield against(f"G1 {name}, {images} images, eager", rate, plain, None, "the anchor is our plain FCOS")


def memory(setup: Setup, images: int) -> Iterator[Row]:
    """G4."""
    small = Setup(setup.device, setup.size, setup.boxes, rounds=1, steps=2)
    used = peak(lambda: our_training(small, ours(small), images, precision=PRECISION))
    as_shipped = peak(lambda: their_training(small, shipped(small), images, better=False))
    better = peak(lambda: their_training(small, shipped(small), images, better=True))
    for anchor, goal, said in ((as_shipped, 0.6, "torchvision as shipped"), (better, None, "in bf16, channels last")):
        words, met = ("", None) if goal is None else (f"<= {goal:g}x", used <= goal * anchor)
        yield Row(
            f"G4 peak memory, {images} images", f"{used / 2**30:.1f} GiB", f"{anchor / 2**30:.1f} GiB", used / anchor,
            words, met, said,
        )  # fmt: skip


def peak(make: Callable[[], Way]) -> int:
    """Bytes that one way to train held at once."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    make().turn()
    return torch.cuda.max_memory_allocated() - before


def inference(setup: Setup, images: int, *, on_gpu: bool = True) -> Iterator[Row]:
    """G5."""
    net = shipped(setup).to(setup.device).eval()
    floats = [image / 255 for image in setup.images(images)]
    anchor = images / medians({"": partial(predicting, setup, net, floats)}, setup.rounds)[""]
    for head, least in (("fcos", 200), ("vfnet", 150)):
        for compiled in (True, False) if on_gpu else (False,):
            detector = other(setup, head, None).to(setup.device).eval()
            if compiled:
                detector.compile_parts()
            turn = partial(predicting, setup, detector, setup.images(images))
            rate = images / medians({"": turn}, setup.rounds)[""]
            yield Row(
                f"G5 {head}, {images} images, {'compiled' if compiled else 'eager'}", f"{rate:.1f} fps",
                f"{anchor:.1f} fps", rate / anchor, f">= {least} fps", rate >= least, "torchvision's FCOS as shipped",
            )  # fmt: skip


@torch.no_grad()
def predicting(setup: Setup, net: Detector | FCOS, images: list[Tensor]) -> float:
    """Seconds of one batch, from images to detections; ours in bf16."""
    predict = net.predict if isinstance(net, Detector) else net
    with torch.autocast(setup.device, torch.bfloat16, enabled=isinstance(net, Detector)):
        for _ in range(3):
            predict(images)
        clock = WallClock(setup.device)
        clock.start()
        for _ in range(setup.steps):
            predict(images)
        return clock.stop() / setup.steps


class Strict(Callback):
    """From the second step on, an error wherever the host would wait for the GPU."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > 0:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


def waits(head: str, *overrides: str) -> Iterator[Row]:
    """P4: a whole small run of run.py."""
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(DetectionModule, "configure_callbacks", lambda self: [Strict()]),
    ):
        chosen = ("trainer.accelerator=gpu", f"trainer.precision={PRECISION}", f"model/head={head}", *overrides)
        try:
            experiment.run(settings(Path(folder), *chosen))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    said = f'no error under set_sync_debug_mode("error") {" ".join(overrides)}'.rstrip()
    yield Row(f"P4 host syncs on the GPU, {head}", "0", "", None, "<= 0", True, said)


def measure() -> Iterator[Row]:
    if not torch.cuda.is_available():
        raise NotRun("no GPU here: python -m benchmarks.gpu_training on a machine with one")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    setup = Setup()
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "G1 the same nets": partial(weights, setup),
        f"G1 training, {LARGE} images": partial(training, setup, LARGE),
        f"G1 training, {SMALL} images": partial(training, setup, SMALL),
        "G4 peak memory": partial(memory, setup, LARGE),
        "G5 inference": partial(inference, setup, LARGE),
        "G1 variants": partial(variants, setup, LARGE),
        "P4 fcos": partial(waits, "fcos"),
        "P4 vfnet": partial(waits, "vfnet"),
        "P4 fcos, CUDA graph": partial(waits, "fcos", "trainer.cuda_graph=true", "model.backbone.norm=frozen_bn"),
    }
    yield from each(parts)


def each(parts: dict[str, Callable[[], Iterator[Row]]]) -> Iterator[Row]:
    """All rows; of a part that fails the rows until then and one that says why."""
    for name, part in parts.items():
        try:
            yield from part()
        except Exception as error:
            traceback.print_exc()
            first = str(error).strip().partition("\n")[0]
            yield Row(name, "failed", "", None, "", False, f"{type(error).__name__}: {first}")
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()
            torch._dynamo.reset()


if __name__ == "__main__":
    run(measure, __doc__)
