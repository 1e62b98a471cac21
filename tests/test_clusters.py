"""SLURM through submitit, srun and torchrun; docs/clusters.md is about them."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tests.launch.faults import until

from msil.check import SLURM as SLURM_LAUNCHER
from msil.check import check_launcher
from msil.compose import register
from msil.errors import ConfigError
from msil.runs import read_result

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
TINY = (
    "model.channels=16", "model.head.num_convs=1", "model.head.norm_groups=4", "model.msil.reduction=4",
    "model.score_thresh=0.001", "data.num_train=16", "data.num_val=8", "data.image_size=64", "trainer.accelerator=cpu",
    "schedule=smoke", "data.batch_size=2",
)  # fmt: skip
PLAIN = (sys.executable, "run.py")
SWEEP = (*PLAIN, "-m")
DDP = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
TORCHRUN = (
    sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2", "--rdzv-backend=c10d",
    "--rdzv-endpoint=localhost:0", "run.py",
)  # fmt: skip
LONG = ("run_name=mine", "schedule.max_steps=null", "schedule.epochs=12", "schedule.eval_every=12")
STEPS = 96  # of LONG: 16 images, 2 a step, 12 epochs

needs_submitit = pytest.mark.skipif(
    importlib.util.find_spec("submitit") is None, reason='needs submitit: pip install -e ".[slurm]" -c constraints.txt'
)


# The settings of conf/hydra/launcher/submitit_slurm.yaml


@needs_submitit
@pytest.mark.filterwarnings(r"ignore:\s*'hydra/launcher/:UserWarning")  # Hydra checks them against the plugin's types
def test_slurm_gets_a_task_for_each_device_and_node() -> None:
    register()
    words = ["hydra/launcher=submitit_slurm", "hydra.launcher.gpus_per_node=4", "trainer.num_nodes=2"]
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="run"):
        composed = compose("config", words, return_hydra_config=True)
    settings = OmegaConf.to_container(composed.hydra.launcher, resolve=True)
    assert isinstance(settings, dict)
    assert (settings["_target_"], settings["tasks_per_node"], settings["nodes"]) == (SLURM_LAUNCHER, 4, 2)
    for devices in (4, "auto"):
        check_launcher(settings, devices)
    with pytest.raises(ConfigError, match=r"trainer\.devices=2 .* set hydra\.launcher\.gpus_per_node=2"):
        check_launcher(settings, 2)


def test_a_launcher_that_is_not_installed_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match=r"hydra/launcher=submitit_slurm is not installed: pip install"):
        check_launcher({"_target_": SLURM_LAUNCHER}, 1)


# Real jobs


def begun(program: Sequence[str], folder: Path, root: Path, *words: str, **variables: str) -> subprocess.Popen[str]:
    command = [*program, *TINY, f"runs_dir={folder}/runs", f"data.root={root}", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(*processes: subprocess.Popen[str]) -> tuple[list[int], str, str]:
    """Their exit codes, outputs and errors; kills what does not end."""
    try:
        out, err = zip(*(process.communicate(timeout=200) for process in processes), strict=True)
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], "".join(out), "".join(err)


def results(folder: Path) -> dict[int, dict[str, Any]]:
    """By seed."""
    found = [read_result(path) for path in (folder / "runs").iterdir() if path.name != "sweeps"]
    return {result["seed"]: result for result in found if result is not None}


def until_it_has_saved(folder: Path, process: subprocess.Popen[str]) -> None:
    last = folder / "runs" / "mine" / "checkpoints" / "last.ckpt"
    until(lambda: last.exists() or process.poll() is not None, "nothing was saved", seconds=120)


# SLURM's commands as far as submitit uses them, on this machine: $HERE/requeue stands for the queue.
SLURM = {
    "sbatch": """
        last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$1")
        export SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_JOB_NODELIST=localhost
        export SLURM_JOB_ID=$$ SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
        for task in $(seq 0 "${last:-0}"); do
            (test -z "$last" || export SLURM_ARRAY_JOB_ID=$$ SLURM_ARRAY_TASK_ID=$task
             bash "$1"
             if rm "$HERE/requeue"; then bash "$1"; fi) > /dev/null 2>&1 &
        done
        echo "Submitted batch job $$" """,
    "srun": """
        log=${3//%A/$SLURM_ARRAY_JOB_ID}; log=${log//%a/$SLURM_ARRAY_TASK_ID}
        log=${log//%j/$SLURM_JOB_ID}; log=${log//%t/0}
        mkdir -p "$(dirname "$log")"; shift 5; exec "$@" >> "$log" 2>&1""",
    "scontrol": 'touch "$HERE/requeue"',
    "sacct": "echo",
}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine with SLURM."""
    for name, script in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HERE": str(tmp_path)}


@pytest.mark.slow
@needs_submitit
def test_submitit_runs_a_sweep(tmp_path: Path, shapes: Path, slurm: dict[str, str]) -> None:
    """Three jobs, the second impossible: the others run all the same, and nothing that is finished runs again."""
    launcher = "hydra/launcher=submitit_slurm"
    codes, _, said = ended(begun(SWEEP, tmp_path, shapes, launcher, "seed=0,-5,1", **slurm))
    assert codes == [1], said
    assert "error: seed=-5 must be from 0 to 4294967295." in said
    assert "Traceback" not in said
    first = results(tmp_path)
    assert set(first) == {0, 1}
    command = shlex.split(first[1]["command"])
    assert (command[:2], command[-1]) == (["python", "run.py"], "seed=1")

    codes, _, said = ended(begun(SWEEP, tmp_path, shapes, launcher, "seed=0,1", **slurm))
    assert codes == [0], said
    # The table comes from the launcher of this project, which finds all jobs finished.
    codes, out, said = ended(begun(SWEEP, tmp_path, shapes, "seed=0,1"))
    assert codes == [0], said
    assert "2 ok, 0 failed of 2" in out
    assert results(tmp_path) == first


@pytest.mark.slow
@needs_submitit
def test_a_job_that_submitit_puts_back_into_the_queue_goes_on(
    tmp_path: Path, shapes: Path, slurm: dict[str, str]
) -> None:
    """At SIGUSR2, which SLURM sends before the limit."""
    sweep = begun(SWEEP, tmp_path, shapes, "hydra/launcher=submitit_slurm", "seed=0", *LONG, **slurm)
    try:
        until_it_has_saved(tmp_path, sweep)
        who = (tmp_path / "runs" / "mine" / ".lock").read_text()
        os.kill(int(who.split()[1]), signal.SIGUSR2)
    finally:
        codes, _, said = ended(sweep)
    assert codes == [0], said
    (log,) = (tmp_path / "runs" / "sweeps" / ".submitit").glob("*/*_log.out")
    assert log.read_text().count("Starting with JobEnvironment") == 2
    assert (results(tmp_path)[0]["epochs"], results(tmp_path)[0]["steps"]) == (12, STEPS)


@pytest.mark.slow
def test_torchrun(tmp_path: Path, shapes: Path) -> None:
    codes, _, said = ended(begun(TORCHRUN, tmp_path, shapes))  # each process would train the whole run in one folder
    assert codes != [0]
    assert "error: torchrun started 2 processes, and these settings make 1: set trainer=ddp" in said
    assert results(tmp_path) == {}

    codes, out, said = ended(begun(TORCHRUN, tmp_path, shapes, *DDP))
    assert codes == [0], said
    assert len(re.findall("^files in ", out, re.MULTILINE)) == 1  # rank 0 alone prints
    assert results(tmp_path)[0]["machine"]["processes"] == 2


@pytest.mark.slow
def test_two_tasks_of_srun_stop_at_sigusr1_and_go_on(tmp_path: Path, shapes: Path) -> None:
    """No SLURM: its variables, and its signal to every task."""

    def tasks() -> list[subprocess.Popen[str]]:
        variables = {
            "SLURM_JOB_ID": "123456", "SLURM_JOB_NAME": "msil", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
            "SLURM_NNODES": "1", "SLURM_NODELIST": "127.0.0.1", "SLURM_NODEID": "0",
            "MASTER_PORT": str(20000 + os.getpid() % 10000),
        }  # fmt: skip
        ids = [{"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)} for task in (0, 1)]
        return [begun(PLAIN, tmp_path, shapes, *LONG, *DDP, **variables, **own) for own in ids]

    first = tasks()
    try:
        until_it_has_saved(tmp_path, first[0])
        for task in first:
            task.send_signal(signal.SIGUSR1)
    finally:
        codes, _, said = ended(*first)
    assert codes == [75, 75], said
    assert results(tmp_path) == {}

    codes, out, said = ended(*tasks())
    assert codes == [0, 0], said
    assert out.count("files in ") == 1
    assert (results(tmp_path)[0]["steps"], results(tmp_path)[0]["machine"]["processes"]) == (STEPS, 2)
