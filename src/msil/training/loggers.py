"""Where numbers go while a run goes on: metrics.csv always, Weights & Biases if asked for."""

from __future__ import annotations

import csv
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import wandb
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from msil.config import LoggerConfig


def csv_logger(run_dir: Path, resume_step: int | None) -> CSVLogger:
    """Writes run_dir/metrics.csv. After a resume the rows up to `resume_step` stay; later ones are trained again."""
    earlier = []
    file = run_dir / "metrics.csv"
    if resume_step is not None and file.exists():
        with file.open(newline="") as stream:
            earlier = [row for row in csv.DictReader(stream) if int(row["step"]) < resume_step]
    logger = CSVLogger(str(run_dir), name="", version="", flush_logs_every_n_steps=50)
    for row in earlier:  # the logger begins its file anew
        values: dict[str, Any] = {key: float(value) for key, value in row.items() if value != "" and key != "step"}
        logger.log_metrics(values, step=int(row["step"]))
    if earlier:
        logger.save()  # at once: a second interruption before the first step must not lose them
    return logger


def wandb_logger(config: LoggerConfig, run_dir: Path, run_name: str, values: Mapping[str, Any]) -> WandbLogger:
    """A W&B logger that needs neither account nor network: without them it writes offline and says so once."""
    offline = config.offline
    if offline is None:
        reason = _why_offline()
        offline = reason is not None
        if offline:
            print(f"W&B: {reason}, so this run is logged offline; later: wandb sync {run_dir}/wandb/offline-run-*")
    # Begun here, not by Lightning: it would ask for an offline run by an environment variable that W&B, once asked
    # about the login, no longer reads.
    run = wandb.init(
        project=config.project,
        entity=config.entity,
        name=run_name,
        group=config.group,
        tags=list(config.tags),
        dir=str(run_dir),
        config=dict(values),
        mode="offline" if offline else "online",
        settings=wandb.Settings(silent=True),
    )
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return WandbLogger(experiment=run, save_dir=str(run_dir))


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
