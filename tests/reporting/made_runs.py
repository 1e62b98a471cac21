"""A folder of made-up finished runs on small images that exist, with detections that score what result.json says."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from msil.metrics.coco import pycocotools_stats
from msil.metrics.record import EvaluationRecord, write_record

from .cases import run

CLASSES = ("circle", "square")
IMAGES = 12
SIDE = 64


def truths() -> dict[str, np.ndarray]:
    """Two objects an image, one of each class; image 3 has none."""
    generator = np.random.default_rng(0)
    images = np.repeat([i for i in range(IMAGES) if i != 3], 2)
    corner, sides = generator.uniform(0, 30, (len(images), 2)), generator.uniform(10, 30, (len(images), 2))
    return {
        "truth_images": images,
        "truth_boxes": np.concatenate([corner, sides], axis=1),
        "truth_areas": sides.prod(axis=1),
        "truth_labels": np.arange(len(images)) % 2,
        "truth_ignored": np.zeros(len(images), dtype=bool),
    }


def record(noise: float, seed: int, classes: tuple[str, ...] = CLASSES) -> EvaluationRecord:
    """Detections: the truths moved by `noise` pixels, and one wrong box an image."""
    generator = np.random.default_rng(seed)
    asked = truths()
    corners = asked["truth_boxes"].copy()
    corners[:, 2:] += corners[:, :2]
    found = corners + generator.normal(0, noise, corners.shape)
    wrong = np.tile([40.0, 40.0, 60.0, 60.0], (IMAGES, 1)) + generator.normal(0, 1, (IMAGES, 4))
    images = np.concatenate([asked["truth_images"], np.arange(IMAGES)])
    order = np.argsort(images, kind="stable")
    labels = np.concatenate([asked["truth_labels"], generator.integers(0, 2, IMAGES)])
    return EvaluationRecord(
        classes=np.array(classes),
        category_ids=np.array([1, 3]),
        image_ids=np.arange(IMAGES) * 2 + 1,
        file_names=np.array([f"val/{i}.png" for i in range(IMAGES)]),
        sizes=np.full((IMAGES, 2), SIDE),
        found_images=images[order],
        found_boxes=np.concatenate([found, wrong])[order].astype(np.float32),
        found_scores=generator.uniform(0.2, 1, len(images)).astype(np.float32),
        found_labels=labels[order],
        **asked,
    )


def write_run(runs: Path, data_root: Path, noise: float, seed: int, classes: tuple[str, ...] = CLASSES, **switches: Any
) -> dict[str, Any]:  # fmt: skip
    """One finished run, "seed" its seed; the others are `run`'s settings. Returns what its result.json holds."""
    one = record(noise, seed + 100 * int(10 * noise), classes)
    result = run(seed, **switches)
    result["metrics"] = {
        name: value for name, value in pycocotools_stats(one).items() if name in ("AP", "AP50", "AP75")
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
