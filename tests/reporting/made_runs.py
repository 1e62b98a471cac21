"""A folder of made-up finished runs on small images that exist, with detections that score what result.json says."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tests.metrics.cases import Found, Truth, make

from msil.metrics.coco import pycocotools_curves, summary
from msil.metrics.record import EvaluationRecord, write_record

from .cases import run

CLASSES = ("circle", "square")
IMAGES = 12
SIDE = 64


def evaluated(noise: float, seed: int, classes: tuple[str, ...] = CLASSES) -> EvaluationRecord:
    """Two objects an image, one of each class, but none in image 3; detections: these moved by `noise` pixels, and one
    wrong box an image."""
    place, generator = np.random.default_rng(0), np.random.default_rng(seed)
    truths: list[Truth] = []
    found: list[Found] = []
    for image in range(IMAGES):
        for label in (0, 1) if image != 3 else ():
            (x, y), (width, height) = place.uniform(0, 30, 2).tolist(), place.uniform(10, 30, 2).tolist()
            truths.append((image, label, [x, y, width, height]))
            moved = np.array([x, y, x + width, y + height]) + generator.normal(0, noise, 4)
            found.append((image, label, moved.tolist(), generator.uniform(0.2, 1)))
        score, label = generator.uniform(0.2, 1), int(generator.integers(2))
        found.append((image, label, [40, 40, 60, 60], score))
    names = np.array([f"val/{i}.png" for i in range(IMAGES)])
    return replace(make(truths, found, images=IMAGES, classes=classes, size=SIDE), file_names=names)


def write_run(runs: Path, data_root: Path, noise: float, seed: int, classes: tuple[str, ...] = CLASSES, **switches: Any
) -> dict[str, Any]:  # fmt: skip
    """One finished run, "seed" its seed; the others are `run`'s settings. Returns what its result.json holds."""
    one = evaluated(noise, seed + 100 * int(10 * noise), classes)
    result = run(seed, **switches)
    result["metrics"] = {
        name: value for name, value in summary(*pycocotools_curves(one)).items() if name in ("AP", "AP50", "AP75")
    }
    result["config"]["data"]["root"] = str(data_root)
    result["classes"] = list(classes)
    folder = runs / result["run_name"]
    folder.mkdir(parents=True)
    write_record(folder, one)
    (folder / "result.json").write_text(json.dumps(result))
    with (folder / "metrics.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["epoch", "step", "loss", "AP"])
        rows.writerows([[0, 0, 2.0, ""], [0, 5, 1.5, 0.1], [1, 10, 1.0, result["metrics"]["AP"]]])
    return result


def write_runs(folder: Path, classes: tuple[str, ...] = CLASSES) -> list[dict[str, Any]]:
    """folder/runs: plain and MSIL with seeds 0 and 1, cls with seed 0, MSIL better; folder/data: their images."""
    data = folder / "data"
    (data / "val").mkdir(parents=True)
    for i in range(IMAGES):
        Image.fromarray(np.full((SIDE, SIDE, 3), 40 + 15 * i, dtype=np.uint8)).save(data / "val" / f"{i}.png")
    runs = folder / "runs"
    made = [write_run(runs, data, 3.0, seed, classes, apply="none") for seed in (0, 1)]
    made += [write_run(runs, data, 1.0, seed, classes, apply="both") for seed in (0, 1)]
    return [*made, write_run(runs, data, 2.0, 0, classes, apply="cls")]
