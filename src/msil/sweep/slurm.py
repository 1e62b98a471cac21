"""hydra/launcher=submitit_slurm: each job of a sweep as a SLURM job (docs/clusters.md)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from msil.errors import ConfigError, install

TARGET = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"


def check_launcher(launcher: Mapping[str, Any], devices: int | str) -> None:
    """Raises ConfigError for SLURM's launcher where it is not installed or would start another number of processes.

    launcher: the resolved hydra.launcher; devices: trainer.devices.
    """
    if launcher["_target_"] != TARGET:
        return
    if importlib.util.find_spec("submitit") is None:
        raise ConfigError(f"hydra/launcher=submitit_slurm is not installed: {install('slurm')}")
    tasks = launcher["tasks_per_node"]
    if isinstance(devices, int) and devices > 0 and devices != tasks:
        raise ConfigError(
            f"trainer.devices={devices} needs as many tasks on each node, and hydra.launcher.tasks_per_node is"
            f" {tasks}: set hydra.launcher.gpus_per_node={devices}, which tasks_per_node follows."
        )
