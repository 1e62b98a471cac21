"""Training in this process: where a step waits, runs that change their device, losses that are no numbers, and the
project's own tests with the GPU in the CPU's place."""

from __future__ import annotations

import collections
import importlib.util
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from benchmarks.compare import counted
from benchmarks.gpu.common import Setup, built, check, emit, raise_scores
from msil.training.experiment import run
from msil.training.faults import TrainingDiverged
from msil.training.module import DetectionModule
from training.cases import last, tiny_config  # of tests/
from training.test_faults import break_losses

ROOT = Path(__file__).resolve().parents[2]
WAIT = "called a synchronizing CUDA operation"  # torch's words
SGD = ("schedule.optimizer=sgd", "schedule.lr=0.001")
BF16 = "trainer.precision=bf16-mixed"
Found = tuple[bool, Any]


def config_of(setup: Setup, folder: str, *words: str) -> Any:
    """Twelve steps of four images."""
    own = ("data.num_train=48", "schedule.epochs=1", "run_name=one", setup.accelerator)
    return tiny_config(folder, f"{folder}/shapes", *own, *words)


@contextmanager
def with_callback(callback: Callback) -> Iterator[None]:
    with mock.patch.object(DetectionModule, "configure_callbacks", lambda self: [callback]):
        yield


# Waits


@contextmanager
def waits_noted(places: collections.Counter[str]) -> Iterator[None]:
    """Warnings of set_sync_debug_mode inside, by file:line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")
            for one in caught:
                if WAIT in str(one.message):
                    places[f"{'/'.join(Path(one.filename).parts[-2:])}:{one.lineno}"] += 1


class Watch(Callback):
    """Sets the mode for the steps 4 to 11: before the last one a checkpoint may be saved, which waits."""

    steps = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if torch.cuda.is_available() and batch_idx in (3, 11):
            torch.cuda.set_sync_debug_mode("warn" if batch_idx == 3 else "default")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps += 3 <= batch_idx < 11


def waits(setup: Setup) -> None:
    """Of whole runs: loader, net, loss, optimizer, log."""
    heads = {name: (f"model/head={name}",) for name in ("fcos", "vfnet", "retinanet", "atss", "gfl", "tood")}
    ways = {
        "fcos": heads["fcos"],
        "vfnet": (*heads["vfnet"], BF16, *SGD),
        "fcos, workers, ema": ("data.workers=2", "schedule.ema=0.9", BF16),
        "fcos, device_transforms": ("data.device_transforms=true", "data.workers=2"),
        "fcos, accumulate": ("trainer.accumulate=2",),
        **{name: heads[name] for name in ("retinanet", "atss", "gfl", "tood")},
        "fcos, ddp of one": ("trainer=ddp", "trainer.devices=1"),  # last: its process group stays
    }
    for name in ways if setup.on_gpu else ("fcos", "vfnet", "fcos, ddp of one"):
        check(f"P4 {name}", waits_of_a_run, setup, name, ways[name])
    for head in ("fcos", "vfnet"):
        check(f"waits of predict, {head}", waits_of_predict, setup, head)


def waits_of_a_run(setup: Setup, name: str, words: tuple[str, ...]) -> Found:
    places: collections.Counter[str] = collections.Counter()
    watch = Watch()
    # A step that is logged waits: none of these is.
    with tempfile.TemporaryDirectory() as folder, mock.patch("msil.training.build.MOST_ROWS", 1), with_callback(watch):
        config = config_of(setup, folder, "trainer.save_every=100", *words)
        with waits_noted(places):
            run(config)
    said = ", ".join(f"{count} at {place}" for place, count in places.items()) or "none"
    row = counted(f"P4 {name} waits on the GPU", places.total(), "", 0, f"{said}, in {watch.steps} batches of a run")
    emit(row.met is True, row=asdict(row))
    return watch.steps > 0, row.agreement


def waits_of_predict(setup: Setup, head: str) -> Found:
    detector = built(setup, head).to(setup.device)
    detector.min_size, detector.max_size = 160, 256
    raise_scores(detector.head)
    images = [torch.randint(256, (3, 120, 160), dtype=torch.uint8, device=setup.device) for _ in range(4)]
    detector.predict(images)
    places: collections.Counter[str] = collections.Counter()
    with waits_noted(places):
        if setup.on_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        detector.predict(images)
    return places.total() <= 1, f"of one batch of four resized images: {dict(places)}"


# Devices that change, numbers that are none


def moved(setup: Setup) -> None:
    for first, then in (("cpu", setup.device), (setup.device, "cpu")):
        for name, words in {"adamw": (), "sgd": SGD}.items():
            check(f"a run from {first} to {then}, {name}", resumed, setup, first, then, *words)
    check("NaN stops the run, adamw", stops, setup)
    check("NaN stops the run, sgd, bf16", stops, setup, BF16, *SGD)
    if setup.on_gpu:
        check("NaN stops the run, 16-mixed", stops, setup, "trainer.precision=16-mixed")


class Break(Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 6:
            raise ValueError("broken off")


def resumed(setup: Setup, first: str, then: str, *words: str) -> Found:
    """Broken off before the seventh step on one device, and taken up on the other."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(setup, folder, *words, f"trainer.accelerator={first}")
        with with_callback(Break()), suppress(ValueError):
            run(config)
        result = run(config_of(setup, folder, *words, f"trainer.accelerator={then}"))
    return result["steps"] == 12, f"{result['steps']} steps"


def stops(setup: Setup, *words: str) -> Found:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        break_losses(patch, 5, float("nan"))
        config = config_of(setup, folder, *words)
        with pytest.raises(TrainingDiverged) as caught:
            run(config)
        state = last(config)
    finite = all(torch.isfinite(tensor).all() for tensor in state["state_dict"].values())
    right = "at step 6 loss_bbox is nan" in str(caught.value) and state["global_step"] == 5 and finite
    return right, f"{str(caught.value)[:60]}; last.ckpt of step {state['global_step']}"


# The project's tests

FILES = ("averaging", "callbacks", "evaluation", "experiment", "faults", "longer", "optim", "result", "start", "steps")
PLUGIN = """
import sys
def pytest_collection_modifyitems():
    cases = sys.modules["training.cases"]
    cases.TINY = tuple(word.replace("accelerator=cpu", "accelerator=gpu") for word in cases.TINY)
"""


def own_tests(setup: Setup) -> None:
    """The files of tests/training that runs go through, with trainer.accelerator=gpu."""
    files = [f"tests/training/test_{name}.py" for name in (FILES if setup.on_gpu else ("optim", "steps"))]
    spread = ["-n", "6"] if setup.on_gpu and importlib.util.find_spec("xdist") else []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "on_gpu.py").write_text(PLUGIN if setup.on_gpu else "")
        words = ["-q", "-p", "on_gpu", "-p", "no:cacheprovider", "--tb=short", *spread, *files]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, os.environ["PYTHONPATH"]])}
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *words], cwd=ROOT, env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert process.stdout
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
        code = process.wait()
    failures = [
        line.split(" - ")[0][:120] + " - " + line.split(" - ")[-1][:160]
        for line in lines
        if line.startswith(("FAILED", "ERROR"))
    ]
    emit(code == 0, check="the project's tests", detail=[lines[-1] if lines else "", *failures], s=0)
