"""Training and inference at 800 x 1344 in bf16 against torchvision's FCOS.

Ours is plain FCOS or VFNet with ResNet-50 (no MSIL), under bf16 autocast and in channels_last: as it comes ("eager"),
compiled ("default"), and compiled with CUDA graphs ("reduce-overhead"); a step is Detector.loss, backward and fused
SGD. torchvision's step is that of its reference training without the reading of the loss for the log; "as shipped" is
float32, "bf16" under autocast and in channels_last. FCOS has the same weights on both sides: random ones, with frozen
BatchNorm, stem and first stage frozen. 80 classes, 7 boxes an image. Compilation is not counted. Wall-clock seconds,
the GPU waited for at both ends of a turn.

Float32 logits of both are compared, not losses: torchvision puts points at corners and does not weigh its box loss.
Losses of compiled steps are compared with eager ones'. G5 raises the classifiers' biases until every image has 100
detections. Shares are of the roofline, bf16 steps of FCOS at 800 x 1344 on an H100: 225 img/s with folded norms, 317
with everything fused.
"""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS

from benchmarks.compare import Row, relative_difference
from benchmarks.gpu.common import (
    DEFAULT,
    EAGER,
    REDUCED,
    Scene,
    Setup,
    autocast,
    built,
    check,
    emit,
    failed,
    now,
    prepared,
    raise_scores,
    scene,
)
from benchmarks.scenes import detector_like, torchvision_fcos
from benchmarks.training_step import compared
from msil.detection import Detector

SHIPPED, MIXED = "as shipped", "bf16"
AT_LEAST = {SHIPPED: 2.5, MIXED: 1.3}  # G1
IMAGES_A_SECOND = {EAGER: 115, DEFAULT: 160}  # G2
ROOFLINE = {EAGER: 225, DEFAULT: 317}  # images a second
FRAMES_A_SECOND = {"fcos": 200, "vfnet": 150}  # G5
LOSSES_WITHIN = 3e-2  # of eager ones: a compiled net keeps numbers in float32 that an eager one rounds to 8 bits
LOGITS_WITHIN = 5e-2  # of bf16 ones from float32 ones, relative to the largest
DETECTIONS = 100

Step = Callable[[], Any]


class Measured(NamedTuple):
    """Seconds of a step, the median of the rounds; the peak of what net, optimizer and steps hold, bytes."""

    seconds: float
    peak: int


# The ways


def trained(net: nn.Module, losses_of: Callable[[], dict[str, Tensor]], setup: Setup, *, mixed: bool) -> Step:
    """A training step, which returns its losses."""
    weights = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=1e-6, momentum=0.9, weight_decay=1e-4, fused=isinstance(net, Detector))

    def step() -> dict[str, Tensor]:
        with autocast(setup, mixed):
            losses = losses_of()
            total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        return {name: value.detach().clone() for name, value in losses.items()}

    return step


def our_training(detector: Detector, one: Scene, setup: Setup, mode: str) -> Step:
    detector = prepared(detector.train(), setup, mode)
    return trained(detector, lambda: detector.loss(one.images, one.targets), setup, mixed=True)


def their_training(net: FCOS, one: Scene, setup: Setup, *, mixed: bool) -> Step:
    net = laid_out(copy.deepcopy(net), setup, mixed=mixed).train()
    return trained(net, lambda: net(one.floats, one.dicts), setup, mixed=mixed)


def inferred(predict: Callable[[list[Tensor]], Any], images: list[Tensor], setup: Setup, *, mixed: bool) -> Step:
    def step() -> Any:
        with torch.inference_mode(), autocast(setup, mixed):
            return predict(images)

    return step


def laid_out(net: FCOS, setup: Setup, *, mixed: bool) -> FCOS:
    net.to(setup.device)
    return net.to(memory_format=torch.channels_last) if mixed else net  # pyright: ignore[reportCallIssue]


def measured(name: str, makers: Mapping[str, Callable[[], Step]], setup: Setup, batch: int) -> dict[str, Measured]:
    """Each way that does not fail, over rounds in which each has its turn; a failure leaves a row."""
    steps: dict[str, Step] = {}
    peaks: dict[str, int] = {}
    for way, make in makers.items():
        gc.collect()
        before = torch.cuda.memory_allocated()
        try:
            step = make()
            if setup.on_gpu:
                torch.cuda.reset_peak_memory_stats()
            turn(step, setup, batch)
            steps[way], peaks[way] = step, torch.cuda.max_memory_allocated() - before
        except Exception as error:
            emit(False, row=asdict(failed(f"{name} {way}", error)))
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    for _ in range(setup.rounds):
        for way, step in steps.items():
            seconds[way].append(turn(step, setup, batch))
    return {way: Measured(statistics.median(values), peaks[way]) for way, values in seconds.items()}


def turn(step: Step, setup: Setup, batch: int) -> float:
    """Seconds of one step."""
    torch.cuda.empty_cache()  # memory of another way goes back, or all of them together would not fit
    for _ in range(setup.uncounted):
        step()
    steps = max(1, setup.images_a_turn // batch)
    began = now()
    for _ in range(steps):
        step()
    return (now() - began) / steps


# G1 to G4


def training(setup: Setup, head: str, batch: int) -> Iterator[Row]:
    """G1 and G4; of the largest batch G2, of another G3 of its CUDA graphs."""
    batch = max(1, batch * setup.batch // 8)  # of a rehearsal less
    one, name = scene(setup, batch), f"G1 {head} batch {batch}"
    net = torchvision_fcos(setup.size, 80, backbone=setup.backbone)
    said = same_weights(setup, net, one) if head == "fcos" else "no anchor's"
    losses: dict[str, list[dict[str, float]]] = {}
    agreed: dict[str, str] = {}

    def make(mode: str) -> Step:
        detector = detector_like(net, backbone=setup.backbone) if head == "fcos" else built(setup, head)
        step = our_training(detector, one, setup, mode)
        losses[mode] = [{term: float(value) for term, value in step().items()} for _ in range(2)]
        agreed[mode] = same_losses(f"{name} {mode}", losses[mode], losses[EAGER])
        return step

    makers: dict[str, Callable[[], Step]] = {EAGER: partial(make, EAGER)}
    if head == "fcos" and setup.anchors:
        makers |= {way: partial(their_training, net, one, setup, mixed=way == MIXED) for way in (SHIPPED, MIXED)}
    found = measured(name, makers, setup, batch)
    mode = DEFAULT if batch == setup.batch else REDUCED
    for way in (EAGER, mode):
        if way == mode:
            found |= measured(name, {mode: partial(make, mode)}, setup, batch)
        if way not in found:
            continue
        images, held = batch / found[way].seconds, f"{found[way].peak / 2**30:.1f} GiB"
        for anchor in (anchor for anchor in (SHIPPED, MIXED) if anchor in found):
            yield faster_images(f"{name} {way}, {anchor}", batch, found[way], found[anchor], AT_LEAST[anchor],
                                f"{said}; {agreed[way]}")  # fmt: skip
        if way == EAGER and SHIPPED in found:
            ratio, theirs = found[way].peak / max(found[SHIPPED].peak, 1), f"{found[SHIPPED].peak / 2**30:.1f} GiB"
            yield Row(f"G4 peak memory batch {batch}, {SHIPPED}", held, theirs, ratio, "<= 0.6x", ratio <= 0.6,
                      "net, optimizer and steps")  # fmt: skip
        goal, share = (IMAGES_A_SECOND[way], ROOFLINE[way]) if head == "fcos" and batch == setup.batch else (None, None)
        yield Row(f"G2 {head} batch {batch} {way}", f"{images:.1f} img/s", "", None, f">= {goal} img/s" if goal else "",
                  images >= goal if goal else None,
                  f"{agreed[way]}; {held}" + (f"; {images / share:.0%} of the roofline" if share else ""))  # fmt: skip
    if {EAGER, REDUCED} <= found.keys():
        yield faster_images(f"G3 {head} batch {batch} {REDUCED}, {EAGER}", batch, found[REDUCED], found[EAGER], 1.4,
                            agreed[REDUCED])  # fmt: skip


def same_weights(setup: Setup, net: FCOS, one: Scene) -> str:
    """Asserts that both nets predict the same in float32."""
    torch.backends.cudnn.allow_tf32 = False
    ours, anchor = detector_like(net, backbone=setup.backbone).to(setup.device), copy.deepcopy(net).to(setup.device)
    said = compared(ours, anchor, one.images[:1], one.floats[:1])
    torch.backends.cudnn.allow_tf32 = True  # as PyTorch comes
    return said


def same_losses(name: str, steps: list[dict[str, float]], eager: list[dict[str, float]]) -> str:
    """Two steps have the losses of eager ones, or a check more is bad: the speed is told all the same."""
    differences = [abs(mine[k] / other[k] - 1) for mine, other in zip(steps, eager, strict=True) for k in other]
    if not all(difference <= LOSSES_WITHIN for difference in differences):  # each: max passes over NaN
        emit(False, check=f"{name}: losses as eager's", detail=[steps, eager], s=0)
        return "OTHER LOSSES THAN EAGER"
    return f"losses as eager to {max(differences):.0e}"


def faster_images(name: str, batch: int, ours: Measured, anchor: Measured, at_least: float, agreement: str) -> Row:
    said = [f"{batch / side.seconds:.1f} img/s" for side in (ours, anchor)]
    ratio = anchor.seconds / ours.seconds
    return Row(name, said[0], said[1], ratio, f">= {at_least:g}x", ratio >= at_least, agreement)


# G5


def inference(setup: Setup, head: str) -> Iterator[Row]:
    """Images in, detections out."""
    batch, name, agreed = setup.batch, f"G5 {head} batch {setup.batch}", {}
    one, net = scene(setup, batch), torchvision_fcos(setup.size, 80, backbone=setup.backbone)

    def make(mode: str) -> Step:
        detector = detector_like(net, backbone=setup.backbone) if head == "fcos" else built(setup, head)
        raise_scores(detector.head)
        detector = prepared(detector.eval(), setup, mode)
        step = inferred(detector.predict, one.images, setup, mixed=True)
        agreed[mode] = same_logits(detector, one, setup)
        counts = {len(detections.scores) for detections in step()}
        assert counts == {DETECTIONS}, counts
        return step

    makers: dict[str, Callable[[], Step]] = {EAGER: partial(make, EAGER)}
    if head == "fcos" and setup.anchors:
        raise_scores(net.head.classification_head, net.head.regression_head)
        for way in (SHIPPED, MIXED):
            theirs = laid_out(copy.deepcopy(net), setup, mixed=way == MIXED).eval()
            makers[way] = partial(inferred, theirs, one.floats, setup, mixed=way == MIXED)
    found = measured(name, makers, setup, batch)
    for mode in (EAGER, DEFAULT):
        if mode == DEFAULT:
            found |= measured(name, {mode: partial(make, mode)}, setup, batch)
        if mode not in found:
            continue
        frames = batch / found[mode].seconds
        goal, met = (
            (f">= {FRAMES_A_SECOND[head]} fps", frames >= FRAMES_A_SECOND[head]) if mode == DEFAULT else ("", None)
        )
        for anchor in [anchor for anchor in (SHIPPED, MIXED) if anchor in found] or [""]:
            said, ratio = ("", None)
            if anchor:
                said, ratio = f"{batch / found[anchor].seconds:.1f} fps", found[anchor].seconds / found[mode].seconds
            yield Row(f"{name} {mode}" + (f", {anchor}" if anchor else ""), f"{frames:.1f} fps", said, ratio, goal, met,
                      f"{agreed[mode]}, {DETECTIONS} an image")  # fmt: skip


@torch.inference_mode()
def same_logits(detector: Detector, one: Scene, setup: Setup) -> str:
    """Logits as predicted are near an eager float32 net's, or a check more is bad."""
    with autocast(setup):
        found = detector(one.images).logits.float()
    difference = relative_difference(found, Detector.net(detector, detector.batch(one.images)).logits)
    if not difference < LOGITS_WITHIN:
        emit(False, check="logits as in float32", detail=difference, s=0)
    return f"logits as in float32 to {difference:.0e}"


def prime(setup: Setup, head: str, batch: int) -> None:
    """Compiles what is measured later."""
    setup = replace(setup, anchors=False, rounds=1, images_a_turn=1, uncounted=1)
    check(f"training of {head}, batch {batch}", lambda: (True, f"{len(list(training(setup, head, batch)))} rows"))
    if batch == 8:
        check(f"detection of {head}", lambda: (True, f"{len(list(inference(setup, head)))} rows"))
