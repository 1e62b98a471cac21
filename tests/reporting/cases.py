"""Results of made-up runs, complete as a run writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

METRICS = {"AP": 0.4205, "AP50": 0.6, "AP75": 0.4, "APs": None, "APm": 0.3, "APl": 0.5}


def result(
    run_name: str = "one",
    *,
    metrics: Mapping[str, float | None] = METRICS,
    model: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    schedule: Mapping[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """model: settings of model.msil ("apply", "align", ...), "head", "backbone", "weights". data, schedule: changes."""
    block = {"align": True, "separate": True, "apply": "both", "kernel_size": 3}
    names = {"head": "fcos", "backbone": "resnet10", "weights": None}
    for key, value in (model or {}).items():
        (block if key in block else names)[key] = value
    config = {
        "model": {
            "backbone": {"name": names["backbone"], "weights": names["weights"]},
            "head": {"name": names["head"]},
            "msil": block,
            "channels": 64,
        },
        "data": {"name": "shapes", "root": "/home/me/data/shapes_1", "min_size": 128, "max_size": 128, **(data or {})},
        "schedule": {"name": "quick", "epochs": 12, **(schedule or {})},
        "seed": 0,
        "runs_dir": "runs",
    }
    return {
        "run_name": run_name,
        "status": "finished",
        "config_hash": "1a2b3c4d",
        "seed": 0,
        "command": "python run.py",
        "metrics": dict(metrics),
        "parameters": 4_150_000,
        "trainable_parameters": 4_100_000,
        "flops": 2_345_678_901,
        "flops_image_size": [128, 128],
        "images_per_second": 40.0,
        "train_seconds": 200.0,
        "total_seconds": 215.4,
        "epochs": config["schedule"]["epochs"],
        "steps": 600,
        "train_images": 400,
        "val_images": 100,
        "classes": ["circle", "square"],
        "versions": {"torch": "2.14.1"},
        "machine": {"cpu_count": 2},
        "config": config,
        **changes,
    }


def failed(run_name: str, exit_code: int | None, status: str = "failed", **model: Any) -> dict[str, Any]:
    config = result(model=model)["config"]
    return {"run_name": run_name, "status": status, "exit_code": exit_code, "config": config}


def as_in_the_paper(**model: Any) -> dict[str, Any]:
    """A run by the recipe of Tables 1, 2 and 4."""
    run = result(
        model={"head": "vfnet", "backbone": "resnet50", "weights": "imagenet", **model},
        data={"name": "coco", "root": "data/coco", "min_size": 800, "max_size": 1333},
        schedule={"name": "1x", "epochs": 12},
        train_images=117_266,  # COCO train2017's 118,287 without the 1,021 that have no box
        val_images=5_000,
        classes=[f"class {i}" for i in range(80)],
    )
    run["config"]["model"]["channels"] = 256
    run["config"]["data"]["classes"] = None
    return run


def run(
    seed: int = 0, *, head: str = "vfnet", backbone: str = "resnet10", apply: str = "both", align: bool = True,
    separate: bool = True, ap: float = 0.4, kernel_size: int = 3, options: Mapping[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:  # fmt: skip
    """A run of a table's row. options: of the head."""
    block = {"apply": apply, "align": align, "separate": separate, "kernel_size": kernel_size}
    name = f"{head}_{backbone}_{apply}_{align}_{separate}_{kernel_size}_s{seed}"
    found = result(name, model={"head": head, "backbone": backbone, **block}, metrics={"AP": ap, "AP50": 2 * ap})
    found["config"]["model"]["head"] |= options or {}
    found["config"]["seed"] = found["seed"] = seed
    return {**found, **changes}
