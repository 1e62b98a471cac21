"""metrics.csv and TensorBoard over a resume, and Weights & Biases without an account or a network."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from msil.training.loggers import tensorboard_logger
from msil.training.metrics_file import MetricsFile

from .cases import rows
from .dashboards import events


def log(run_dir: Path, resume_step: int | None, steps: range, loss: float) -> None:
    logger = MetricsFile(run_dir, resume_step)
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


def test_a_resume_keeps_what_its_checkpoint_had_and_drops_what_is_trained_again(tmp_path: Path) -> None:
    # The checkpoint was made after steps 0 to 3; the run was killed in step 6.
    log(tmp_path, None, range(6), 1)
    log(tmp_path, 4, range(4, 8), 100)
    steps = [(int(row["step"]), float(row["loss"])) for row in rows(tmp_path) if "loss" in row]
    assert steps == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 104), (5, 105), (6, 106), (7, 107)]
    assert [(int(row["step"]), float(row["AP"])) for row in rows(tmp_path) if "AP" in row] == [
        (1, 0.1), (3, 0.3), (5, 0.5), (7, 0.7),
    ]  # fmt: skip


def test_a_resume_that_dies_before_its_first_step_loses_no_row(tmp_path: Path) -> None:
    log(tmp_path, None, range(4), 1)
    before = rows(tmp_path)
    MetricsFile(tmp_path, 4)  # and no more
    MetricsFile(tmp_path, 4)
    assert [float(row.get("loss", 0)) for row in rows(tmp_path)] == [float(row.get("loss", 0)) for row in before]


def test_a_run_without_a_checkpoint_starts_its_file_again(tmp_path: Path) -> None:
    log(tmp_path, None, range(2), 1)
    log(tmp_path, None, range(2), 5)
    assert [float(row["loss"]) for row in rows(tmp_path) if "loss" in row] == [5, 6]


def test_nan_is_kept_as_nan(tmp_path: Path) -> None:
    MetricsFile(tmp_path, None).log_metrics({"APl": float("nan")}, step=0)
    logger = MetricsFile(tmp_path, None)
    logger.log_metrics({"APl": float("nan")}, step=0)
    logger.save()
    resumed = MetricsFile(tmp_path, 1)
    resumed.log_metrics({"APl": 0.5}, step=1)
    resumed.save()
    assert [row["APl"] for row in rows(tmp_path)] == ["nan", "0.5"]


def test_a_row_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    log(tmp_path, None, range(4), 1)
    file = tmp_path / "metrics.csv"
    file.write_text(file.read_text() + "0,1")  # of step 16, say
    MetricsFile(tmp_path, 4)
    assert [int(row["step"]) for row in rows(tmp_path)] == [0, 1, 1, 2, 3, 3]


def test_a_full_disk_on_a_resume_keeps_the_rows(tmp_path: Path) -> None:
    log(tmp_path, None, range(100), 1)
    before = (tmp_path / "metrics.csv").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            MetricsFile(tmp_path, 90)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "metrics.csv").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


# The AP's column comes with the second step: the file is replaced, not rewritten in place.
@pytest.mark.parametrize("resume_step", [None, 2])
def test_kill_9_while_the_file_is_replaced_keeps_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume_step: int | None
) -> None:
    logger = MetricsFile(tmp_path, None)
    for step in range(3):
        logger.log_metrics({"loss": step, "epoch": 0}, step=step)
    logger.save()
    before = rows(tmp_path)
    pid = os.fork()
    if pid == 0:
        monkeypatch.setattr(os, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        if resume_step is not None:
            MetricsFile(tmp_path, resume_step)
        logger.log_metrics({"AP": 0.5, "epoch": 0}, step=3)
        logger.save()
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert rows(tmp_path) == before


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
logger = wandb_logger(config, Path(sys.argv[1]), "a-run", {"seed": 0}, job_type="train")
run = logger.experiment
logger.log_metrics({"loss": 1.0}, step=0)
assert (run.settings.mode, run.group, run.job_type, run.name) == ("offline", "a-sweep", "train", "a-run")
assert tuple(run.tags) == ("quick",)
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


# TensorBoard


def board(run_dir: Path, resume_step: int | None, steps: range, loss: float) -> None:
    logger = tensorboard_logger(run_dir, {"seed": 0}, resume_step)
    for step in steps:
        logger.log_metrics({"loss": loss + step}, step=step)
    logger.experiment.add_image("predictions", np.full((2, 2, 3), int(loss), np.uint8), steps[-1], dataformats="HWC")
    logger.finalize("success")
    logger.log_metrics({"AP": loss}, step=steps[-1])  # the end of a run logs after Lightning has closed the file
    logger.finalize("success")
    # TensorBoard reads files in the order of their names: second, host, process, and a number that counts in this whole
    # process of tests and gets a second digit. Runs have processes of their own, that begin at 0.
    folder = run_dir / "tensorboard"
    new = [file for file in folder.glob("events.*") if file.name.count(".") > 3]
    old = len(list(folder.glob("events.*"))) - len(new)
    for place, file in enumerate(sorted(new, key=lambda file: int(file.suffix[1:])), start=old):
        file.rename(folder / f"events.out.tfevents.{place:03}")


def test_tensorboard_shows_a_resumed_run_as_one(tmp_path: Path) -> None:
    # As above: the checkpoint was made after steps 0 to 3, and the run was killed in step 6.
    board(tmp_path, None, range(6), 1)
    board(tmp_path, 4, range(4, 8), 100)
    reader = events(tmp_path / "tensorboard")
    assert [(event.step, event.value) for event in reader.Scalars("loss")] == [
        (0, 1), (1, 2), (2, 3), (3, 4), (4, 104), (5, 105), (6, 106), (7, 107),
    ]  # fmt: skip
    assert [(event.step, event.value) for event in reader.Scalars("AP")] == [(7, 100)]
    assert [event.step for event in reader.Images("predictions")] == [7]


def test_tensorboard_forgets_a_run_that_starts_again(tmp_path: Path) -> None:
    board(tmp_path, None, range(6), 1)
    board(tmp_path, None, range(2), 5)
    reader = events(tmp_path / "tensorboard")
    assert [(event.step, event.value) for event in reader.Scalars("loss")] == [(0, 5), (1, 6)]


# A finder before all others, to which the package is not there.
BLOCKED = """
import runpy, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tensorboard":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
sys.argv = ["run.py", *sys.argv[1:]]
runpy.run_path("run.py", run_name="__main__")
"""


@pytest.mark.parametrize("arguments", [[], ["-m", "seed=0,1"]])
def test_without_the_package_nothing_is_trained(tmp_path: Path, arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *arguments, "logger=tensorboard", f"runs_dir={tmp_path / 'runs'}"],
        cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        "error: logger=tensorboard needs the package tensorboard (No module named 'tensorboard'): run pip install -e "
        '".[tensorboard]" -c constraints.txt, or leave logger out.\n'
    )
    assert not list(tmp_path.glob("runs/*/metrics.csv"))
