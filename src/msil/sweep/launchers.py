"""What other launchers than this project's own can run: SLURM through submitit, Ray."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from msil.errors import ConfigError

# The plugin's module to the choice of hydra/launcher and what installs it.
PLUGINS = {
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher": (
        "submitit_slurm",
        'pip install -e ".[slurm]" -c constraints.txt',
    ),
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher": (
        "submitit_local",
        'pip install -e ".[slurm]" -c constraints.txt',
    ),
    "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher": (
        "ray",
        'pip install -e ".[ray]" -c constraints.txt && pip install --no-deps hydra-ray-launcher==1.2.2',
    ),
}


def check_launcher(launcher: Mapping[str, Any], devices: int | str) -> None:
    """Raises ConfigError for a launcher that is not installed or cannot start a job's processes.

    launcher: the resolved hydra.launcher; devices: trainer.devices.
    """
    target = str(launcher["_target_"])
    if target not in PLUGINS:
        return
    name, command = PLUGINS[target]
    if not _installed(target.rpartition(".")[0]):
        raise ConfigError(f"hydra/launcher={name} is not installed: {command}")
    if name == "submitit_slurm":
        tasks = launcher["tasks_per_node"]
        if isinstance(devices, int) and devices > 0 and devices != tasks:
            raise ConfigError(
                f"trainer.devices={devices} needs as many tasks on each node, and hydra.launcher.tasks_per_node is"
                f" {tasks}: set hydra.launcher.gpus_per_node={devices}, which tasks_per_node follows."
            )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package above it
        return False
