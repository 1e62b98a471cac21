"""A run of Weights & Biases that needs neither account nor network."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import wandb

from msil.config import LoggerConfig
from msil.errors import ConfigError


def begin(
    config: LoggerConfig,
    folder: Path,
    name: str,
    values: Mapping[str, Any],
    *,
    job_type: str,
    group: str | None,
    what: str = "this run",
) -> wandb.Run:
    """Begin a run whose files lie in folder/wandb. Without a login or a network it writes offline and says so once.

    values: its settings. job_type: by which a dashboard tells trainings, tests and tables apart. what: for that line.
    Raises ConfigError where it shall be online and cannot.
    """
    offline = config.offline
    if offline is None:
        reason = _why_offline()
        offline = reason is not None
        if offline:
            print(f"W&B: {reason}, so {what} is logged offline; later: wandb sync {folder}/wandb/offline-run-*")
    try:
        return wandb.init(
            project=config.project,
            entity=config.entity,
            name=name,
            group=group,
            job_type=job_type,
            tags=list(config.tags),
            dir=str(folder),
            config=dict(values),
            mode="offline" if offline else "online",
            settings=wandb.Settings(silent=True),
        )
    except wandb.Error as error:
        reason = str(error).strip().splitlines()[-1].rstrip(".")
        raise ConfigError(
            f"W&B cannot begin a run ({reason}): run wandb login, or set logger.offline=true or null."
        ) from error


def _why_offline() -> str | None:
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return f"WANDB_MODE is {os.environ['WANDB_MODE']}"
    wandb.setup(wandb.Settings(silent=True))  # or its login tells where it found the key
    if not wandb.login(prompt=False, verify=False):
        return "no login was found"
    address = urlsplit(wandb.setup().settings.base_url)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        # W&B's own start waits half a minute for a dead network before it gives up.
        socket.create_connection((address.hostname or "", port), timeout=3).close()
    except OSError as error:
        return f"{address.hostname} cannot be reached ({error})"
    return None
