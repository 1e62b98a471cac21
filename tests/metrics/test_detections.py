"""Collecting detections: order, resets, mistakes, and two processes."""

from __future__ import annotations

import copy
import multiprocessing
import random
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from msil.detection.structures import Detections
from msil.metrics.coco import CocoMetric
from msil.metrics.voc import VOCMetric

from .coco_cases import CATEGORY_IDS, jittered, nothing, random_ground_truth

SEED = 3
METRICS = [CocoMetric, VOCMetric]


def case() -> tuple[dict, dict[int, Detections], list[int]]:
    ground_truth = random_ground_truth(SEED)
    return ground_truth, jittered(ground_truth, CATEGORY_IDS, SEED), [image["id"] for image in ground_truth["images"]]


def numbers(metric: CocoMetric | VOCMetric) -> dict[str, dict]:
    rest = metric.compute_final() if isinstance(metric, CocoMetric) else metric.per_class()
    # repr keeps every digit and makes nan equal to nan
    return {"compute": {k: repr(v) for k, v in metric.compute().items()}, "rest": {k: repr(v) for k, v in rest.items()}}


@pytest.mark.parametrize("kind", METRICS)
def test_the_order_and_size_of_updates_do_not_matter(kind):
    ground_truth, found, image_ids = case()
    metric = kind(ground_truth, CATEGORY_IDS)
    metric.update([found[i] for i in image_ids], image_ids)
    expected = numbers(metric)
    metric.reset()
    random.Random(0).shuffle(image_ids)
    for image_id in image_ids:
        metric.update([found[image_id]], [image_id])
    assert numbers(metric) == expected


@pytest.mark.parametrize("kind", METRICS)
def test_reset_forgets_and_a_copy_goes_on_by_itself(kind):
    ground_truth, found, image_ids = case()
    metric = kind(ground_truth, CATEGORY_IDS)
    metric.update([found[i] for i in image_ids[:4]], image_ids[:4])
    expected = numbers(metric)
    twin = copy.deepcopy(metric)
    twin.update([found[i] for i in image_ids[4:]], image_ids[4:])
    assert numbers(twin) != expected and numbers(metric) == expected
    twin.reset()
    twin.update([found[i] for i in image_ids[:4]], image_ids[:4])
    assert numbers(twin) == expected


@pytest.mark.parametrize("kind", METRICS)
def test_an_image_evaluated_twice_is_an_error(kind):
    ground_truth, found, image_ids = case()
    metric = kind(ground_truth, CATEGORY_IDS)
    metric.update([found[i] for i in image_ids[:4]], image_ids[:4])
    metric.update([nothing()], [image_ids[2]])  # noticed also without a detection
    with pytest.raises(RuntimeError, match=rf"more than once, the first with id {image_ids[2]}:"):
        metric.compute()


def test_mistakes_are_refused():
    ground_truth, _, image_ids = case()
    metric = CocoMetric(ground_truth, CATEGORY_IDS)
    with pytest.raises(ValueError, match="1 detections were given for 2 image ids"):
        metric.update([nothing()], image_ids[:2])
    with pytest.raises(ValueError, match=r"\[5000\] are not in the ground truth"):
        metric.update([nothing()], [5000])
    with pytest.raises(ValueError, match=r"\[2\] are not among the categories"):
        CocoMetric(ground_truth, (1, 2, 3))
    box, score, label = torch.tensor([[0.0, 0, 5, 5]]), torch.tensor([0.5]), torch.tensor([0])
    for broken, message in [
        (Detections(box * torch.nan, score, label), f"image {image_ids[0]} have boxes or scores that are not finite"),
        (Detections(box, score * torch.inf, label), f"image {image_ids[0]} have boxes or scores that are not finite"),
        (Detections(box, score, label + 5), rf"image {image_ids[0]} has label 5, outside \[0, 5\)"),
        (Detections(box, score, label - 1), rf"image {image_ids[0]} has label -1, outside \[0, 5\)"),
    ]:
        metric.reset()
        metric.update([broken], image_ids[:1])
        with pytest.raises(ValueError, match=message):
            metric.compute()


def test_reduced_precision_is_stored_as_float32_on_the_device_of_the_metric():
    ground_truth, _, image_ids = case()
    metric = CocoMetric(ground_truth, CATEGORY_IDS).to("meta")
    boxes = torch.tensor([[0.0, 0, 5, 5]], dtype=torch.bfloat16, requires_grad=True)
    metric.update([Detections(boxes, torch.tensor([0.5], dtype=torch.float16), torch.tensor([0]))], image_ids[:1])
    assert [(s[0].dtype, s[0].device.type) for s in (metric.boxes, metric.scores, metric.image_ids)] == [
        (torch.float32, "meta"),
        (torch.float32, "meta"),
        (torch.int64, "meta"),
    ]
    assert not metric.boxes[0].requires_grad


# name: (images of rank 0, images of rank 1) as slices of the image ids, whether rank 1 detects anything
SHARES = {
    "uneven": (slice(0, 9), slice(9, None), True),
    "every second image": (slice(0, None, 2), slice(1, None, 2), True),
    "nothing detected on rank 1": (slice(0, 9), slice(9, None), False),
    "no update on rank 1": (slice(0, None), slice(0, 0), True),
}


def share(name: str, rank: int) -> tuple[dict[int, Detections], list[int]]:
    _, found, image_ids = case()
    first, second, rank_1_detects = SHARES[name]
    if not rank_1_detects:
        found.update({i: nothing() for i in image_ids[second]})
    return found, image_ids[(first, second)[rank]]


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    wait = timedelta(seconds=60)  # a gather that hangs fails instead
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", timeout=wait, rank=rank, world_size=2)
    ground_truth, found, image_ids = case()
    results = {}
    for kind in METRICS:
        metric = kind(ground_truth, CATEGORY_IDS)
        for name in SHARES:  # one metric for all: resets between epochs must work on gathered states too
            metric.reset()
            found, mine = share(name, rank)
            for start in range(0, len(mine), 2):
                metric.update([found[i] for i in mine[start : start + 2]], mine[start : start + 2])
            results[kind.__name__, name] = numbers(metric)
        metric.reset()
        metric.update([nothing(), nothing()], [image_ids[rank], image_ids[7]])
        try:
            metric.compute()
        except RuntimeError as error:
            results[kind.__name__, "twice"] = str(error)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_two_processes_give_the_numbers_of_one(tmp_path: Path):
    # Most of the time is the import of torch and torchmetrics: done once, in the server that both are forked from.
    multiprocessing.set_forkserver_preload(["msil.metrics.coco"])
    start_processes(rank_main, args=(str(tmp_path),), nprocs=2, start_method="forkserver")
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    ground_truth, _, image_ids = case()
    for kind in METRICS:
        for name in SHARES:
            metric = kind(ground_truth, CATEGORY_IDS)
            found, _ = share(name, 0)
            metric.update([found[i] for i in image_ids], image_ids)
            assert ranks[0][kind.__name__, name] == numbers(metric), name
        assert f"the first with id {image_ids[7]}:" in ranks[0][kind.__name__, "twice"]
