"""One global batch and one evaluation on one process and on two: the same losses, gradients, weights and AP."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils.data import DataLoader

from msil.data.module import collate
from msil.detection import Detections, Detector, Target
from msil.metrics.coco import CocoMetric
from msil.training.devices import OneStreamDDP

from .cases import load, module_of, tiny_config
from .one_step import assert_same_gradients, batch_of, one_step, share

HEADS = ("fcos", "vfnet")
# Objects of the four images; the first process has the first and the third of them.
BATCHES = {"both": (3, 1, 2, 4), "one has none": (3, 0, 2, 0), "one object in all": (0, 1, 0, 0), "none": (0, 0, 0, 0)}
# Head, batch, and trainer.accumulate.
Case = tuple[str, str, int]
CASES: list[Case] = [(head, *which) for head in HEADS for which in (("both", 2), ("one has none", 1))]
CASES += [("fcos", "none", 1), ("vfnet", "one object in all", 1)]
# (height, width) of the images to evaluate: in any batch of them some would pad others.
SIDES = ((64, 96), (64, 64), (96, 64), (48, 80), (64, 96), (80, 80), (40, 64))


def step_of(case: Case, rank: int, world_size: int, folder: Path, **settings: Any) -> dict[str, Any]:
    head, name, parts = case
    # fast_start: gradients of levels without a positive point nearly cancel to zero.
    typed = (f"model/head={head}", f"trainer.accumulate={parts}", "model.head.fast_start=false")
    config = tiny_config("runs", "data", *typed)
    batch = batch_of(BATCHES[name], sizes=[(64, 96)] * 4)  # points in the padding of a process's batch count
    return vars(one_step(config, share(batch, rank, world_size), folder, **settings))


def detector_of(head: str) -> Any:
    """A module whose random detector finds much in noise."""
    module = module_of(tiny_config("runs", "data", f"model/head={head}", "model.score_thresh=0.4"))
    detector = module.detector
    assert isinstance(detector, Detector)
    with torch.no_grad():
        detector.head.cls_logits.weight.mul_(30)
        assert detector.head.cls_logits.bias is not None
        detector.head.cls_logits.bias.zero_()
        detector.head.bbox_reg.bias.fill_(1.5 if head == "fcos" else -1.8)  # pyright: ignore
    return module


def images_of() -> list[tuple[Tensor, Target]]:
    generator = torch.Generator().manual_seed(3)
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    return [
        (torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8), Target(*nothing, i, size))
        for i, size in enumerate(SIDES)
    ]


def truth_of(head: str) -> dict[str, Tensor]:
    """Every third of what the detector finds in an image, moved a little, so that AP is neither 0 nor 1."""
    detector: Detector = detector_of(head).detector
    images, boxes, labels = [], [], []
    for image, target in images_of():
        (found,) = detector.predict([image])
        assert isinstance(found, Detections) and len(found.boxes) > 10
        for place in range(0, len(found.boxes), 3):
            x1, y1, x2, y2 = found.boxes[place].tolist()
            width, height = (x2 - x1) * (0.67 + 0.1 * (place % 4)), y2 - y1  # no IoU at a threshold
            images.append(target.image_id)
            boxes.append([x1, y1, width, height])
            labels.append(int(found.labels[place]))
    return {
        "truth_images": torch.tensor(images), "truth_labels": torch.tensor(labels),
        "truth_boxes": torch.tensor(boxes, dtype=torch.float64),
        "truth_areas": torch.tensor([width * height for *_, width, height in boxes], dtype=torch.float64),
        "truth_ignored": torch.zeros(len(boxes), dtype=torch.bool),
    }  # fmt: skip


def metric_of(truth: dict[str, Tensor]) -> CocoMetric:
    images = np.arange(len(SIDES))
    names = [f"{i}.png" for i in images]
    columns = {name: column.numpy() for name, column in truth.items()}
    return CocoMetric(
        SimpleNamespace(classes=list("0123"), category_ids=(1, 2, 3, 4), image_ids=images, file_names=names,
                        sizes=np.array(SIDES), **columns)
    )  # fmt: skip


def evaluation_of(head: str, truth: dict[str, Tensor], rank: int, world_size: int, size: int, **settings: Any) -> Any:
    """The 12 numbers of the final evaluation, through the Trainer, in batches of `size` images a process."""
    module = detector_of(head)
    module.metrics.append(metric_of(truth))
    module.final_evaluation = True
    trainer = L.Trainer(
        **{"accelerator": "cpu", "devices": 1, **settings}, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    loader = DataLoader(images_of()[rank::world_size], batch_size=size, collate_fn=collate)  # pyright: ignore
    trainer.validate(module, loader, verbose=False)
    return module.final_metrics


def work(rank: int, folder: str, cases: list[Case], heads: tuple[str, ...]) -> None:
    """One of the two processes."""
    torch.set_num_threads(1)
    # As torchrun starts a process: Lightning then starts none of its own.
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "a test",
    }  # fmt: skip
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(minutes=2)
    )
    try:
        for number, case in enumerate(cases):
            step = step_of(case, rank, 2, Path(folder), devices=2, strategy=OneStreamDDP())
            torch.save(step, f"{folder}/step {number} {rank}.pt")
        for head in heads:
            truth = load(Path(folder) / f"{head} truth.pt")
            numbers = evaluation_of(head, truth, rank, 2, 2, devices=2, strategy=OneStreamDDP())
            torch.save(numbers, f"{folder}/{head} {rank}.pt")
    finally:
        dist.destroy_process_group()


def two_processes(path: Path, cases: list[Case], heads: tuple[str, ...] = ()) -> Path:
    """The folder with all that they computed, as files."""
    context = mp.get_context("spawn")
    ranks = [context.Process(target=work, args=(rank, str(path), cases, heads), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
    assert [process.exitcode for process in ranks] == [0, 0]
    return path


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    for head in HEADS:
        torch.save(truth_of(head), path / f"{head} truth.pt")
    return two_processes(path, CASES, HEADS)


def assert_same_step(case: Case, number: int, folder: Path, alone: Path) -> None:
    name = case[1]
    expected = step_of(case, 0, 1, alone)
    assert (expected["logged"]["loss_bbox"] > 0) == (sum(BATCHES[name]) > 0)
    ranks = [load(folder / f"step {number} {rank}.pt") for rank in range(2)]
    for step in ranks:
        assert step["logged"] == pytest.approx(expected["logged"], rel=1e-6)
        assert_same_gradients(step["gradients"], expected["gradients"])
        assert_same_gradients(step["clipped"], expected["clipped"])
    for key, value in ranks[0]["weights"].items():
        assert torch.equal(value, ranks[1]["weights"][key]), key


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_is_the_same_on_two_processes(computed: Path, tmp_path: Path, case: Case) -> None:
    assert_same_step(case, CASES.index(case), computed, tmp_path)


@pytest.mark.parametrize("head", HEADS)
def test_the_numbers_are_the_same_on_two_processes(computed: Path, head: str) -> None:
    """All twelve, exactly, and whatever the number of images that a process takes at a time."""
    truth = load(computed / f"{head} truth.pt")
    expected = evaluation_of(head, truth, 0, 1, 3)
    assert len(expected) == 12
    assert 0.05 < expected["AP"] < 0.95
    for rank in range(2):
        assert load(computed / f"{head} {rank}.pt") == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
    assert evaluation_of(head, truth, 0, 1, 7) == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
