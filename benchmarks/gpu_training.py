"""G1-G5: training and inference on one NVIDIA H100 at 800 x 1344 in bf16, against torchvision's FCOS in the same run.

    python -m benchmarks.gpu_training

Ours is plain FCOS with ResNet-50 (no MSIL), under bf16 autocast and in channels_last: as it comes ("eager"), compiled
("default") and compiled with CUDA graphs ("reduce-overhead"); a step is Detector.loss, backward and fused SGD.
torchvision's step is that of its reference training without the reading of the loss for the log; "as shipped" is
float32, "bf16" under autocast and in channels_last. The nets hold the same weights: random ones, with frozen BatchNorm,
stem and first stage frozen. 80 classes, 7 boxes an image. Compilation is not counted. Wall-clock seconds, the GPU
waited for at both ends of a turn.

Float32 logits of both are compared, not losses: torchvision puts points at corners and does not weigh its box loss.
Losses of compiled steps are compared with eager ones'. G5 raises the classifiers' biases until every image has 100
detections. Also here: the half of P4 that needs a GPU. Shares are of the roofline, bf16 steps of FCOS at 800 x 1344 on
an H100: 225 img/s with folded norms, 317 with everything fused.
"""

from __future__ import annotations

import copy
import gc
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torchvision.models.detection import FCOS

from benchmarks.compare import NotRun, Row, counted, relative_difference, run
from benchmarks.gpu import (
    DEFAULT,
    EAGER,
    REDUCED,
    Scene,
    Setup,
    Step,
    autocast,
    failed,
    medians,
    our_inference,
    our_training,
    their_inference,
    their_training,
)
from benchmarks.scenes import detector_like, torchvision_fcos
from benchmarks.training_step import compared
from msil.detection import Detector, ResNetOptions, build_detector

SHIPPED, MIXED = "as shipped", "bf16"
AT_LEAST = {SHIPPED: 2.5, MIXED: 1.3}  # G1
IMAGES_A_SECOND = {EAGER: 115, DEFAULT: 160}  # G2
ROOFLINE = {EAGER: 225, DEFAULT: 317}  # images a second
FRAMES_A_SECOND = {"fcos": 200, "vfnet": 150}  # G5
LOSSES_WITHIN = 3e-2  # of eager ones: a compiled net keeps numbers in float32 that an eager one rounds to 8 bits
LOGITS_WITHIN = 5e-2  # of bf16 ones from float32 ones, relative to the largest
DETECTIONS = 100
WAIT = "called a synchronizing CUDA operation"  # torch's words


def training(setup: Setup, net: FCOS, batch: int) -> Iterator[Row]:
    """G1, of the first batch size G2, of the last G3."""
    torch.compiler.reset()  # or this batch's compiled net would be one for any size
    scene = Scene.of(setup, batch)
    weights, losses = same_weights(setup, net, scene), {}

    def make(mode: str) -> Step:
        step = our_training(detector_like(net, backbone=setup.backbone), scene, setup, mode)
        losses[mode] = same_losses([{k: float(v) for k, v in step().items()} for _ in range(2)], losses, mode)
        return step

    makers = {mode: partial(make, mode) for mode in (EAGER, *setup.compiled)}
    makers |= {way: partial(their_training, net, scene, setup, mixed=way == MIXED) for way in (SHIPPED, MIXED)}
    *failures, seconds = medians(makers, setup, batch, f"G1 FCOS batch {batch}")
    yield from failures
    for mode in (mode for mode in (EAGER, *setup.compiled) if mode in seconds):
        for anchor in (anchor for anchor in (SHIPPED, MIXED) if anchor in seconds):
            said = f"{weights}; {losses[mode][1]}"
            yield faster_images(f"G1 FCOS batch {batch} {mode}, {anchor}", batch, seconds[mode], seconds[anchor],
                                AT_LEAST[anchor], said)  # fmt: skip
        if batch == setup.batches[0] and mode in IMAGES_A_SECOND:
            images, at_least, roof = batch / seconds[mode], IMAGES_A_SECOND[mode], ROOFLINE[mode]
            yield Row(f"G2 FCOS batch {batch} {mode}", f"{images:.1f} img/s", "", None, f">= {at_least} img/s",
                      images >= at_least, f"{images / roof:.0%} of the roofline's {roof} img/s")  # fmt: skip
    if batch == setup.batches[-1] and {EAGER, REDUCED} <= seconds.keys():
        name = f"G3 FCOS batch {batch} {REDUCED}, {EAGER}"
        yield faster_images(name, batch, seconds[REDUCED], seconds[EAGER], 1.4, losses[REDUCED][1])


def memory(setup: Setup, net: FCOS) -> Iterator[Row]:
    """G4: peaks of each way's net, optimizer and steps."""
    batch = setup.batches[0]
    scene = Scene.of(setup, batch)

    def peak(make: Callable[[], Step]) -> int:
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        step = make()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(setup.uncounted):
            step()
        return torch.cuda.max_memory_allocated() - before

    ours = peak(lambda: our_training(detector_like(net, backbone=setup.backbone), scene, setup, EAGER))
    for anchor, at_most in ((SHIPPED, 0.6), (MIXED, None)):
        theirs = peak(partial(their_training, net, scene, setup, mixed=anchor == MIXED))
        said = [f"{value / 2**30:.1f} GiB" for value in (ours, theirs)]
        goal, met = ("", None) if at_most is None else (f"<= {at_most}x", ours / theirs <= at_most)
        yield Row(
            f"G4 peak memory batch {batch}, {anchor}", *said, ours / theirs, goal, met, "net, optimizer and steps"
        )


def waits(setup: Setup, net: FCOS) -> Iterator[Row]:
    """P4 on the GPU."""
    scene = Scene.of(setup, setup.batches[-1])
    anchor = waits_of(their_training(net, scene, setup, mixed=False), setup)
    nets = {"fcos": detector_like(net, backbone=setup.backbone), "vfnet": built("vfnet", setup)}
    for name, detector in nets.items():
        found = waits_of(our_training(detector, scene, setup, EAGER), setup)
        yield counted(f"P4 {name} waits on the GPU", len(found), len(anchor), 0, ", ".join(found) or "in a step")


def waits_of(step: Step, setup: Setup) -> list[str]:
    """Where a step waits for the GPU, as file:line, by torch.cuda.set_sync_debug_mode."""
    for _ in range(setup.uncounted):
        step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(one.filename).name}:{one.lineno}" for one in caught if WAIT in str(one.message)]


def inference(setup: Setup, net: FCOS, head: str) -> Iterator[Row]:
    """G5: images in, detections out."""
    torch.compiler.reset()
    batch = setup.batches[0]
    scene, found = Scene.of(setup, batch), {}

    def make(mode: str) -> Step:
        detector = detector_like(net, backbone=setup.backbone) if head == "fcos" else built(head, setup)
        raise_biases(detector.head)
        step = our_inference(detector, scene, setup, mode)
        found[mode] = same_logits(detector, scene, setup)
        counts = {len(detections.scores) for detections in step()}
        assert counts == {DETECTIONS}, counts
        return step

    makers = {mode: partial(make, mode) for mode in (EAGER, *setup.compiled)}
    if head == "fcos":
        theirs = copy.deepcopy(net)
        raise_biases(theirs.head.classification_head, theirs.head.regression_head)
        makers |= {way: partial(their_inference, theirs, scene, setup, mixed=way == MIXED) for way in (SHIPPED, MIXED)}
    *failures, seconds = medians(makers, setup, batch, f"G5 {head} batch {batch}")
    yield from failures
    for mode in (mode for mode in (EAGER, *setup.compiled) if mode in seconds):
        frames = batch / seconds[mode]
        at_least = FRAMES_A_SECOND[head] if mode == DEFAULT else None
        goal, met = ("", None) if at_least is None else (f">= {at_least} fps", frames >= at_least)
        for anchor in [anchor for anchor in (SHIPPED, MIXED) if anchor in seconds] or [""]:
            said, ratio = (
                (f"{batch / seconds[anchor]:.1f} fps", seconds[anchor] / seconds[mode]) if anchor else ("", None)
            )
            name = f"G5 {head} batch {batch} {mode}" + (f", {anchor}" if anchor else "")
            yield Row(name, f"{frames:.1f} fps", said, ratio, goal, met, f"{found[mode]}, {DETECTIONS} an image")


def built(head: str, setup: Setup, kernel_size: int | None = None) -> Detector:
    """kernel_size: of MSIL on both branches; None: without."""
    torch.manual_seed(0)
    msil = None if kernel_size is None else {"kernel_size": kernel_size}
    backbone = ResNetOptions(setup.backbone, norm="frozen_bn", frozen_stages=1)
    return build_detector(head, backbone, setup.classes, msil=msil)


@torch.no_grad()
def raise_biases(*parts: Any) -> None:
    """Scores above the threshold, and for FCOS boxes of some size, as random weights have neither."""
    for part in parts:
        if hasattr(part, "cls_logits"):
            part.cls_logits.bias.fill_(-2)
        if hasattr(part, "bbox_ctrness"):
            part.bbox_reg.bias.fill_(4)


def same_weights(setup: Setup, net: FCOS, scene: Scene) -> str:
    """Asserts that both nets predict the same in float32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        ours, anchor = detector_like(net, backbone=setup.backbone).to(setup.device), copy.deepcopy(net).to(setup.device)
        return compared(ours, anchor, scene.images[:1], scene.floats[:1])


def same_losses(steps: list[dict[str, float]], others: dict[str, Any], mode: str) -> tuple[list, str]:
    """Asserts that two steps have the losses of eager ones; returns them and what was found."""
    eager = steps if mode == EAGER else others[EAGER][0]
    differences = [abs(mine[k] / other[k] - 1) for mine, other in zip(steps, eager, strict=True) for k in other]
    assert all(difference <= LOSSES_WITHIN for difference in differences), (steps, eager)  # each: max passes over NaN
    return steps, f"losses as eager to {max(differences):.0e}"


@torch.inference_mode()
def same_logits(detector: Detector, scene: Scene, setup: Setup) -> str:
    """Asserts that logits as predicted are near an eager float32 net's."""
    with autocast(setup):
        found = detector(scene.images).logits.float()
    difference = relative_difference(found, Detector.net(detector, detector.batch(scene.images)).logits)
    assert difference < LOGITS_WITHIN, difference
    return f"logits as in float32 to {difference:.0e}"


def faster_images(name: str, batch: int, ours: float, anchor: float, at_least: float, agreement: str) -> Row:
    """ours, anchor: seconds a step."""
    said = [f"{batch / seconds:.1f} img/s" for seconds in (ours, anchor)]
    return Row(name, said[0], said[1], anchor / ours, f">= {at_least:g}x", anchor / ours >= at_least, agreement)


def rows(setup: Setup) -> Iterator[Row]:
    """Part by part; one that fails says so in a row and leaves the others alone."""
    net = torchvision_fcos(setup.size, setup.classes, backbone=setup.backbone)
    on_gpu = {"P4 on the GPU": partial(waits, setup, net), "G4 memory": partial(memory, setup, net)}
    parts: dict[str, Callable[[], Iterator[Row]]] = dict(on_gpu) if setup.device == "cuda" else {}
    parts |= {f"G1-G3 FCOS batch {batch}": partial(training, setup, net, batch) for batch in setup.batches}
    parts |= {f"G5 {head}": partial(inference, setup, net, head) for head in FRAMES_A_SECOND}
    began = time.monotonic()
    for name, part in parts.items():
        if time.monotonic() - began > setup.limit_s:
            yield Row(name, "", "", None, "", None, f"left out: {setup.limit_s:.0f} s had passed")
            continue
        try:
            yield from part()
        except Exception as error:
            yield failed(name, error)


def measure() -> Iterator[Row]:
    if not torch.cuda.is_available():
        raise NotRun("no GPU here; python -m benchmarks.gpu_training on a machine with one writes these rows.")
    print(f"on {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}", flush=True)  # pyright: ignore
    yield from rows(Setup())


if __name__ == "__main__":
    run(measure, __doc__)
