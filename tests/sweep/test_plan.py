"""The jobs of a sweep, and what each of them gets."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from msil.compose import register, to_config
from msil.config import Config
from msil.errors import ConfigError
from msil.sweep.plan import LEAKED, Job, gpu_shares, job_arguments, job_environment, labels_of, plan, varied

ROOT = Path(__file__).resolve().parents[2]
SIX = [[f"model.msil.align={align}", f"model.msil.apply={apply}", "seed=3"]
       for align in ("true", "false") for apply in ("cls", "reg", "both")]  # fmt: skip


def configs(jobs: list[list[str]]) -> list[Config]:
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return [to_config(compose("config", job)) for job in jobs]


def test_labels_name_what_varies() -> None:
    assert varied(SIX) == ["model.msil.align", "model.msil.apply"]
    assert labels_of(SIX)[1] == "align=true apply=reg"
    assert labels_of([["model/msil=full"], ["model/msil=no_align"]]) == ["msil=full", "msil=no_align"]
    assert labels_of([["model.msil.align=True"], ["model.msil.align=False"]]) == ["align=true", "align=false"]
    # Two settings of one short name keep their full names.
    assert labels_of([["data.seed=1", "seed=1"], ["data.seed=2", "seed=2"]])[0] == "data.seed=1 seed=1"


def test_a_plan_is_stable_and_has_a_folder_for_each_job() -> None:
    first = plan(configs(SIX[:2]), SIX[:2])
    assert plan(configs(SIX[:2]), SIX[:2]).name == first.name
    assert plan(configs(SIX[1:3]), SIX[1:3]).name != first.name
    assert first.folder == Path("runs/sweeps") / first.name
    assert [job.run_dir.name for job in first.jobs] == [
        f"shapes_fcos_resnet10_msil-{apply}_quick_s3_{job.config_hash}"
        for apply, job in zip(("cls", "reg"), first.jobs, strict=True)
    ]
    assert plan(configs([["experiment=table2"]]), [["experiment=table2"]]).name.startswith("table2-")


def test_an_empty_sweep_is_refused() -> None:
    with pytest.raises(ConfigError, match="the sweep has no job"):
        plan([], [])


def test_wandb_runs_are_grouped_unless_the_user_did() -> None:
    sweep = plan(configs([["logger=wandb"]]), [["logger=wandb"]])
    assert sweep.jobs[0].overrides == ("logger=wandb", f"logger.group={sweep.name}")
    for own in (["logger=wandb", "logger.group=mine"], ["logger=csv"]):
        assert plan(configs([own]), [own]).jobs[0].overrides == tuple(own)


def test_a_job_gets_what_was_typed_but_not_the_sweeps_own_settings() -> None:
    typed = ["hydra.mode=MULTIRUN", "hydra/launcher=msil_process", "hydra.launcher.n_jobs=2", "hydra.verbose=true"]
    typed += ["hydra.sweeper.max_batch_size=3", "hydra.sweep.dir=x", "hydra.run.dir=y", "hydra/sweeper=basic"]
    typed += ["+hydra.job.env_set.A=b", "hydra.runtime.cwd=z"]
    job = Job(1, ("seed=1", "data.root='a b'"), "0" * 8, Path("runs/x"), {}, "")
    passed_on = ["hydra.verbose=true", "+hydra.job.env_set.A=b", "hydra.runtime.cwd=z", "hydra.mode=RUN"]
    assert job_arguments(job, typed) == [*job.overrides, *passed_on]


def test_a_job_joins_no_process_group_of_its_launcher() -> None:
    dirty = dict.fromkeys(LEAKED, "1") | {"HOME": "/h", "OMP_NUM_THREADS": "2"}
    assert {"LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "WORLD_SIZE", "PL_GLOBAL_SEED"} <= set(LEAKED)
    assert job_environment(dirty, None, 1) == {"HOME": "/h", "OMP_NUM_THREADS": "2", "PYTHONUNBUFFERED": "1"}
    assert job_environment({}, "2,3", 4) == {
        "CUDA_VISIBLE_DEVICES": "2,3",
        "OMP_NUM_THREADS": "4",
        "PYTHONUNBUFFERED": "1",
    }


@pytest.mark.parametrize(
    ("gpus", "n_jobs", "shares"),
    [
        ("01234567", 1, [None]),  # one job sees all
        ("", 3, [None, None, None]),
        ("0123", 2, ["0,1", "2,3"]),
        ("01234", 2, ["0,1", "2,3"]),  # equal shares; the fifth stays free
        ("01", 3, ["0", "1", "0"]),
    ],
)
def test_jobs_at_a_time_share_the_gpus(gpus: str, n_jobs: int, shares: list[str | None]) -> None:
    assert gpu_shares(list(gpus), n_jobs) == shares
