"""Random but realistic COCO cases for the tests of this folder."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from msil.detection.structures import Detections

CATEGORY_IDS = (1, 3, 4, 18, 90)  # with gaps; 90 never has a box


def random_ground_truth(seed: int, num_images: int = 14) -> dict[str, Any]:
    """Crowds, images without boxes, boxes of all sizes, areas of masks, unsorted image ids, annotation ids from 0."""
    rng = np.random.default_rng(seed)
    image_ids = rng.choice(1000, num_images, replace=False).tolist()
    annotations = []
    for image_id in image_ids[:-2]:  # the last two have no box
        for _ in range(rng.integers(1, 9)):
            width, height = np.exp(rng.uniform(np.log(6), np.log(300), 2)).round(2).tolist()
            x, y = rng.uniform(-5, 300, 2).round(2).tolist()
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": image_id,
                    "category_id": int(rng.choice(CATEGORY_IDS[:-1])),
                    "bbox": [x, y, width, height],
                    "area": float(width * height * rng.uniform(0.4, 1)),
                    "iscrowd": int(rng.random() < 0.15),
                }
            )
    return {
        "images": [{"id": i, "width": 640, "height": 480, "file_name": f"{i}.jpg"} for i in image_ids],
        "categories": [{"id": c, "name": f"class {c}"} for c in CATEGORY_IDS],
        "annotations": annotations,
    }


def jittered(ground_truth: dict[str, Any], category_ids: tuple[int, ...], seed: int) -> dict[int, Detections]:
    """Detections by image id: moved, doubled, missed and mislabelled ground truth and false ones, with tied scores."""
    rng = np.random.default_rng(seed)
    labels_of = {c: label for label, c in enumerate(category_ids)}
    found = {}
    for image in ground_truth["images"]:
        rows = []
        for annotation in ground_truth["annotations"]:
            if annotation["image_id"] != image["id"]:
                continue
            x, y, width, height = annotation["bbox"]
            for _ in range(rng.choice([0, 1, 1, 2, 4])):
                shift = rng.normal(0, 0.06, 4) * [width, height, width, height]
                moved = np.array([x, y, x + width, y + height]) + shift
                wrong = rng.random() < 0.1
                label = int(rng.integers(len(category_ids))) if wrong else labels_of[annotation["category_id"]]
                rows.append((moved, label, rng.uniform(0.2, 1)))
        for _ in range(rng.integers(0, 6)):
            corner = rng.uniform(0, 250, 2)
            rows.append((np.concatenate([corner, corner + rng.uniform(5, 200, 2)]), 0, rng.uniform(0, 0.7)))
        rows.sort(key=lambda row: -round(row[2], 1))
        boxes = np.array([row[0] for row in rows], dtype=np.float32).reshape(-1, 4)
        found[image["id"]] = Detections(
            torch.from_numpy(boxes),
            torch.tensor([round(row[2], 1) for row in rows], dtype=torch.float32),
            torch.tensor([row[1] for row in rows], dtype=torch.int64),
        )
    return found


def nothing() -> Detections:
    return Detections(torch.zeros((0, 4)), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
