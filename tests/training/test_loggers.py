"""metrics.csv over a resume, and Weights & Biases without an account or a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from msil.training.loggers import csv_logger

from .cases import rows


def log(run_dir: Path, resume_step: int | None, steps: range, loss: float) -> None:
    logger = csv_logger(run_dir, resume_step)
    for step in steps:
        logger.log_metrics({"loss": loss + step, "epoch": step // 2}, step=step)
        if step % 2:
            logger.log_metrics({"AP": step / 10, "epoch": step // 2}, step=step)
    logger.save()


def test_a_first_run_begins_the_file(tmp_path: Path) -> None:
    log(tmp_path, None, range(2), 1)
    assert [(int(row["step"]), float(row.get("loss", -1)), float(row.get("AP", -1))) for row in rows(tmp_path)] == [
        (0, 1, -1), (1, 2, -1), (1, -1, 0.1),
    ]  # fmt: skip


again = pytest.mark.filterwarnings("ignore:Experiment logs directory")  # as a run does


@again
def test_a_resume_keeps_what_its_checkpoint_had_and_drops_what_is_trained_again(tmp_path: Path) -> None:
    # The checkpoint was made after steps 0 to 3; the run was killed in step 6.
    log(tmp_path, None, range(6), 1)
    log(tmp_path, 4, range(4, 8), 100)
    steps = [(int(row["step"]), float(row["loss"])) for row in rows(tmp_path) if "loss" in row]
    assert steps == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 104), (5, 105), (6, 106), (7, 107)]
    assert [(int(row["step"]), float(row["AP"])) for row in rows(tmp_path) if "AP" in row] == [
        (1, 0.1), (3, 0.3), (5, 0.5), (7, 0.7),
    ]  # fmt: skip


@again
def test_a_resume_that_dies_before_its_first_step_loses_no_row(tmp_path: Path) -> None:
    log(tmp_path, None, range(4), 1)
    before = rows(tmp_path)
    csv_logger(tmp_path, 4)  # and no more
    csv_logger(tmp_path, 4)
    assert [float(row.get("loss", 0)) for row in rows(tmp_path)] == [float(row.get("loss", 0)) for row in before]


@again
def test_a_run_without_a_checkpoint_starts_its_file_again(tmp_path: Path) -> None:
    log(tmp_path, None, range(2), 1)
    log(tmp_path, None, range(2), 5)
    assert [float(row["loss"]) for row in rows(tmp_path) if "loss" in row] == [5, 6]


@again
def test_nan_is_kept_as_nan(tmp_path: Path) -> None:
    csv_logger(tmp_path, None).log_metrics({"APl": float("nan")}, step=0)
    logger = csv_logger(tmp_path, None)
    logger.log_metrics({"APl": float("nan")}, step=0)
    logger.save()
    resumed = csv_logger(tmp_path, 1)
    resumed.log_metrics({"APl": 0.5}, step=1)
    resumed.save()
    assert [row["APl"] for row in rows(tmp_path)] == ["nan", "0.5"]


# Weights & Biases. In processes of their own: it reads its settings once a process.

# A connection that is not to this very machine would show; so would one to a server, for none runs.
SCRIPT = """
import socket, sys
from pathlib import Path

tried = []
real = socket.socket.connect
def connect(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost", "::1"):
        tried.append(address)
        raise OSError("no network in this test")
    return real(self, address)
socket.socket.connect = connect

from msil.config import LoggerConfig, LoggerName
from msil.training.loggers import wandb_logger
import wandb

config = LoggerConfig(name=LoggerName.wandb, project="msil", entity=None, group="a-sweep", tags=["quick"], offline=None)
logger = wandb_logger(config, Path(sys.argv[1]), "a-run", {"seed": 0})
run = logger.experiment
logger.log_metrics({"loss": 1.0}, step=0)
assert (run.settings.mode, run.group, run.name, tuple(run.tags)) == ("offline", "a-sweep", "a-run", ("quick",))
assert dict(run.config) == {"seed": 0}
wandb.finish()
print("tried", tried)
"""


def wandb_run(run_dir: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    home = run_dir / "home"  # no login is found there, and none may be written
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB") and name != "NETRC"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(run_dir)],
        env={**kept, "HOME": str(home), "WANDB_CONFIG_DIR": str(home), "WANDB_CACHE_DIR": str(home), **environment},
        cwd=home, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not (home / ".netrc").exists()
    return done


def test_wandb_without_a_login_is_offline_and_says_so_once(tmp_path: Path) -> None:
    done = wandb_run(tmp_path)
    said, *rest = done.stdout.splitlines()
    assert rest == ["tried []"]
    assert done.stderr == ""
    start = "W&B: no login was found, so this run is logged offline; later: wandb sync "
    assert said.startswith(start)
    # The printed command sends this run, and sends it once: `latest-run` is a link to it.
    (folder,) = tmp_path.glob(str(Path(said.removeprefix(start)).relative_to(tmp_path)))
    (file,) = folder.glob("*.wandb")
    assert file.stat().st_size > 0


@pytest.mark.slow
def test_wandb_with_a_login_but_no_server_is_offline(tmp_path: Path) -> None:
    # Port 9 of this machine: nobody answers, at once.
    done = wandb_run(tmp_path, WANDB_API_KEY="0" * 40, WANDB_BASE_URL="http://127.0.0.1:9")
    said, *rest = done.stdout.splitlines()
    assert said.startswith("W&B: 127.0.0.1 cannot be reached (")
    assert "so this run is logged offline" in said
    assert rest == ["tried []"]
    assert done.stderr == ""
