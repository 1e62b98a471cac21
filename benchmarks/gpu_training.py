"""G1-G5: training and inference on one NVIDIA H100 at 800 x 1344 in bf16, against torchvision's FCOS in the same run.

    python -m benchmarks.gpu_training

Ours is plain FCOS with ResNet-50 (model.msil.apply=none), trained by short fits of a run's own module, trainer,
callbacks and metrics.csv with trainer.precision=bf16-mixed, from images of the GPU to weights: as it comes ("eager"),
with trainer.compile=default, and with trainer.compile=reduce-overhead, which replays CUDA graphs. torchvision's step is
that of its reference training without the reading of the loss for the log;
"as shipped" is float32, "bf16" under autocast and in channels_last. The nets hold the same weights: random ones, with
frozen BatchNorm, stem and first stage frozen. 80 classes, 7 boxes an image. Compilation and capture are not counted.
Wall-clock seconds, the GPU waited for at both ends of a turn.

Float32 logits of both are compared, not losses: torchvision puts points at corners and does not weigh its box loss.
Losses of compiled and captured steps are compared with eager ones'. G5 raises the classifiers' biases until every
image has 100 detections. Also here: the half of P4 that needs a GPU. Shares are of the roofline, bf16 steps of FCOS at
800 x 1344 on an H100: 225 img/s with folded norms, 317 with everything fused.
"""

from __future__ import annotations

import copy
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torchvision.models.detection import FCOS

from benchmarks.compare import NotRun, Row, counted, relative_difference, run
from benchmarks.gpu_setup import Clock, Scene, Setup, Way, begun, failed, medians, peak_bytes
from benchmarks.gpu_waits import waits_of_fit, waits_of_step
from benchmarks.gpu_ways import OurTraining, autocast, our_inference, their_inference, their_training, turns_of
from benchmarks.nets import detector_like, torchvision_fcos
from benchmarks.scenes import IMAGE
from benchmarks.training_step import compared
from msil.detection import Detector, ResNetOptions, build_detector

SHIPPED, MIXED = "as shipped", "bf16"
EAGER, COMPILED, GRAPH = "eager", "compiled", "CUDA graph"
SWITCHES = {EAGER: (), COMPILED: ("trainer.compile=default",), GRAPH: ("trainer.compile=reduce-overhead",)}
AT_LEAST = {SHIPPED: 2.5, MIXED: 1.3}  # G1
IMAGES_A_SECOND = {EAGER: 115, COMPILED: 160}  # G2
ROOFLINE = {EAGER: 225, COMPILED: 317}  # images a second
FRAMES_A_SECOND = {"fcos": 200, "vfnet": 150}  # G5
# How far losses may be from eager ones', relatively: a capture runs the same kernels, a compiled net keeps intermediate
# numbers in float32 that an eager one rounds to 8 bits.
LOSSES_WITHIN = {EAGER: 0.0, COMPILED: 3e-2, GRAPH: 1e-2}
LOGITS_WITHIN = 5e-2  # of bf16 ones from float32 ones, relative to the largest
DETECTIONS = 100


def measure() -> Iterator[Row]:
    if not torch.cuda.is_available():
        raise NotRun("no GPU here; python -m benchmarks.gpu_training on a machine with one writes these rows.")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    print(f"on {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}", flush=True)  # pyright: ignore
    yield from rows(Setup())


def rows(setup: Setup) -> Iterator[Row]:
    """All that the device allows, part by part; one that fails says so in a row and leaves the others alone."""
    net = torchvision_fcos(setup.size, setup.classes, backbone=setup.backbone)
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        f"G1-G3 FCOS batch {batch}": partial(training, setup, net, batch) for batch in setup.batches
    }
    if setup.on_gpu:
        parts = {"P4 on the GPU": partial(waits, setup, net), "G4 memory": partial(memory, setup, net), **parts}
    parts |= {f"G5 {head}": partial(inference, setup, net, head) for head in FRAMES_A_SECOND}
    parts["G1 other heads"] = partial(others, setup)
    began = time.monotonic()
    for name, part in parts.items():
        if time.monotonic() - began > setup.limit_s:
            yield Row(name, "", "", None, "", None, f"left out: {setup.limit_s:.0f} s had passed")
            continue
        try:
            yield from part()
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            yield failed(name, "", error)


def training(setup: Setup, net: FCOS, batch: int) -> Iterator[Row]:
    """G1, of the first batch size G2, of the last G3."""
    torch.compiler.reset()  # or this batch's compiled net would be one for any size
    scene = Scene.of(setup, batch)
    weights = same_weights(setup, net, scene)
    ours: dict[str, OurTraining] = {}

    def make(way: str) -> Way:
        ours[way] = OurTraining(detector_of(net, setup), scene, setup, *SWITCHES[way])
        return ours[way]

    ways, errors = begun(
        {
            SHIPPED: partial(theirs, net, scene, setup, mixed=False),
            MIXED: partial(theirs, net, scene, setup, mixed=True),
            **{way: partial(make, way) for way in ways_of(setup)},
        }
    )
    losses: dict[str, str] = {}
    for way in [way for way in ours if way in ways]:
        try:
            losses[way] = same_losses(ours[way], ours[EAGER], LOSSES_WITHIN[way])
        except AssertionError as error:
            errors[way] = error
            del ways[way]
    for way, error in errors.items():
        yield failed(f"G1 FCOS batch {batch} {way}", "", error)
    seconds = medians(ways, setup.rounds)
    for way in losses:
        agreement = f"{weights}; {losses[way]}"
        for anchor, at_least in AT_LEAST.items():
            if anchor in seconds:
                name = f"G1 FCOS batch {batch} {way}, {anchor}"
                yield faster_images(name, batch, seconds[way], seconds[anchor], at_least, agreement)
        if batch == setup.batches[0] and way in IMAGES_A_SECOND:
            yield enough_images(f"G2 FCOS batch {batch} {way}", batch / seconds[way], way, setup)
    if batch == setup.batches[-1] and {EAGER, GRAPH} <= seconds.keys():
        name = f"G3 FCOS batch {batch} {GRAPH}, {EAGER}"
        yield faster_images(name, batch, seconds[GRAPH], seconds[EAGER], 1.4, losses[GRAPH])


def ways_of(setup: Setup) -> list[str]:
    return [EAGER, *([COMPILED] if setup.compiled else []), *([GRAPH] if setup.on_gpu else [])]


def memory(setup: Setup, net: FCOS) -> Iterator[Row]:
    """G4: peaks of each way's net, optimizer and steps."""
    batch = setup.batches[0]
    scene, clock = Scene.of(setup, batch), Clock(torch.device(setup.device))
    peaks = {
        anchor: peak_bytes(partial(theirs, net, scene, setup, mixed=anchor == MIXED), clock)
        for anchor in (SHIPPED, MIXED)
    }
    for way in (EAGER, GRAPH):
        peak = peak_bytes(lambda way=way: OurTraining(detector_of(net, setup), scene, setup, *SWITCHES[way]), clock)
        for anchor, at_most in ((SHIPPED, 0.6), (MIXED, None)):
            ratio = peak / peaks[anchor]
            goal, met = ("", None) if at_most is None or way == GRAPH else (f"<= {at_most}x", ratio <= at_most)
            name = f"G4 peak memory batch {batch} {way}, {anchor}"
            yield Row(name, gibibytes(peak), gibibytes(peaks[anchor]), ratio, goal, met, "net, optimizer and steps")


def waits(setup: Setup, net: FCOS) -> Iterator[Row]:
    """P4 on the GPU."""
    batch = setup.batches[-1]
    scene = Scene.of(setup, batch)
    anchor = waits_of_step(their_training(copy.deepcopy(net), scene, setup, mixed=False), setup)
    nets = {
        "fcos": (detector_of(net, setup), EAGER),
        "vfnet": (built("vfnet", setup), EAGER),
        "fcos, CUDA graph": (detector_of(net, setup), GRAPH),
    }
    for name, (detector, switch) in nets.items():
        way = OurTraining(detector, scene, setup, *SWITCHES[switch])
        found = waits_of_fit(way)
        words = f"over {way.steps} steps, " + (", ".join(dict.fromkeys(found)) or "set_sync_debug_mode('error') passed")
        yield counted(f"P4 {name} waits on the GPU", len(found), f"{len(anchor)} a step", 0, words)


def inference(setup: Setup, net: FCOS, head: str) -> Iterator[Row]:
    """G5: images in, detections out."""
    torch.compiler.reset()
    batch = setup.inference_batch
    scene = Scene.of(setup, batch)
    found: dict[str, str] = {}

    def make(way: str) -> Way:
        detector = raised(detector_of(net, setup) if head == "fcos" else built(head, setup))
        step = our_inference(detector, scene, setup, *SWITCHES[way])
        found[way] = same_logits(detector, scene, setup) + all_found(step())
        return turns_of(step, setup, batch)

    def make_anchor(mixed: bool) -> Way:
        anchor = raised_theirs(copy.deepcopy(net))
        return turns_of(their_inference(anchor, scene, setup, mixed=mixed), setup, batch)

    makers = {way: partial(make, way) for way in ways_of(setup) if way != GRAPH}
    if head == "fcos":
        makers |= {SHIPPED: partial(make_anchor, False), MIXED: partial(make_anchor, True)}
    ways, errors = begun(makers)
    for way, error in errors.items():
        yield failed(f"G5 {head} batch {batch} {way}", "", error)
    seconds = medians(ways, setup.rounds)
    for way in (name for name in (EAGER, COMPILED) if name in seconds):
        frames = batch / seconds[way]
        at_least = FRAMES_A_SECOND[head] if way == COMPILED and setup.size == IMAGE else None
        goal, met = ("", None) if at_least is None else (f">= {at_least} fps", frames >= at_least)
        for anchor in (SHIPPED, MIXED) if head == "fcos" else ("",):
            said, ratio = "", None
            if anchor in seconds:
                said, ratio = f"{batch / seconds[anchor]:.1f} fps", seconds[anchor] / seconds[way]
            name = f"G5 {head} batch {batch} {way}" + (f", {anchor}" if anchor else "")
            yield Row(name, f"{frames:.1f} fps", said, ratio, goal, met, found[way])


def others(setup: Setup) -> Iterator[Row]:
    """Training speeds that have no goal."""
    big, small = setup.batches[0], setup.batches[-1]
    scenes = {batch: Scene.of(setup, batch) for batch in setup.batches}
    nets: dict[str, tuple[str, int | None]] = {
        "VFNet": ("vfnet", None), "FCOS + MSIL 3x3": ("fcos", 3), "FCOS + MSIL 1x1": ("fcos", 1),
    }  # fmt: skip
    makers: dict[str, Callable[[], Way]] = {}
    sizes: dict[str, int] = {}
    for name, (head, kernel_size) in nets.items():
        for batch, way in ((big, EAGER), (small, GRAPH)):
            if way in ways_of(setup):
                words = f"G1 {name} batch {batch} {way}"
                sizes[words] = batch
                makers[words] = partial(one_of, head, kernel_size, scenes[batch], setup, SWITCHES[way])
    ways, errors = begun(makers)
    for words, error in errors.items():
        yield failed(words, "", error)
    for words, seconds in medians(ways, setup.rounds).items():
        yield Row(words, f"{sizes[words] / seconds:.1f} img/s", "", None, "", None, "no goal")


def one_of(head: str, kernel_size: int | None, scene: Scene, setup: Setup, switches: tuple[str, ...]) -> OurTraining:
    return OurTraining(built(head, setup, kernel_size), scene, setup, *switches)


def theirs(net: FCOS, scene: Scene, setup: Setup, *, mixed: bool) -> Way:
    return turns_of(their_training(copy.deepcopy(net), scene, setup, mixed=mixed), setup, len(scene.images))


def detector_of(net: FCOS, setup: Setup) -> Detector:
    return detector_like(net, backbone=setup.backbone)


def built(head: str, setup: Setup, kernel_size: int | None = None) -> Detector:
    """kernel_size: of MSIL on both branches; None: without."""
    torch.manual_seed(0)
    msil = None if kernel_size is None else {"kernel_size": kernel_size}
    backbone = ResNetOptions(setup.backbone, norm="frozen_bn", frozen_stages=1)
    return build_detector(head, backbone, setup.classes, msil=msil)


@torch.no_grad()
def raised(detector: Detector) -> Detector:
    """With scores above the threshold, and for FCOS with boxes of some size, as random weights have neither."""
    torch.nn.init.constant_(detector.head.cls_logits.bias, -2)  # pyright: ignore[reportArgumentType]
    if hasattr(detector.head, "bbox_ctrness"):
        torch.nn.init.constant_(detector.head.bbox_reg.bias, 4)  # pyright: ignore[reportArgumentType]
    return detector


@torch.no_grad()
def raised_theirs(net: FCOS) -> FCOS:
    torch.nn.init.constant_(net.head.classification_head.cls_logits.bias, -2)  # pyright: ignore
    torch.nn.init.constant_(net.head.regression_head.bbox_reg.bias, 4)  # pyright: ignore
    return net


def same_weights(setup: Setup, net: FCOS, scene: Scene) -> str:
    """Asserts that both nets predict the same in float32."""
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        one = Scene(scene.images[:1], scene.targets[:1])
        ours, anchor = detector_of(net, setup).to(setup.device), copy.deepcopy(net).to(setup.device)
        return compared(ours, anchor, one.images, one.floats)
    finally:
        torch.backends.cudnn.allow_tf32 = tf32


def same_losses(way: OurTraining, eager: OurTraining, within: float) -> str:
    """Asserts that the losses of the first and of the last step are those of eager steps."""
    if not eager.losses:
        return "no losses of eager steps to compare with"
    if way is eager:
        first, last = (sum(step.values()) for step in way.losses)
        return f"loss {first:.3f} to {last:.3f} in {way.steps + way.setup.uncounted} steps"
    pairs = zip(way.losses, eager.losses, strict=True)
    differences = [abs(mine[name] / other[name] - 1) for mine, other in pairs for name in other]
    # Each by itself: a maximum may pass over a NaN.
    close = all(difference <= within for difference in differences)
    assert close, f"losses {way.losses} are not the eager ones, {eager.losses}"
    return f"losses as eager to {max(differences):.0e}"


@torch.inference_mode()
def same_logits(detector: Detector, scene: Scene, setup: Setup) -> str:
    """Asserts that logits as predicted are near an eager float32 net's."""
    with autocast(setup, True):
        found = detector(scene.images).logits.float()
    plain = Detector.net(detector, detector.batch(scene.images)).logits
    difference = relative_difference(found, plain)
    assert difference < LOGITS_WITHIN, difference
    return f"logits as in float32 to {difference:.0e}"


def all_found(found: list) -> str:
    counts = {len(detections.scores) for detections in found}
    assert counts == {DETECTIONS}, counts
    return f", {DETECTIONS} detections an image"


def faster_images(name: str, batch: int, ours: float, anchor: float, at_least: float, agreement: str) -> Row:
    """ours, anchor: seconds a step."""
    said = [f"{batch / seconds:.1f} img/s" for seconds in (ours, anchor)]
    return Row(name, said[0], said[1], anchor / ours, f">= {at_least:g}x", anchor / ours >= at_least, agreement)


def enough_images(name: str, images: float, way: str, setup: Setup) -> Row:
    if setup.size != IMAGE:  # goals and roofline are of that size
        return Row(name, f"{images:.1f} img/s", "", None, "", None, "")
    at_least, roof = IMAGES_A_SECOND[way], ROOFLINE[way]
    agreement = f"{images / roof:.0%} of the roofline's {roof} img/s; {torch.cuda.get_device_name()}"
    return Row(name, f"{images:.1f} img/s", "", None, f">= {at_least} img/s", images >= at_least, agreement)


def gibibytes(value: int) -> str:
    return f"{value / 2**30:.1f} GiB"


if __name__ == "__main__":
    run(measure, __doc__)
