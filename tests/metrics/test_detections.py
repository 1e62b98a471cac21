"""Collecting detections: order, resets, mistakes, and two processes."""

from __future__ import annotations

import copy
import multiprocessing
import random
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from msil.detection.structures import Detections
from msil.metrics.coco import CocoMetric
from msil.metrics.detections import DetectionMetric
from msil.metrics.voc import VOCMetric

from .cases import detections_of, nothing, random_record, updated

METRICS = [CocoMetric, VOCMetric]
RECORD = random_record(3)
IMAGE_IDS = RECORD.image_ids.tolist()


def numbers(metric: Any) -> dict[str, dict]:
    rest = metric.compute_final() if isinstance(metric, CocoMetric) else {}
    # repr keeps every digit and makes nan equal to nan
    return {"compute": {k: repr(v) for k, v in metric.compute().items()}, "rest": {k: repr(v) for k, v in rest.items()}}


@pytest.mark.parametrize("kind", METRICS)
def test_order_resets_and_copies(kind: Any) -> None:
    expected = numbers(updated(kind(RECORD), RECORD))
    metric = updated(kind(RECORD), RECORD, range(4))
    part = numbers(metric)
    twin = copy.deepcopy(metric)
    others = list(range(4, 12))
    random.Random(0).shuffle(others)
    assert numbers(updated(twin, RECORD, others)) == expected
    assert numbers(metric) == part != expected
    twin.reset()
    assert numbers(updated(twin, RECORD, range(4))) == part


@pytest.mark.parametrize("kind", METRICS)
def test_an_image_evaluated_twice_is_an_error(kind: Any) -> None:
    metric = updated(kind(RECORD), RECORD, range(4))
    metric.update([nothing()], [IMAGE_IDS[2]])  # noticed also without a detection
    with pytest.raises(RuntimeError, match=rf"more than once, the first with id {IMAGE_IDS[2]}:"):
        metric.compute()


def test_mistakes_are_refused() -> None:
    metric = CocoMetric(RECORD)
    with pytest.raises(ValueError, match="1 detections were given for 2 image ids"):
        metric.update([nothing()], IMAGE_IDS[:2])
    with pytest.raises(ValueError, match=r"\[5000\] are not in the ground truth"):
        metric.update([nothing()], [5000])
    box, score, label = torch.tensor([[0.0, 0, 5, 5]]), torch.tensor([0.5]), torch.tensor([0])
    for broken, message in [
        (Detections(box * torch.nan, score, label), f"image {IMAGE_IDS[0]} have boxes or scores that are not finite"),
        (Detections(box, score * torch.inf, label), f"image {IMAGE_IDS[0]} have boxes or scores that are not finite"),
        (Detections(box, score, label + 5), rf"image {IMAGE_IDS[0]} has label 5, outside \[0, 5\)"),
        (Detections(box, score, label - 1), rf"image {IMAGE_IDS[0]} has label -1, outside \[0, 5\)"),
    ]:
        metric.reset()
        metric.update([broken], IMAGE_IDS[:1])
        with pytest.raises(ValueError, match=message):
            metric.compute()


def test_reduced_precision_is_stored_as_float32_on_the_device_of_the_metric() -> None:
    metric = CocoMetric(RECORD).to("meta")
    boxes = torch.tensor([[0.0, 0, 5, 5]], dtype=torch.bfloat16, requires_grad=True)
    metric.update([Detections(boxes, torch.tensor([0.5], dtype=torch.float16), torch.tensor([0]))], IMAGE_IDS[:1])
    assert [(s[-1].dtype, s[-1].device.type) for s in (metric.boxes, metric.scores, metric.image_ids)] == [
        (torch.float32, "meta"),
        (torch.float32, "meta"),
        (torch.int64, "meta"),
    ]
    assert not metric.boxes[-1].requires_grad


# name: (images of rank 0, images of rank 1), whether rank 1 detects anything
SHARES = {
    "uneven": (range(8), range(8, 12), True),
    "every second image": (range(0, 12, 2), range(1, 12, 2), True),
    "nothing detected on rank 1": (range(8), range(8, 12), False),
    "no update on rank 1": (range(12), range(0), True),
}


def fill(metric: Any, name: str, ranks: tuple[int, ...]) -> Any:
    metric.reset()
    for rank in ranks:
        for image in SHARES[name][rank]:
            found = detections_of(RECORD, image) if rank == 0 or SHARES[name][2] else nothing()
            metric.update([found], [IMAGE_IDS[image]])
    return metric


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    wait = timedelta(seconds=60)  # a gather that hangs fails instead
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", timeout=wait, rank=rank, world_size=2)
    results: dict[Any, Any] = {}
    for kind in METRICS:
        metric = kind(RECORD)  # one for all: resets between epochs must work on gathered states too
        for name in SHARES:
            results[kind.__name__, name] = numbers(fill(metric, name, (rank,)))
        metric.reset()
        metric.update([nothing(), nothing()], [IMAGE_IDS[rank], IMAGE_IDS[7]])
        try:
            metric.compute()
        except RuntimeError as error:
            results[kind.__name__, "twice"] = str(error)
    collector = fill(DetectionMetric(RECORD), "uneven", (rank,))
    assert collector.compute() == {}  # as the training loop does before; it must not spoil what follows
    results["gathered"] = torch.from_numpy(collector.gathered().found_boxes)
    results["alone"] = len(collector.collected().image_ids)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    # Most of the time is the import of torch and torchmetrics: done once, in the server that both are forked from.
    multiprocessing.set_forkserver_preload(["msil.metrics.coco"])
    start_processes(rank_main, args=(str(tmp_path),), nprocs=2, start_method="forkserver")
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for kind in METRICS:
        for name in SHARES:
            expected = numbers(fill(kind(RECORD), name, (0, 1)))
            assert ranks[0][kind.__name__, name] == ranks[1][kind.__name__, name] == expected, name
        assert f"the first with id {IMAGE_IDS[7]}:" in ranks[0][kind.__name__, "twice"]
    whole = torch.from_numpy(fill(DetectionMetric(RECORD), "uneven", (0, 1)).collected().found_boxes)
    assert all(torch.equal(rank["gathered"], whole) for rank in ranks)
    assert [rank["alone"] for rank in ranks] == [8, 4]
