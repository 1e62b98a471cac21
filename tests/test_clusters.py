"""SLURM through submitit, srun and torchrun; docs/clusters.md is about them."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from msil.compose import register
from msil.data.shapes import write_shapes
from msil.errors import ConfigError
from msil.runs import read_result
from msil.sweep.slurm import TARGET, check_launcher

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
TINY = (
    "model.channels=16", "model.head.num_convs=1", "model.head.norm_groups=4", "model.msil.reduction=4",
    "model.score_thresh=0.001", "data.num_train=16", "data.num_val=8", "data.image_size=64", "trainer.accelerator=cpu",
    "schedule=smoke", "data.batch_size=2",
)  # fmt: skip
DDP = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
TORCHRUN = (
    sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2", "--rdzv-backend=c10d",
    "--rdzv-endpoint=localhost:0",
)  # fmt: skip
LONG = ("run_name=mine", "schedule.max_steps=null", "schedule.epochs=12", "schedule.eval_every=12")
STEPS = 96  # of LONG: 16 images, 2 a step, 12 epochs

needs_submitit = pytest.mark.skipif(
    importlib.util.find_spec("submitit") is None, reason='needs submitit: pip install -e ".[slurm]" -c constraints.txt'
)


# The settings of conf/hydra/launcher/submitit_slurm.yaml


@needs_submitit
def test_slurms_settings_are_those_of_the_plugin() -> None:
    conf = importlib.import_module("hydra_plugins.hydra_submitit_launcher.config").SlurmQueueConf
    plugins = {field.name for field in dataclasses.fields(conf)}
    assert set(OmegaConf.load(CONF / "hydra" / "launcher" / "submitit_slurm.yaml")) == plugins


@needs_submitit
@pytest.mark.filterwarnings(r"ignore:\s*'hydra/launcher/:UserWarning")  # Hydra checks them against the plugin's types
def test_slurm_gets_a_task_for_each_device_and_node() -> None:
    register()
    words = ["hydra/launcher=submitit_slurm", "hydra.launcher.gpus_per_node=4", "trainer.num_nodes=2"]
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="run"):
        composed = compose("config", words, return_hydra_config=True)
    settings = OmegaConf.to_container(composed.hydra.launcher, resolve=True)
    assert isinstance(settings, dict)
    assert (settings["_target_"], settings["tasks_per_node"], settings["nodes"]) == (TARGET, 4, 2)
    for devices in (4, "auto"):
        check_launcher(settings, devices)
    with pytest.raises(ConfigError, match=r"trainer\.devices=2 .* set hydra\.launcher\.gpus_per_node=2"):
        check_launcher(settings, 2)


def test_a_launcher_that_is_not_installed_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match=r"hydra/launcher=submitit_slurm is not installed: pip install"):
        check_launcher({"_target_": TARGET}, 1)


# Real jobs


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes", num_train=16, num_val=8, image_size=64, seed=0)


def settings(tmp_path: Path, root: Path) -> list[str]:
    return [*TINY, f"runs_dir={tmp_path / 'runs'}", f"data.root={root}"]


def ended(words: list[str]) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # Ray would else write a token into the home folder.
    environment = {**kept, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)


def results(tmp_path: Path) -> dict[int, dict[str, Any]]:
    """By seed."""
    found = [read_result(path) for path in (tmp_path / "runs").iterdir() if path.name != "sweeps"]
    return {result["seed"]: result for result in found if result is not None}


def check_sweep(tmp_path: Path, shapes: Path, *chosen: str) -> None:
    """Three jobs, the second impossible: the others run all the same, and nothing that is finished runs again."""
    words = [sys.executable, "run.py", "-m", *settings(tmp_path, shapes)]
    done = ended([*words, *chosen, "seed=0,-5,1"])
    assert done.returncode == 1, done.stderr
    assert "error: seed=-5 must be from 0 to 4294967295." in done.stderr
    assert "Traceback" not in done.stderr
    first = results(tmp_path)
    assert set(first) == {0, 1}
    assert all(result["steps"] == 4 for result in first.values())
    command = shlex.split(first[1]["command"])
    assert command[:2] == ["python", "run.py"]
    assert command[-1] == "seed=1"

    again = ended([*words, *chosen, "seed=0,1"])
    assert again.returncode == 0, again.stderr
    assert results(tmp_path) == first
    # The table comes from the launcher of this project, which finds all jobs finished.
    table = ended([*words, "seed=0,1"])
    assert table.returncode == 0, table.stderr
    assert "2 ok, 0 failed of 2" in table.stdout
    assert results(tmp_path) == first


@pytest.mark.slow
@needs_submitit
def test_submitit_runs_a_sweep(tmp_path: Path, shapes: Path) -> None:
    check_sweep(tmp_path, shapes, "hydra/launcher=submitit_local")
    logs = [path.read_text() for path in (tmp_path / "runs" / "sweeps" / ".submitit").glob("*/*_log.out")]
    assert len(logs) == 3 + 2
    assert sum("finished before with these very settings" in log for log in logs) == 2


@pytest.mark.slow
@needs_submitit
def test_a_job_of_submitit_with_two_processes(tmp_path: Path, shapes: Path) -> None:
    ddp = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    words = [sys.executable, "run.py", "-m", "hydra/launcher=submitit_local", *settings(tmp_path, shapes), *ddp]
    done = ended([*words, "seed=0"])
    assert done.returncode == 0, done.stderr
    assert results(tmp_path)[0]["machine"]["processes"] == 2


@pytest.mark.slow
@needs_ray
def test_ray_runs_a_sweep(tmp_path: Path, shapes: Path) -> None:
    check_sweep(tmp_path, shapes, "hydra/launcher=ray", "hydra.launcher.ray.init.num_cpus=2")


def wait_for(condition: Any, process: subprocess.Popen[str], what: str) -> Any:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if found := condition():
            return found
        assert process.poll() is None, f"the command ended before {what}"
        time.sleep(0.05)
    raise AssertionError(f"no {what} within 120 s")


@pytest.mark.slow
@needs_submitit
def test_a_job_that_submitit_puts_back_into_the_queue_goes_on(tmp_path: Path, shapes: Path) -> None:
    """SIGUSR2 is what SLURM sends to submitit's jobs before the limit; the local executor takes it the same way."""
    words = [
        sys.executable, "run.py", "-m", "hydra/launcher=submitit_local", *settings(tmp_path, shapes), "seed=0",
        "run_name=mine", "schedule.max_steps=null", "schedule.epochs=12", "schedule.eval_every=12",
    ]  # fmt: skip
    folder = tmp_path / "runs" / "sweeps" / ".submitit"
    process = subprocess.Popen(
        words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        checkpoint = tmp_path / "runs" / "mine" / "checkpoints" / "last.ckpt"
        wait_for(checkpoint.exists, process, "checkpoint")
        controller = next(path.name for path in folder.iterdir() if path.name.isdecimal())
        (worker,) = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
        os.kill(int(worker), signal.SIGUSR2)
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, out + err
    log = next(folder.glob("*/*_log.out")).read_text()
    assert "this job is preempted" in log + next(folder.glob("*/*_log.err")).read_text()
    assert f"Requeued job {controller}" in log
    assert log.count("Starting with JobEnvironment") == 2
    result = read_result(tmp_path / "runs" / "mine")
    assert result is not None
    assert (result["epochs"], result["steps"]) == (12, 96)  # 16 images, 2 a step


def weights(tmp_path: Path) -> dict[str, torch.Tensor]:
    (checkpoint,) = (tmp_path / "runs").glob("*/checkpoints/last.ckpt")
    return torch.load(checkpoint, weights_only=True)["state_dict"]


@pytest.mark.slow
def test_torchrun_gives_what_the_plain_command_gives(tmp_path: Path, shapes: Path) -> None:
    ddp = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    torchrun = (
        sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2", "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
    )  # fmt: skip
    found = {}
    for name, program in {"plain": (sys.executable,), "torchrun": torchrun}.items():
        done = ended([*program, "run.py", *settings(tmp_path / name, shapes), *ddp])
        assert done.returncode == 0, done.stderr
        assert len(re.findall("^files in ", done.stdout, re.MULTILINE)) == 1  # one of them speaks
        (found[name],) = results(tmp_path / name).values()
    assert [result["machine"]["processes"] for result in found.values()] == [2, 2]
    for key in ("metrics", "steps", "epochs", "config_hash", "val_images"):
        assert found["plain"][key] == found["torchrun"][key]
    plain, other = weights(tmp_path / "plain"), weights(tmp_path / "torchrun")
    assert plain.keys() == other.keys()
    assert all(torch.equal(plain[key], other[key]) for key in plain)


@pytest.mark.slow
def test_torchrun_without_trainer_ddp_is_refused(tmp_path: Path, shapes: Path) -> None:
    """Each process would train the whole run, all in one folder."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
                "--rdzv-endpoint=localhost:0")  # fmt: skip
    done = ended([*torchrun, "run.py", *settings(tmp_path, shapes)])
    assert done.returncode != 0
    assert "error: torchrun started 2 processes, and these settings make 1: set trainer=ddp" in done.stderr
    assert results(tmp_path) == {}


PORT = str(20000 + os.getpid() % 10000)  # srun's processes agree on one by the job's number


def started_by_srun(words: list[str], task: int) -> subprocess.Popen[str]:
    """One of two tasks, by the variables that srun gives them."""
    variables = {
        "SLURM_JOB_ID": "123456", "SLURM_JOB_NAME": "msil", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1", "SLURM_NODELIST": "127.0.0.1", "SLURM_NODEID": "0", "SLURM_PROCID": str(task),
        "SLURM_LOCALID": str(task), "MASTER_PORT": PORT,
    }  # fmt: skip
    return subprocess.Popen(
        words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **variables}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_two_tasks_of_srun_stop_at_sigusr1_and_go_on(tmp_path: Path, shapes: Path) -> None:
    """No SLURM: its variables, and its signal to every task."""
    words = [
        sys.executable, "run.py", *settings(tmp_path, shapes), "run_name=mine", "trainer=ddp",
        "trainer.accelerator=cpu", "trainer.devices=2", "schedule.max_steps=null", "schedule.epochs=12",
        "schedule.eval_every=12",
    ]  # fmt: skip
    tasks = [started_by_srun(words, task) for task in (0, 1)]
    try:
        wait_for((tmp_path / "runs" / "mine" / "checkpoints" / "last.ckpt").exists, tasks[0], "checkpoint")
        for task in tasks:
            task.send_signal(signal.SIGUSR1)
        said = [task.communicate(timeout=120) for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert [task.returncode for task in tasks] == [75, 75], said
    assert results(tmp_path) == {}

    tasks = [started_by_srun(words, task) for task in (0, 1)]
    try:
        said = [task.communicate(timeout=300) for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert [task.returncode for task in tasks] == [0, 0], said
    assert [out.count("files in ") for out, _ in said] == [1, 0]
    assert results(tmp_path)[0]["steps"] == 96  # 16 images, 2 a step, 12 epochs
    assert results(tmp_path)[0]["machine"]["processes"] == 2
