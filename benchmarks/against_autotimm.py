"""AutoTimm 0.7.37's FCOS (Lightning and timm, as msil) and ours on the same images, from the same ImageNet weights.

    python -m venv both && both/bin/pip install -e ".[train,timm]" autotimm==0.7.37 albumentations
    both/bin/python -m benchmarks.against_autotimm --root VOC2007 --weights tf_efficientnet_lite0.safetensors

Both train on `train` and are scored on `val` by the same program, pycocotools on the boxes of the files: long side 256,
8 images a step, 64 channels, two convolutions a tower, AdamW, half a cosine, one thread, images read in the process.
Theirs pads images to squares, changes their colours, and has one learning rate for a net of which nothing is frozen;
ours is schedule=transfer with two frozen stages. Each is a process of its own. Seconds are those of its CPU, in the
training alone; ours are those of the run less those of scoring its checkpoint, which also start and read. Prints a line
of JSON for each.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from msil.detection import Detections

SIDE, BATCH, CHANNELS, CONVS = 256, 8, 64, 2
NET = "tf_efficientnet_lite0"


def ours(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    train = [
        "data=voc", f"data.root={options.root}", f"data.min_size={SIDE}", f"data.max_size={SIDE}", "data.workers=0",
        f"data.batch_size={BATCH}", "schedule=transfer", f"schedule.epochs={options.epochs}",
        "schedule.eval_every=1000",
        "model/backbone=timm", f"model.backbone.name={NET}", f"model.backbone.weights={options.weights}",
        "model.backbone.frozen_stages=2", f"model.channels={CHANNELS}", f"model.head.num_convs={CONVS}",
        "model.msil.apply=none", "run_name=trained",
    ]  # fmt: skip
    seconds = []
    for typed in (train, ["mode=test", f"model.weights={folder / 'trained'}", "run_name=tested"]):
        subprocess.run([sys.executable, "run.py", *typed, f"runs_dir={folder}"], check=True, stdout=subprocess.DEVNULL)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(used.ru_utime + used.ru_stime - sum(seconds))
    result = json.loads((folder / "trained" / "result.json").read_text())
    return row("msil", result["metrics"], options.epochs * result["train_images"] / (seconds[0] - seconds[1]), used)


def theirs(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from autotimm import (  # pyright: ignore[reportMissingImports]
        DetectionDataModule,
        FeatureBackboneConfig,
        ObjectDetector,
    )
    from pytorch_lightning import Trainer, seed_everything

    from msil.data.module import build_split
    from msil.metrics.coco import CocoMetric

    splits = {name: build_split({"name": "voc", "root": options.root}, name).annotations for name in ("train", "val")}
    for name, split in splits.items():
        (folder / f"{name}.json").write_text(json.dumps(as_coco(split)))
    seed_everything(0)
    # What a user of theirs writes begins here ...
    data = DetectionDataModule(
        train_images_dir=options.root, val_images_dir=options.root, train_ann_file=folder / "train.json",
        val_ann_file=folder / "val.json", image_size=SIDE, batch_size=BATCH, num_workers=0, pin_memory=False,
    )  # fmt: skip
    body = FeatureBackboneConfig(NET, extra_kwargs={"pretrained_cfg_overlay": {"file": str(options.weights)}})
    net = ObjectDetector(
        body, 20, fpn_channels=CHANNELS, head_num_convs=CONVS, lr=options.lr, seed=0, compile_model=options.compile
    )
    trainer = Trainer(
        max_epochs=options.epochs, accelerator="cpu", logger=False, enable_checkpointing=False, limit_val_batches=0,
        gradient_clip_val=10.0,
    )  # fmt: skip
    begun = time.process_time()
    trainer.fit(net, data)
    # ... and ends here.
    speed = options.epochs * len(data.train_dataset) / (time.process_time() - begun)
    metric = CocoMetric(splits["val"])
    net.eval()
    seen: set[int] = set()
    with torch.inference_mode():
        for one in (data.val_dataset[index] for index in range(len(data.val_dataset))):
            found = in_the_image(net.predict(one["image"][None])[0], one["orig_size"].tolist())
            metric.update([found], [one["image_id"]])
            seen.add(one["image_id"])
    metric.update(*nothing_on([image for image in splits["val"].image_ids.tolist() if image not in seen]))
    return row(f"AutoTimm, lr {options.lr:g}", metric.compute_final(), speed, resource.getrusage(resource.RUSAGE_SELF))


def as_coco(split: Any) -> dict[str, Any]:
    """Our reading of a split as COCO json; difficult boxes are crowds, which neither trains on."""
    ids = split.image_ids.tolist()
    images = zip(ids, split.file_names, split.sizes.tolist(), strict=True)
    boxes = zip(
        split.truth_images, split.truth_labels, split.truth_boxes, split.truth_areas, split.truth_ignored, strict=True
    )
    return {
        "images": [{"id": i, "file_name": name, "width": w, "height": h} for i, name, (h, w) in images],
        "categories": [{"id": i, "name": name} for i, name in zip(split.category_ids, split.classes, strict=True)],
        "annotations": [
            {"id": number, "image_id": ids[image], "category_id": split.category_ids[label], "bbox": box.tolist(),
             "area": float(area), "iscrowd": int(ignored)}
            for number, (image, label, box, area, ignored) in enumerate(boxes, 1)
        ],
    }  # fmt: skip


def in_the_image(found: dict[str, torch.Tensor], size: list[int]) -> Detections:
    """Boxes in the padded square -> in the pixels of the image, height and width, as it was."""
    height, width = size
    scale = SIDE / max(height, width)
    left, top = ((SIDE - round(side * scale)) // 2 for side in (width, height))
    boxes = (found["boxes"] - torch.tensor([left, top, left, top])) / scale
    low, high = torch.zeros(4), torch.tensor([width, height, width, height])
    return Detections(boxes.clamp(low, high), found["scores"], found["labels"])


def nothing_on(images: list[int]) -> tuple[list[Detections], list[int]]:
    """Images without boxes, which their loader leaves out: they count as without detections."""
    none = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    return [none] * len(images), images


def row(name: str, metrics: dict[str, float], speed: float, used: Any) -> dict[str, Any]:
    return {
        "detector": name, "AP": round(metrics["AP"], 4), "AP50": round(metrics["AP50"], 4),
        "images a CPU second": round(speed, 2), "peak memory in GB": round(used.ru_maxrss / 1e6, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--root", type=Path, required=True, help="VOC 2007, or another set in its layout of its classes"
    )
    parser.add_argument("--weights", type=Path, required=True, help=f"timm's file of {NET}")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3, help="of AutoTimm; ours is that of schedule=transfer")
    parser.add_argument("--compile", action="store_true", help="compile AutoTimm's net, which is its default")
    parser.add_argument("--only", choices=("ours", "theirs"))
    options = parser.parse_args()
    options.root, options.weights = options.root.resolve(), options.weights.resolve()
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.only is None:
        for one in ("ours", "theirs"):
            subprocess.run(
                [sys.executable, "-m", "benchmarks.against_autotimm", *sys.argv[1:], "--only", one], check=True
            )
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({"ours": ours, "theirs": theirs}[options.only](options, Path(folder))), flush=True)


if __name__ == "__main__":
    main()
