"""What a run computes with, and who starts its processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from torch import Tensor

from msil.config import TrainerConfig
from msil.detection import build_detector
from msil.detection.heads import HEADS
from msil.errors import ConfigError
from msil.interruption import Interruption
from msil.training.build import build, make_trainer
from msil.training.checkpoint import SaveLast
from msil.training.devices import check_graphs, choose_devices, cluster_environment
from msil.training.experiment import run
from msil.training.faults import FiniteSteps

from .cases import module_of, tiny_config


def machine(monkeypatch: pytest.MonkeyPatch, gpu: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu == "cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: gpu == "mps")


def settings(accelerator: str, **others: Any) -> TrainerConfig:
    trainer = tiny_config("runs", "data").trainer
    return dataclasses.replace(trainer, accelerator=accelerator, **others)


@pytest.mark.parametrize(
    ("wanted", "gpu"), [("auto", "cuda"), ("auto", "mps"), ("gpu", "mps"), ("cuda", "cuda"), ("cpu", None)]
)
def test_what_is_there_is_taken_without_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wanted: str, gpu: str | None
) -> None:
    machine(monkeypatch, gpu)
    assert choose_devices(settings(wanted, devices="0,1")) == (wanted, "0,1")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("wanted", "gpu"), [("auto", None), ("gpu", None), ("cuda", None), ("cuda", "mps")])
def test_without_a_gpu_the_cpu_is_taken_aloud_or_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wanted: str, gpu: str | None
) -> None:
    """As many processes as devices were named, one for all of them."""
    machine(monkeypatch, gpu)
    for devices, processes in (("auto", 1), (-1, 1), ("-1", 1), (4, 4), ("0,2", 2)):
        assert choose_devices(settings(wanted, devices=devices)) == ("cpu", processes)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("warning: no GPU was found: this run uses the CPU")
    with pytest.raises(ConfigError, match=r"trainer\.require_gpu=true, and no GPU was found"):
        choose_devices(settings(wanted, require_gpu=True))


def test_a_run_is_compiled_as_its_settings_say(tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """trainer.compile and trainer.channels_last; a compiler that compiles nothing notes what goes through it."""
    passed: dict[str, list[bool]] = {}
    modes = []

    def compiler(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
        modes.append(mode)

        @wraps(function)
        def compiled(part: Any, batch: Any, *arguments: Any) -> Any:
            layouts = passed.setdefault(function.__qualname__, [])
            if isinstance(batch, Tensor):
                layouts.append(batch.is_contiguous(memory_format=torch.channels_last))
            return function(part, batch, *arguments)

        return compiled

    monkeypatch.setattr(torch, "compile", compiler)
    settings = ("trainer.channels_last=false", "trainer.compile=max-autotune", "schedule.max_steps=1")
    run(tiny_config(tmp_path, shapes, *settings))
    assert set(modes) == {"max-autotune"}
    assert set(passed) == {"Detector.net", "DenseHead.padded_loss"} and set(passed["Detector.net"]) == {False}


def test_deformable_convolutions_in_graphs_need_a_new_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    refused = []
    for version in ("0.26.0", "0.29.1+cu130"):
        monkeypatch.setattr("torchvision.__version__", version)
        for name in HEADS:
            detector = build_detector(name, "resnet10", 3, channels=32)
            for mode in (None, "default", "reduce-overhead"):
                check_graphs(mode, detector, torch.device("cpu"))
                try:
                    check_graphs(mode, detector, gpu)
                except ConfigError as error:
                    refused.append((name, str(error)))
    assert [name for name, _ in refused] == ["tood", "vfnet"]
    assert "torchvision 0.26.0 computes VFNet's deformable" in refused[1][1]


def test_a_run_asks_whether_its_graphs_would_be_whole(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr("msil.training.build.check_graphs", lambda mode, _, device: asked.append((mode, device)))
    config = tiny_config(tmp_path, shapes, "trainer.compile=reduce-overhead")
    build(config, tmp_path, Interruption(), FiniteSteps())
    assert asked == [("reduce-overhead", torch.device("cpu"))]


@pytest.mark.parametrize(
    ("asked", "norm", "buffers"),
    [("trainer=ddp", "frozen_bn", False), ("trainer=ddp", "eval_bn", False), ("trainer.devices=2", "bn", True)],
)
def test_ddp_is_made_on_the_stream_of_the_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, norm: str, buffers: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", None)
    monkeypatch.setattr("msil.training.devices.DistributedDataParallel", lambda _, **how: SimpleNamespace(**how))
    config = tiny_config(tmp_path, tmp_path, asked, f"model.backbone.norm={norm}")
    strategy = make_trainer(config, tmp_path).strategy
    monkeypatch.setattr(strategy, "determine_ddp_device_ids", lambda: [0])  # a GPU
    made = strategy._setup_model(module_of(config))  # pyright: ignore
    assert vars(made) == {"device_ids": [0], "gradient_as_bucket_view": True, "broadcast_buffers": buffers}


def test_processes_ask_each_other_for_signals_on_the_cpu_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's own question, in every step, ends in a number that the host waits for."""
    asked: list[Any] = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *given, **_: asked.append(given))
    monkeypatch.setattr(torch.distributed, "new_group", lambda backend: asked.append(backend))
    monkeypatch.setattr(L.Trainer, "world_size", 2)
    trainer = make_trainer(tiny_config(tmp_path, tmp_path), tmp_path)
    ask = type(trainer.fit_loop.epoch_loop)._broadcast_sigterm_tensor
    ask(trainer.fit_loop.epoch_loop)
    assert len(asked) == 1
    SaveLast(tmp_path, 1, Interruption()).on_train_start(trainer)
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor()
    assert asked[1:] == ["gloo"]


# Inside a SLURM job, by the variables that srun sets.


def slurm(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in {"SLURM_JOB_ID": "123456", "SLURM_JOB_NAME": "msil", **variables}.items():
        monkeypatch.setenv(name, value)


def test_several_tasks_are_the_processes_and_lightning_requeues_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm(monkeypatch, SLURM_NTASKS="8", SLURM_NTASKS_PER_NODE="4", SLURM_PROCID="5", SLURM_LOCALID="1")
    environment = cluster_environment()
    assert isinstance(environment, SLURMEnvironment)
    assert not environment.auto_requeue
    assert (environment.world_size(), environment.global_rank(), environment.local_rank()) == (8, 5, 1)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(ConfigError, match="--ntasks-per-node=8"):
        cluster_environment()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")  # torchrun inside SLURM comes first
    assert cluster_environment() is None


def test_a_single_task_starts_its_processes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm(monkeypatch, SLURM_NTASKS="1")
    assert isinstance(cluster_environment(), LightningEnvironment)


SRUN = {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0"}  # fmt: skip
TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(("starter", "variables"), [("srun", SRUN), ("torchrun", TORCHRUN)])
def test_other_devices_than_processes_are_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, starter: str, variables: dict[str, str]
) -> None:
    """Four tasks of one process each would all train the run and write its files."""
    if starter == "srun":
        slurm(monkeypatch)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{starter} started 4 processes, and these settings make 1: set trainer=ddp"):
        make_trainer(tiny_config(tmp_path, tmp_path), tmp_path)
