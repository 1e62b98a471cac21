"""P4: how often the host waits for the device in a training step: forward, loss, backward, optimizer.

    python -m benchmarks.host_syncs

Ours is a step of Detector.loss and fused SGD. torchvision's is that of its reference training: losses, their sum read
for the log and the check for NaN, backward, SGD. MMDetection's (extra `benchmarks`) is its VFNet head's loss alone,
forward and backward.

Waits are counted on the CPU, by the operators whose result's value or shape the host has to know. On a GPU
benchmarks/gpu asks the same of set_sync_debug_mode. Also asserted: on torch's meta device, whose tensors have no
values, a step of the net and its loss runs through.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torchvision.models.detection import fcos_resnet50_fpn

from benchmarks.compare import NotRun, Row, counted, run
from benchmarks.mmdetection import instances, vfnet_head
from benchmarks.operators import HostSyncs
from benchmarks.scenes import IMAGE, ground_truth
from benchmarks.vfnet_loss import IMAGES, outputs, theirs_of
from msil.detection import Detector, build_detector
from msil.detection.heads import HEADS


def detector(head: str) -> Detector:
    return build_detector(HEADS[head].Options(num_convs=1), "resnet10", 4, channels=64)


def our_step(head: str) -> list[str]:
    """The waits of the second step: the first one makes grids and the optimizer's state."""
    net = detector(head)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9, fused=True)
    images = [torch.randint(256, (3, 64, 64), dtype=torch.uint8) for _ in range(2)]
    targets = ground_truth(images=2, boxes=3, classes=4, size=(64, 64))
    found: list[str] = []
    for _ in range(2):
        with HostSyncs() as counter:
            losses = net.loss(images, targets)
            optimizer.zero_grad()
            torch.stack(list(losses.values())).sum().backward()
            optimizer.step()
        found = counter.found
    return found


def torchvision_step() -> list[str]:
    net = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=80, min_size=64, max_size=64)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)
    images = [torch.rand(3, 64, 64) for _ in range(2)]
    targets = [{"boxes": t.boxes, "labels": t.labels} for t in ground_truth(images=2, boxes=3, size=(64, 64))]
    net.transform.torch_choice = lambda k: k[0]  # drawn on the host, where nobody waits for a GPU
    with HostSyncs() as counter:
        losses = net(images, targets)
        total = sum(losses.values())
        assert total.item() < float("inf")  # pyright: ignore
        optimizer.zero_grad()
        total.backward()  # pyright: ignore
        optimizer.step()
    return counter.found


def mmdetection_loss() -> list[str] | None:
    """None without MMDetection."""
    try:
        head = vfnet_head(80)
    except NotRun:
        return None
    tensors, truth = outputs(), instances(ground_truth(IMAGES, 7), IMAGE)
    with HostSyncs() as counter:
        losses = theirs_of(head, tensors, truth)
        torch.stack(list(losses.values())).sum().backward()
    return counter.found


def on_meta(head: str) -> None:
    """A step without values; raises where one is asked for."""
    images = [torch.zeros(3, 64, 64, dtype=torch.uint8, device="meta") for _ in range(2)]
    losses = detector(head).to("meta").loss(images, ground_truth(images=2, boxes=3, classes=4, size=(64, 64)))
    torch.stack(list(losses.values())).sum().backward()


def measure() -> Iterator[Row]:
    for head, theirs in {"fcos": torchvision_step(), "vfnet": mmdetection_loss()}.items():
        on_meta(head)
        found = our_step(head)
        said = ", ".join(f"{count} {name}" for name, count in Counter(found).items()) or "none"
        anchor = "" if theirs is None else len(theirs)
        yield counted(f"P4 host syncs of a {head} training step", len(found), anchor, 0, f"{said}; a step ran on meta")


if __name__ == "__main__":
    run(measure, __doc__)
