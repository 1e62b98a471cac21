"""How close a trained plain detector stays to itself when MSIL is added to it, by the gates' value at the start.

    python benchmarks/open_gates.py CHECKPOINT DATA_ROOT SPLIT

CHECKPOINT: of a run with model.msil.apply=none. DATA_ROOT: a set in COCO's layout, e.g. what data=shapes wrote.
"""

from __future__ import annotations

import argparse
import dataclasses

import torch

from msil.checkpoints.assemble import detector_from_config
from msil.checkpoints.load import load_detector
from msil.config import MSILConfig
from msil.data.annotations import AnnotatedImages
from msil.data.module import build_split
from msil.detection import Detector
from msil.metrics.coco import CocoMetric

GATES = (0.5, 0.9, 0.99, 0.999)


def average_precision(detector: Detector, data: AnnotatedImages) -> float:
    metric = CocoMetric(data.annotations)
    for index in range(len(data)):
        image, target = data[index]
        metric.update(detector.predict([image]), [target.image_id])
    return metric.compute()["AP"]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("checkpoint", "root", "split"):
        parser.add_argument(name)
    options = parser.parse_args()
    plain, description = load_detector(options.checkpoint)
    data = build_split({"name": "coco", "root": options.root, "classes": description.classes}, options.split)
    images = [data[index][0] for index in range(min(8, len(data)))]
    before = plain(images)
    print(f"plain detector: AP {100 * average_precision(plain, data):.2f}")
    print("separate  gate   AP     largest change of a probability, of a distance")
    for separate in (True, False):
        for gate in GATES:
            torch.manual_seed(0)
            block = MSILConfig(separate=separate, init_gate=gate if gate > 0.5 else None)
            head = {**description.model.head, "fast_start": False}  # which opens the gates by itself
            model = dataclasses.replace(description.model, msil=block, head=head)
            sides = (description.min_size, description.max_size)
            detector = detector_from_config(model, len(description.classes), *sides).eval()
            detector.load_state_dict(plain.state_dict(), strict=False)
            after = detector(images)
            probability = (after.logits.sigmoid() - before.logits.sigmoid()).abs().max()
            distance = ((after.box - before.box).abs() / before.box.abs().clamp(min=1e-6)).max()
            print(
                f"{separate!s:8}  {gate:<5}  {100 * average_precision(detector, data):.2f}  "
                f"{float(probability):.4f}  {100 * float(distance):.2f} %",
                flush=True,
            )


if __name__ == "__main__":
    main()
