"""metrics.csv and TensorBoard over a resume, and Weights & Biases without an account or a network."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from msil.training.experiment import run
from msil.training.loggers import MetricsFile

from .cases import before_reading, folder, rows, tiny_config


def log(run_dir: Path, resume_step: int | None, steps: range, loss: float) -> None:
    logger = MetricsFile(run_dir, resume_step)
    for step in steps:
        logger.log_metrics({"loss": loss + step, "epoch": step // 2}, step=step)
        if step % 2:
            logger.log_metrics({"AP": step / 10, "APl": float("nan"), "epoch": step // 2}, step=step)
    logger.save()


def test_a_resume_keeps_what_its_checkpoint_had_and_drops_what_is_trained_again(tmp_path: Path) -> None:
    # The checkpoint was made after steps 0 to 3; the run was killed in step 6, and again before the next row.
    log(tmp_path, None, range(6), 1)
    MetricsFile(tmp_path, 4)
    log(tmp_path, 4, range(4, 8), 100)
    found = [(int(row["step"]), float(row["loss"])) for row in rows(tmp_path) if "loss" in row]
    assert found == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 104), (5, 105), (6, 106), (7, 107)]
    evaluations = [(int(row["step"]), float(row["AP"]), row["APl"]) for row in rows(tmp_path) if "AP" in row]
    assert evaluations == [(1, 0.1, "nan"), (3, 0.3, "nan"), (5, 0.5, "nan"), (7, 0.7, "nan")]
    log(tmp_path, None, range(2), 5)  # without a checkpoint it begins again
    assert [float(row["loss"]) for row in rows(tmp_path) if "loss" in row] == [5, 6]


@pytest.mark.parametrize("fault", ["full disk", "kill -9"])
def test_a_save_that_does_not_end_keeps_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    log(tmp_path, None, range(100), 1)
    before = (tmp_path / "metrics.csv").read_bytes()
    pid = os.fork()
    if pid == 0:
        if fault == "kill -9":
            monkeypatch.setattr(os, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, resource.RLIM_INFINITY))
        try:
            log(tmp_path, 90, range(90, 92), 1)
        except OSError:
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL if fault == "kill -9" else os.WEXITSTATUS(status) == 3
    assert (tmp_path / "metrics.csv").read_bytes() == before


# W&B, in a process of its own: it reads its settings once a process.
SCRIPT = """
import sys
from pathlib import Path

from training.cases import tiny_config
from msil.training import loggers
from msil.training.experiment import run
import wandb

seen = {}
def finish(**_):
    one = wandb.run
    seen.update(mode=one.settings.mode, group=one.group, job=one.job_type, name=one.name, tags=one.tags)
    seen.update(seed=one.config["seed"], loss=one.summary["loss"], AP=one.summary["AP"], flops=one.summary["flops"])
    real_finish()
real_finish, wandb.finish = wandb.finish, finish
settings = ("logger=wandb", "logger.group=a-sweep", "logger.tags=[quick]", "schedule.max_steps=2")
config = tiny_config(sys.argv[1], sys.argv[2], *settings)
result = run(config)
assert seen.pop("loss") > 0
assert seen == {
    "mode": "offline", "group": "a-sweep", "job": "train", "name": config.run_name, "tags": ("quick",), "seed": 0,
    "AP": result["metrics"]["AP"], "flops": result["flops"],
}, seen

wandb.finish = real_finish
def id_of(resume_step):
    (logger,) = loggers.dashboard_loggers(config, {}, Path(sys.argv[1]).parent / "again", resume_step)
    loggers.finish_dashboards()
    return logger.experiment.id
first, resumed, anew, of_anew = map(id_of, (None, 4, None, 2))
assert first == resumed != anew == of_anew, (first, resumed, anew, of_anew)
config.run_name = "longer"  # of a copied folder
assert id_of(2) not in (first, anew)
"""


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({}, "no login was found"),
        # Port 9 of this machine: nobody answers, at once.
        pytest.param(
            {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"},
            "127.0.0.1 cannot be reached",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_wandb_without_a_login_or_a_server_is_offline(
    tmp_path: Path, shapes: Path, environment: dict[str, str], reason: str
) -> None:
    home = tmp_path / "home"  # no login is found there, and none may be written
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB") and name != "NETRC"}
    places = dict.fromkeys(("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"), str(home))
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "runs"), str(shapes)],
        env={**kept, **places, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        cwd=home, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()[0]
    assert said.startswith(f"W&B: {reason}") and "so this run is logged offline; later: wandb sync " in said
    assert "wandb:" not in done.stdout + done.stderr  # not a word of its own
    assert not (home / ".netrc").exists()
    # The printed command sends this run, and sends it once: `latest-run` is a link to it.
    (run_dir,) = (tmp_path / "runs").glob("*/wandb/offline-run-*")
    assert list(run_dir.glob("*.wandb")) and list(run_dir.glob("files/media/images/predictions_*.png"))


def test_tensorboard_shows_a_resumed_run_as_one(tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path, shapes, "logger=tensorboard", "trainer.save_every=2")

    def dies() -> None:
        raise RuntimeError("the power went")

    with monkeypatch.context() as patch:
        before_reading(patch, 29, dies)  # in step 8, the last; the checkpoint is of step 6
        with pytest.raises(RuntimeError, match="the power went"):
            run(config)
    run(config)
    reader = EventAccumulator(str(folder(config) / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    reader.Reload()
    shown = {event.step: event.value for event in reader.Scalars("loss")}
    assert shown == pytest.approx(
        {int(row["step"]): float(row["loss"]) for row in rows(folder(config)) if "loss" in row}
    )
    assert [event.step for event in reader.Images("predictions")] == [3, 7, 7]
