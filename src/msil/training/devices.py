"""What a run computes on, from the settings and what the machine has."""

from __future__ import annotations

import os

import lightning as L
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from msil.config import TrainerConfig
from msil.detection.torchvision_detector import AnyDetector
from msil.errors import ConfigError

NO_GPU = (
    "no GPU was found: this run uses the CPU and will be slow; trainer.accelerator=cpu says so on purpose,"
    " trainer.require_gpu=true makes it an error"
)


def choose_accelerator(wanted: str, *, require_gpu: bool, cuda: bool, mps: bool) -> tuple[str, str | None]:
    """The accelerator to ask Lightning for, and a sentence to say aloud if it is not the one that was hoped for.

    wanted: trainer.accelerator. cuda, mps: whether the machine has a GPU of that kind.
    Raises ConfigError with require_gpu and no GPU that `wanted` admits.
    """
    found = {"auto": cuda or mps, "gpu": cuda or mps, "cuda": cuda}
    if found.get(wanted, True):  # cpu: on purpose; mps: Lightning's own sentence where there is none
        return wanted, None
    if require_gpu:
        raise ConfigError(
            "trainer.require_gpu=true, and no GPU was found: see what nvidia-smi and CUDA_VISIBLE_DEVICES say, or set"
            " trainer.accelerator=cpu trainer.require_gpu=false."
        )
    return "cpu", NO_GPU


def prepare(detector: AnyDetector, trainer: TrainerConfig, *, frozen: bool = False) -> None:
    """Set a detector up for speed as trainer.channels_last and trainer.compile say; what it computes stays the same.

    frozen: as in Detector.compile_parts.
    """
    detector.lay_out(channels_last=trainer.channels_last)
    if trainer.compile:
        detector.compile_parts(frozen=frozen)


def count_on_cpu(devices: int | str) -> int:
    """How many processes stand in on the CPU for trainer.devices of GPUs: one for all, else as many as were named."""
    if devices in ("auto", "-1", -1):
        return 1
    return devices if isinstance(devices, int) else len(devices.split(","))


def cluster_environment() -> ClusterEnvironment | None:
    """Who starts the processes of a run inside a SLURM job; None elsewhere: Lightning finds out.

    SLURM does where the job has several tasks, one a device; auto_requeue=False leaves signals to the run's own
    handlers. With a single task the run starts its other processes itself. torchrun inside SLURM comes first.
    Raises ConfigError for --ntasks without --ntasks-per-node.
    """
    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return None
    if os.environ["SLURM_NTASKS"] == "1":
        return LightningEnvironment()
    try:
        return SLURMEnvironment(auto_requeue=False)
    except RuntimeError as error:
        raise ConfigError(f"this SLURM job's tasks do not fit: {str(error).rstrip('.')}.") from error


def check_processes(trainer: L.Trainer) -> None:
    """Raises ConfigError where srun or torchrun started other processes than the settings ask for.

    Each would else train the whole run by itself, all in one folder.
    """
    if TorchElasticEnvironment.detect():
        starter, processes = "torchrun", int(os.environ["WORLD_SIZE"])
    elif SLURMEnvironment.detect():
        starter, processes = "srun", int(os.environ["SLURM_NTASKS"])
        if processes == 1:
            return
    else:
        return
    if processes != trainer.world_size:
        raise ConfigError(
            f"{starter} started {processes} processes, and these settings make {trainer.world_size}: set trainer=ddp,"
            " trainer.devices to the processes on each node, and trainer.num_nodes."
        )
