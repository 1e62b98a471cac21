"""Hydra's launcher for `-m`: checks every job of a sweep, runs each as its own process, ends with one table.

A thin shell: the jobs are in msil.sweep.plan, how they are run in msil.sweep.run, what is printed in msil.sweep.show.
"""

# No `from __future__ import annotations` here: Hydra executes a plugin before it is in sys.modules, where dataclasses
# would look up annotations that are strings.
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from msil.check import checked
from msil.command_line import inherited
from msil.errors import ConfigError, UserError
from msil.explain import parse
from msil.finished import finished_result
from msil.launch.processes import program
from msil.lock import locked
from msil.runs import probe
from msil.sweep.plan import Sweep, gpu_shares, job_arguments, job_environment, plan
from msil.sweep.run import run_jobs
from msil.sweep.show import Outcome, dry_run, report, say, say_change


@dataclass
class ProcessLauncherConf:
    _target_: str = "hydra_plugins.msil_launcher.process_launcher.ProcessLauncher"
    n_jobs: int = 1  # at a time
    dry_run: bool = False  # list the jobs, start none


ConfigStore.instance().store(
    group="hydra/launcher", name="msil_process", node=ProcessLauncherConf, provider="msil_launcher"
)


class ProcessLauncher(Launcher):
    """Exit codes of the whole command: 0 all jobs have results, 1 one failed, 2 refused, or a full disk kept the table
    from being written, 73 the same sweep runs already, 75 SIGTERM, 130 Ctrl-C."""

    def __init__(self, n_jobs: int, dry_run: bool) -> None:
        self.n_jobs = n_jobs
        self.dry_run = dry_run
        self.config: DictConfig
        self.hydra_context: HydraContext
        self._new_folders: list[Path] = []

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.config = config
        # Hydra's sweeper makes this folder before the launch; a sweep that is not run must leave none behind.
        folder = Path(config.hydra.sweep.dir)
        self._new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
        if not self.dry_run:
            probe(folder)  # before Hydra writes there, which ends in a traceback where it cannot

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        (Path(self.config.hydra.sweep.dir) / "multirun.yaml").unlink(missing_ok=True)  # the sweeper's
        loader = self.hydra_context.config_loader
        try:
            composed = [
                loader.load_sweep_config(self.config, [*inherited([parse(word) for word in words]), *words])
                for words in job_overrides
            ]
            configs = [
                checked(config, [word.partition("=")[0].lstrip("+") for word in words])
                for config, words in zip(composed, job_overrides, strict=True)
            ]
            sweep = plan(configs, job_overrides)
            if self.n_jobs < 1:
                raise ConfigError(f"hydra.launcher.n_jobs={self.n_jobs} must be at least 1.")
            outcomes = [
                Outcome(job, "waiting" if result is None else "skipped", result=result)
                for job, result in zip(sweep.jobs, map(finished_result, configs), strict=True)
            ]
            if self.dry_run:
                dry_run(outcomes)
                self._remove_folders()
                sys.exit(0)
            with locked(sweep.folder):
                return self._sweep(sweep, outcomes)
        except UserError:
            self._remove_folders()
            raise

    def _sweep(self, sweep: Sweep, outcomes: Sequence[Outcome]) -> Sequence[JobReturn]:
        stopped_by = self._run(sweep, outcomes)
        written = report(sweep, outcomes)
        if stopped_by is not None:
            sys.exit(130 if stopped_by == signal.SIGINT else 75)
        if not all(outcome.done for outcome in outcomes):
            sys.exit(1)
        if not written:
            sys.exit(2)
        return [_job_return(outcome) for outcome in outcomes]

    def _run(self, sweep: Sweep, outcomes: Sequence[Outcome]) -> int | None:
        jobs = "1 job" if len(outcomes) == 1 else f"{len(outcomes)} jobs"
        at_once = "one at a time" if self.n_jobs == 1 else f"{self.n_jobs} at a time"
        say(f"Sweep {sweep.name}: {jobs}, {at_once}. Ctrl-C stops; the same command continues.")
        for outcome in outcomes:
            if outcome.done:
                say_change(outcome, outcomes)
        hydra_overrides = list(self.config.hydra.overrides.hydra)
        words = [*program(), *_flags(sys.argv[1:])]
        shares = gpu_shares(_visible_gpus() if self.n_jobs > 1 else [], self.n_jobs)
        threads = max(1, (os.cpu_count() or 1) // self.n_jobs) if self.n_jobs > 1 else None
        return run_jobs(
            outcomes,
            command=lambda job: [*words, *job_arguments(job, hydra_overrides)],
            environment=lambda slot: job_environment(os.environ, shares[slot], threads),
            n_jobs=self.n_jobs,
        )

    def _remove_folders(self) -> None:
        """Removes what Hydra's sweeper has made for a sweep that is not run."""
        with contextlib.suppress(OSError):  # no longer empty
            for folder in self._new_folders:
                folder.rmdir()


def _job_return(outcome: Outcome) -> JobReturn:
    """For sweepers that search: the AP is what a job returns."""
    returned = JobReturn(overrides=list(outcome.job.overrides), status=JobStatus.COMPLETED)
    returned.return_value = None if outcome.result is None else outcome.result["metrics"].get("AP")
    return returned


def _flags(arguments: Sequence[str]) -> list[str]:
    """The user's own folders of settings: a job needs them too."""
    flags = vars(get_args_parser().parse_args(list(arguments)))
    names = [name for name in ("config_path", "config_name", "config_dir") if flags[name]]
    return [word for name in names for word in (f"--{name.replace('_', '-')}", flags[name])]


def _visible_gpus() -> list[str]:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu for gpu in chosen.split(",") if gpu.strip()]
    import torch  # late: it takes seconds, and one job at a time need not know

    return [str(gpu) for gpu in range(torch.cuda.device_count())]
