"""Where the numbers of a run go: metrics.csv, and W&B or TensorBoard if asked for."""

from __future__ import annotations

import csv
import io
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from msil.config import Config, LoggerName
from msil.errors import ConfigError
from msil.runs import METRICS, WANDB_ID, write_bytes

FIRST = ("epoch", "step")
# Of result.json, beside the metrics: what a dashboard's table of runs shows.
REPORTED = ("parameters", "trainable_parameters", "flops", "images_per_second", "train_seconds", "total_seconds")


class MetricsFile(Logger):
    """Writes run_dir/metrics.csv: the columns epoch and step, then the metrics by name; empty where a row has none.

    resume_step: where the training goes on. Rows of earlier steps stay, later ones are trained, and written, again;
    None: from the beginning. Each save replaces the whole file. (Lightning's CSVLogger deletes it at each start and
    rewrites it in place.) Raises OSError, as for a full disk.
    """

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        super().__init__()
        self.path = run_dir / METRICS
        self.newest: dict[str, Any] = {}  # the last value of each metric
        before = read_rows(self.path) if resume_step is not None else []
        self._rows: list[dict[str, Any]] = [row for row in before if int(row["step"]) < (resume_step or 0)]
        self._saved = -1  # rows

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The run's config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.newest |= metrics
        self._rows.append({**metrics, "step": step})

    @rank_zero_only
    def save(self) -> None:
        if len(self._rows) == self._saved:
            return
        names = {name for row in self._rows for name in row}
        text = io.StringIO()
        writer = csv.DictWriter(text, [*FIRST, *sorted(names - set(FIRST))], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        write_bytes(self.path, text.getvalue().encode())
        self._saved = len(self._rows)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv without their empty cells; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{name: text for name, text in row.items() if text} for row in csv.DictReader(file)]
    return [row for row in rows if row.get("step", "").isdecimal()]


def dashboard_loggers(config: Config, values: Mapping[str, Any], run_dir: Path, resume_step: int | None) -> list[Any]:
    """The logger that config.logger names beside metrics.csv, in a list; none for csv, and none on ranks above 0.

    values: the run's settings as a plain dict.
    """
    if rank_zero_only.rank != 0:
        return []
    match config.logger.name:
        case LoggerName.wandb:
            return [_wandb_logger(config, values, run_dir, resume_step)]
        case LoggerName.tensorboard:
            # What an earlier process logged from resume_step on is hidden: it is trained again.
            logger = TensorBoardLogger(str(run_dir), name="tensorboard", version="", purge_step=resume_step or 0)
            logger.log_hyperparams(dict(values))
            return [logger]
        case LoggerName.csv:
            return []


def _wandb_logger(config: Config, values: Mapping[str, Any], run_dir: Path, resume_step: int | None) -> WandbLogger:
    """Needs neither account nor network: without them it writes offline, with one line of output. A resumed training
    goes on in its own W&B run, whose id is in the folder.

    Raises ConfigError where it shall be online and cannot.
    """
    import wandb  # late: it takes half a second

    reason = _why_offline() if config.logger.offline is None else None
    if reason is not None:
        print(f"W&B: {reason}, so this run is logged offline; later: wandb sync {run_dir}/wandb/offline-run-*")
    file = run_dir / WANDB_ID
    own, *name = file.read_text().split() if resume_step is not None and file.exists() else [None]
    own = own if name == [config.run_name] else None  # a copied folder is another run
    try:
        # WandbLogger(offline=True) sets WANDB_MODE, which W&B does not read again after its look for a login.
        run = wandb.init(
            project=config.logger.project,
            entity=config.logger.entity,
            id=own,
            resume="allow",  # not "must": of a run that was logged offline the server may know nothing yet
            name=config.run_name,
            group=config.logger.group,
            job_type=str(config.mode),
            tags=list(config.logger.tags),
            dir=str(run_dir),
            config=dict(values),
            mode="offline" if config.logger.offline or reason else "online",
            settings=wandb.Settings(silent=True),
        )
    except wandb.Error as error:
        # Of a run that was deleted there W&B does not take the id again.
        other = "" if own is None else f", or delete {file} for another W&B run than {own}"
        said = str(error).strip().splitlines()[-1].rstrip(".")
        raise ConfigError(
            f"W&B cannot begin a run ({said}): run wandb login, or set logger.offline=true or null{other}."
        ) from error
    write_bytes(file, f"{run.id} {config.run_name}\n".encode())
    return WandbLogger(experiment=run, save_dir=str(run_dir))


def _why_offline() -> str | None:
    import wandb

    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return f"WANDB_MODE is {os.environ['WANDB_MODE']}"
    wandb.setup(wandb.Settings(silent=True))  # or its login prints where the key was found
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


def has_dashboard(loggers: Sequence[Any]) -> bool:
    """Whether one of the loggers can show pictures."""
    return any(isinstance(logger, WandbLogger | TensorBoardLogger) for logger in loggers)


def log_picture(loggers: Sequence[Any], name: str, picture: np.ndarray, step: int) -> None:
    """Show a picture, uint8 (H, W, 3), wherever pictures can be shown."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [Image.fromarray(picture)], step=step)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, picture, step, dataformats="HWC")


def log_result(loggers: Sequence[Any], result: Mapping[str, Any]) -> None:
    """The numbers of result.json as W&B's summary, by which it lists and sorts runs."""
    numbers = {**result["metrics"], **{name: result[name] for name in REPORTED}}
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update(numbers)
        elif isinstance(logger, TensorBoardLogger):
            logger.finalize("success")


def finish_dashboards(exit_code: int | None = None) -> None:
    """End W&B's run of this process, if it has one: a sweep's next run must not go on in it."""
    if "wandb" in sys.modules:
        import wandb

        wandb.finish(exit_code=exit_code)
