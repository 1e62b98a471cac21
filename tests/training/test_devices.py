"""A missing GPU, what a run computes with, and who starts its processes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from torch import Tensor

from msil.config import Config
from msil.detection import FCOSHead, build_detector
from msil.errors import ConfigError
from msil.training.devices import NO_GPU, choose_accelerator, cluster_environment, count_on_cpu
from msil.training.experiment import run
from msil.training.setup import make_trainer
from msil.validate import validate

from .cases import tiny_config


@pytest.mark.parametrize("require_gpu", [False, True])
@pytest.mark.parametrize(
    ("wanted", "cuda", "mps"),
    [("auto", True, False), ("auto", False, True), ("gpu", True, False), ("gpu", False, True), ("cuda", True, False)],
)
def test_a_gpu_that_is_there_is_taken_without_a_word(wanted: str, cuda: bool, mps: bool, require_gpu: bool) -> None:
    assert choose_accelerator(wanted, require_gpu=require_gpu, cuda=cuda, mps=mps) == (wanted, None)


@pytest.mark.parametrize(("wanted", "mps"), [("auto", False), ("gpu", False), ("cuda", False), ("cuda", True)])
def test_without_a_gpu_the_cpu_is_taken_aloud_or_refused(wanted: str, mps: bool) -> None:
    assert choose_accelerator(wanted, require_gpu=False, cuda=False, mps=mps) == ("cpu", NO_GPU)
    with pytest.raises(ConfigError, match="no GPU was found"):
        choose_accelerator(wanted, require_gpu=True, cuda=False, mps=mps)


@pytest.mark.parametrize("switch", [False, True])
def test_a_run_is_laid_out_and_compiled_as_its_settings_say(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch, switch: bool
) -> None:
    """trainer.channels_last and trainer.compile; a compiler that compiles nothing notes what goes through it."""
    passed: dict[str, list[bool]] = {}

    def compiler(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
        @wraps(function)
        def compiled(part: Any, batch: Any, *arguments: Any) -> Any:
            layouts = passed.setdefault(function.__qualname__, [])
            if isinstance(batch, Tensor):
                layouts.append(batch.is_contiguous(memory_format=torch.channels_last))
            return function(part, batch, *arguments)

        return compiled

    monkeypatch.setattr(torch, "compile", compiler)
    settings = (f"trainer.channels_last={str(switch).lower()}", "trainer.compile=true")
    run(tiny_config(tmp_path, shapes, *settings))
    assert set(passed) == {"Detector.net", "DenseHead.padded_loss"}
    assert set(passed["Detector.net"]) == {switch}


def test_without_the_switch_nothing_is_compiled(tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", None)
    run(tiny_config(tmp_path, shapes))


def test_a_copy_of_a_compiled_detector_is_compiled_too_and_has_its_own_weights() -> None:
    torch.manual_seed(0)
    detector = build_detector(
        FCOSHead.Options(num_convs=1, norm_groups=4), "resnet10", 4, channels=16, msil=None
    ).eval()
    batch = torch.rand(1, 3, 64, 64)
    calls: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, mode: lambda part, x: calls.append(part) or function(part, x))
        detector.compile_parts()
    copied = copy.deepcopy(detector)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
        assert copied.net(batch).logits.abs().max() == 0 < detector.net(batch).logits.abs().max()
    assert [call is copied for call in calls] == [True, False]


@pytest.mark.parametrize("wanted", ["cpu", "mps"])
def test_what_was_chosen_on_purpose_stays(wanted: str) -> None:
    assert choose_accelerator(wanted, require_gpu=False, cuda=False, mps=False) == (wanted, None)


@pytest.mark.parametrize(("devices", "processes"), [("auto", 1), (-1, 1), ("-1", 1), (1, 1), (4, 4), ("0,2", 2)])
def test_processes_on_the_cpu(devices: int | str, processes: int) -> None:
    assert count_on_cpu(devices) == processes


no_gpu = pytest.mark.skipif(
    torch.cuda.is_available() or torch.backends.mps.is_available(), reason="this machine has a GPU"
)


def settings(tmp_path: Path, accelerator: str, *, require_gpu: bool = False) -> Config:
    return tiny_config(
        tmp_path, tmp_path, f"trainer.accelerator={accelerator}", f"trainer.require_gpu={str(require_gpu).lower()}"
    )


@no_gpu
@pytest.mark.parametrize("accelerator", ["auto", "gpu", "cuda"])
def test_a_trainer_without_a_gpu_says_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], accelerator: str
) -> None:
    config = settings(tmp_path, accelerator)
    trainer = make_trainer(config, tmp_path, loggers=[], callbacks=[], total_steps=1)
    assert trainer.strategy.root_device.type == "cpu"
    assert [line for line in capsys.readouterr().err.splitlines() if "GPU" in line] == [f"warning: {NO_GPU}"]


@no_gpu
def test_a_trainer_that_must_have_a_gpu_is_refused(tmp_path: Path) -> None:
    config = settings(tmp_path, "auto", require_gpu=True)
    with pytest.raises(ConfigError, match=r"trainer\.require_gpu=true, and no GPU was found"):
        make_trainer(config, tmp_path, loggers=[], callbacks=[], total_steps=1)


def test_the_cpu_on_purpose_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(settings(tmp_path, "cpu"), tmp_path, loggers=[], callbacks=[], total_steps=1)
    assert "GPU" not in capsys.readouterr().err


def test_a_required_gpu_contradicts_the_cpu(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.require_gpu=true contradicts trainer\.accelerator=cpu"):
        validate(settings(tmp_path, "cpu", require_gpu=True))


# Inside a SLURM job, by the variables that srun sets.


def slurm(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in {"SLURM_JOB_ID": "123456", "SLURM_JOB_NAME": "msil", **variables}.items():
        monkeypatch.setenv(name, value)


def test_no_cluster_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    assert cluster_environment() is None


def test_several_tasks_are_the_processes_and_lightning_requeues_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm(monkeypatch, SLURM_NTASKS="8", SLURM_NTASKS_PER_NODE="4", SLURM_PROCID="5", SLURM_LOCALID="1")
    environment = cluster_environment()
    assert isinstance(environment, SLURMEnvironment)
    assert not environment.auto_requeue
    assert (environment.world_size(), environment.global_rank(), environment.local_rank()) == (8, 5, 1)


def test_a_single_task_starts_its_processes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm(monkeypatch, SLURM_NTASKS="1")
    assert isinstance(cluster_environment(), LightningEnvironment)


def test_torchrun_inside_slurm_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm(monkeypatch, SLURM_NTASKS="8", SLURM_NTASKS_PER_NODE="4")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert cluster_environment() is None


def test_tasks_that_lightning_cannot_place_are_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm(monkeypatch, SLURM_NTASKS="8")
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    with pytest.raises(ConfigError, match="--ntasks-per-node=8"):
        cluster_environment()


def test_other_devices_than_tasks_are_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Four tasks of one process each would all train the run and write its files."""
    slurm(monkeypatch, SLURM_NTASKS="4", SLURM_NTASKS_PER_NODE="4", SLURM_PROCID="0", SLURM_LOCALID="0",
          SLURM_NODEID="0")  # fmt: skip
    with pytest.raises(ConfigError, match="srun started 4 processes, and these settings make 1: set trainer=ddp"):
        make_trainer(settings(tmp_path, "cpu"), tmp_path, loggers=[], callbacks=[], total_steps=1)


def test_other_devices_than_torchruns_processes_are_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="torchrun started 2 processes, and these settings make 1"):
        make_trainer(settings(tmp_path, "cpu"), tmp_path, loggers=[], callbacks=[], total_steps=1)
