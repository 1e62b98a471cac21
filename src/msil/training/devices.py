"""What a run computes on, from the settings and what the machine has."""

from __future__ import annotations

import os
import sys
import warnings

import lightning as L
import torch
import torchvision
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from msil.config import TrainerConfig
from msil.detection import Detector
from msil.detection.torchvision_detector import AnyDetector
from msil.errors import ConfigError


def choose_devices(settings: TrainerConfig) -> tuple[str, int | str]:
    """Accelerator and devices for Lightning. Without a GPU, prints one line and takes the CPU: one process for all
    GPUs, else as many as were named.

    Raises ConfigError with trainer.require_gpu and no GPU that trainer.accelerator admits.
    """
    wanted, devices = settings.accelerator, settings.devices
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    found = {"auto": cuda or mps, "gpu": cuda or mps, "cuda": cuda}
    if found.get(wanted, True):  # cpu: on purpose; mps: Lightning has a sentence where there is none
        return wanted, devices
    if settings.require_gpu:
        raise ConfigError(
            "trainer.require_gpu=true, and no GPU was found: see what nvidia-smi and CUDA_VISIBLE_DEVICES say, or set"
            " trainer.accelerator=cpu trainer.require_gpu=false."
        )
    if rank_zero_only.rank == 0:
        print(
            "warning: no GPU was found: this run uses the CPU and will be slow; trainer.accelerator=cpu says so on"
            " purpose, trainer.require_gpu=true makes it an error",
            file=sys.stderr,
            flush=True,
        )
    if devices in ("auto", "-1", -1):
        return "cpu", 1
    return "cpu", devices if isinstance(devices, int) else len(devices.split(","))


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


class OneStreamDDP(DDPStrategy):
    """DDP on the stream of the steps: Lightning makes it on another one, of which PyTorch warns.

    Gradients are views of what the processes exchange. Buffers are not exchanged in a step, but for the statistics of
    BatchNorm.
    """

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        # Of kernels of a single cell, whose strides along height and width mean nothing.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view")
        ids = self.determine_ddp_device_ids()
        parallel = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        # After the first exchange, of all buffers; as an argument it has another name since PyTorch 2.14.
        parallel.broadcast_buffers = any(isinstance(m, _BatchNorm) and m.training for m in model.modules())
        return parallel


def check_graphs(mode: str | None, detector: AnyDetector, device: torch.device) -> None:
    """Raises ConfigError where a CUDA graph would leave a kernel out: before torchvision 0.29 deformable convolutions
    do not run on the stream that is recorded."""
    old = tuple(map(int, torchvision.__version__.split(".")[:2])) < (0, 29)
    recorded = mode in ("reduce-overhead", "max-autotune") and device.type == "cuda"
    if recorded and old and isinstance(detector, Detector) and detector.head.deformable:
        raise ConfigError(
            f"trainer.compile={mode} runs CUDA graphs, in which torchvision {torchvision.__version__} computes "
            f"{detector.head.title}'s deformable convolutions wrongly: install torchvision 0.29 or later, or set "
            "trainer.compile=default."
        )


def check_processes(trainer: L.Trainer) -> None:
    """Raises ConfigError where srun or torchrun started other processes than the settings ask for.

    Each would else train the whole run by itself, all in one folder.
    """
    if TorchElasticEnvironment.detect():
        starter, processes = "torchrun", int(os.environ["WORLD_SIZE"])
    elif SLURMEnvironment.detect() and os.environ["SLURM_NTASKS"] != "1":
        starter, processes = "srun", int(os.environ["SLURM_NTASKS"])
    else:
        return
    if processes != trainer.world_size:
        raise ConfigError(
            f"{starter} started {processes} processes, and these settings make {trainer.world_size}: set trainer=ddp,"
            " trainer.devices to the processes on each node, and trainer.num_nodes."
        )
