"""What bounds the speed: ceilings of the machine, a step by stage and kind of kernel, loading."""

from __future__ import annotations

import collections
import gc
import itertools
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.common import EAGER, Setup, autocast, built, check, milliseconds, now, prepared, scene
from benchmarks.loading import made_files
from msil.config import DataConfig
from msil.data.module import DetectionDataModule


def ceilings(setup: Setup) -> None:
    check("machine", limits_of, setup)


def limits_of(setup: Setup) -> tuple[bool, dict[str, Any]]:
    found: dict[str, Any] = {"cudnn": torch.backends.cudnn.version(), "cpus": os.cpu_count()}
    if not setup.on_gpu:
        return True, found
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,power.draw", "--format=csv,noheader"]
    found["gpu"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    low, took = {"dtype": torch.bfloat16, "device": setup.device}, partial(milliseconds, setup)
    a = torch.empty(2**30, dtype=torch.uint8, device=setup.device)
    b, host = torch.empty_like(a), torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    found["copy TB/s"] = round(2 * 2**30 / took(lambda: b.copy_(a)) / 1e9, 2)
    found["host to device GB/s"] = round(2**28 / took(lambda: a[: 2**28].copy_(host, non_blocking=True)) / 1e6, 1)
    x = torch.randn(8192, 8192, **low)
    found["product TFLOP/s"] = round(2 * 8192**3 / took(lambda: x @ x) / 1e9)
    conv = nn.Conv2d(256, 256, 3, padding=1, bias=False, **low).to(memory_format=torch.channels_last)  # pyright: ignore
    maps = torch.randn(8, 256, 100, 168, **low).to(memory_format=torch.channels_last).requires_grad_()
    gradient, work = torch.randn_like(maps), 2 * 8 * 100 * 168 * 256 * 256 * 9
    with torch.no_grad():
        found["convolution TFLOP/s"] = round(work / took(lambda: conv(maps)) / 1e9)
    both = took(lambda: torch.autograd.grad(conv(maps), [maps, conv.weight], gradient))
    found["forward and backward"] = round(3 * work / both / 1e9)
    one, began = torch.zeros(1, device=setup.device), time.perf_counter()
    for _ in range(2000):
        one.add_(1)
    found["host us a small kernel"] = round((time.perf_counter() - began) / 2000 * 1e6, 2)
    return True, found


def profiled(setup: Setup) -> None:
    for head, batch, kernel_size in (("fcos", 8, None), ("fcos", 2, None), ("vfnet", 8, None), ("fcos", 8, 3)):
        name = f"{head}{'' if kernel_size is None else ' with MSIL'} batch {batch}"
        check(name, stages, setup, head, max(1, batch * setup.batch // 8), kernel_size)
        gc.collect()
        torch.cuda.empty_cache()


def stages(setup: Setup, head: str, batch: int, kernel_size: int | None) -> tuple[bool, dict[str, Any]]:
    """Milliseconds of a step by stage, on the GPU and on the host, and by kernel."""
    detector, one = prepared(built(setup, head, kernel_size).train(), setup, EAGER), scene(setup, batch)
    weights = [parameter for parameter in detector.parameters() if parameter.requires_grad]
    optimizer, sizes = torch.optim.SGD(weights, lr=1e-6, momentum=0.9, fused=True), [setup.size] * batch

    def step(mark: Callable[[str], None] = lambda name: None) -> None:
        mark("")
        with autocast(setup):
            images = detector.batch(one.images)
            mark("batch")
            maps = detector.backbone(images)
            mark("backbone")
            pyramid = detector.fpn(maps)
            mark("fpn")
            predictions = detector.head(pyramid)
            mark("head")
            total = torch.stack(list(detector.head.loss(predictions, one.targets, sizes).values())).sum()
            mark("loss")
        optimizer.zero_grad()
        total.backward()
        mark("backward")
        torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        mark("norm of gradients")
        optimizer.step()
        mark("optimizer")

    for _ in range(3):
        step()
    if not setup.on_gpu:
        return True, {}
    marks: list[tuple[str, Any, float]] = []

    def mark(name: str) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        marks.append((name, event, time.perf_counter()))

    times: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
    for _ in range(5):
        marks.clear()
        step(mark)
        now()
        for (_, event, host), (name, after, later) in itertools.pairwise(marks):
            times[name].append((event.elapsed_time(after), 1000 * (later - host)))
    began = now()
    for _ in range(10):
        step()
    whole = (now() - began) / 10
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step()
        now()
    kernels: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
    for event in trace.events() or ():
        if str(event.device_type).endswith("CUDA"):
            kernels[event.name[:90]][0] += 1
            kernels[event.name[:90]][1] += event.time_range.elapsed_us() / 1000
    longest = sorted(kernels.items(), key=lambda item: -item[1][1])[:40]
    middle = {name: [round(statistics.median(side), 2) for side in zip(*pairs)] for name, pairs in times.items()}  # noqa: B905
    return True, {
        "ms a step": round(1000 * whole, 2),
        "img/s": round(batch / whole, 1),
        "ms of GPU, host by stage": middle,
        "kernels": sum(count for count, _ in kernels.values()),
        "longest, times and ms": {name: [count, round(spent, 2)] for name, (count, spent) in longest},
    }


# Loading


def loading(setup: Setup) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = made_files(Path(folder))
        for workers, postponed in ((4, False), (8, False), (14, False), (2, False), (8, True), (14, True)):
            count = workers if setup.on_gpu else 1
            name = f"{count} workers{', device_transforms' if postponed else ''}"
            check(name, arriving, setup, files, count, postponed)
            if not setup.on_gpu and postponed:
                break


def arriving(setup: Setup, files: Any, workers: int, postponed: bool) -> tuple[bool, dict[str, float]]:
    """Images a second from JPEG files to the device at 800 x 1067, and what they cost the training process."""
    settings = DataConfig("coco", "", batch_size=16, workers=workers, device_transforms=postponed)  # pyright: ignore
    data, device = DetectionDataModule(settings, files, files), torch.device(setup.device, 0 if setup.on_gpu else None)
    place = {"global_step": 0, "global_rank": 0, "world_size": 1, "strategy": SimpleNamespace(root_device=device)}
    data.trainer = SimpleNamespace(**place)  # pyright: ignore[reportAttributeAccessIssue]
    data.train_indices = data.train_indices * 32 * workers
    batches = iter(data.train_dataloader())
    for _ in range(2):
        next(batches)
    began, cpu, images = now(), time.process_time(), 0
    for batch in batches:
        batch = data.on_after_batch_transfer(data.transfer_batch_to_device(batch, device, 0), 0)
        images += len(batch[0])
        if time.perf_counter() - began > 2.5:
            break
    seconds = now() - began
    spent = 1000 * (time.process_time() - cpu) / images
    return True, {"img/s": round(images / seconds), "CPU ms an image of the training process": round(spent, 2)}
