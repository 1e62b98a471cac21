"""Hydra's launcher for `-m`: checks every job of a sweep, runs each as its own process, ends with one table.

A thin shell: what is run stands in msil.sweep.jobs, how in msil.sweep.processes, what is shown in msil.sweep.screen,
what another terminal can read in msil.sweep.record.
"""

# No `from __future__ import annotations` here: Hydra executes a plugin before it is in sys.modules, where dataclasses
# would look up annotations that are strings.
import contextlib
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from msil.errors import UserError
from msil.lock import Locked, locked
from msil.overrides import check_weights, typed
from msil.reporting.tables import sweep_table, to_text, write_table
from msil.runs import is_finished, probe, read_result
from msil.sweep.aftermath import await_killed_jobs
from msil.sweep.jobs import Sweep, gpu_shares, job_arguments, job_environment, plan, varied
from msil.sweep.preview import expected_seconds, first_outcome, preview_lines
from msil.sweep.processes import Outcome, run_jobs
from msil.sweep.record import Record
from msil.sweep.screen import Screen
from msil.sweep.watch import LiveWatcher


@dataclass
class ProcessLauncherConf:
    _target_: str = "hydra_plugins.msil_launcher.process_launcher.ProcessLauncher"
    n_jobs: int = 1  # at a time
    dry_run: bool = False  # list the jobs and the time they will take, start nothing


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
        # Hydra's sweeper makes this folder before it asks for the launch; a sweep that is not run leaves none behind.
        folder = Path(config.hydra.sweep.dir)
        self._new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
        if not self.dry_run:
            try:
                probe(folder)  # before Hydra writes there, which ends in a traceback where it cannot
            except UserError as error:
                _stop(str(error), 2)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        loader = self.hydra_context.config_loader
        try:
            composed = [loader.load_sweep_config(self.config, list(overrides)) for overrides in job_overrides]
            for config, words in zip(composed, job_overrides, strict=True):
                check_weights(config, [word.partition("=")[0].lstrip("+") for word in words])
            configs = [typed(config) for config in composed]
            sweep = plan(configs, job_overrides)
            if self.n_jobs < 1:
                raise UserError(f"hydra.launcher.n_jobs={self.n_jobs} must be at least 1.")
            if self.dry_run:
                print("\n".join(preview_lines(sweep, self.n_jobs)))
                self._leave_nothing()
                sys.exit(0)
            with locked(sweep.folder):
                return self._sweep(sweep)
        except Locked as error:
            self._record().unlink(missing_ok=True)
            _stop(f"{error} Its state: msil status {shlex.quote(str(sweep.folder))}", 73)
        except UserError as error:
            self._leave_nothing()
            _stop(str(error), 2)

    def _sweep(self, sweep: Sweep) -> Sequence[JobReturn]:
        if self._record().exists():
            shutil.move(self._record(), sweep.folder / "multirun.yaml")
        outcomes, stopped_by = self._run(sweep)
        written = _report(sweep, outcomes)
        if stopped_by is not None:
            sys.exit(130 if stopped_by == signal.SIGINT else 75)
        if not all(outcome.done for outcome in outcomes):
            sys.exit(1)
        if not written:
            sys.exit(2)
        return [_job_return(outcome) for outcome in outcomes]

    def _run(self, sweep: Sweep) -> tuple[list[Outcome], int | None]:
        await_killed_jobs(sweep, print)
        outcomes = [first_outcome(job) for job in sweep.jobs]
        expected = expected_seconds(sweep)
        screen = Screen(sweep, outcomes, self.n_jobs, expected=expected)
        command = shlex.join(["python", *sys.argv])
        record = Record(sweep, outcomes, self.n_jobs, expected=expected, command=command)
        watcher = LiveWatcher(screen, record, sweep.jobs[0].run_dir.parent)
        hydra_overrides = list(self.config.hydra.overrides.hydra)
        program = [sys.executable, str(Path(sys.argv[0]).resolve()), *_flags(sys.argv[1:])]
        shares = gpu_shares(_visible_gpus() if self.n_jobs > 1 else [], self.n_jobs)
        threads = max(1, (os.cpu_count() or 1) // self.n_jobs) if self.n_jobs > 1 else None
        watcher.begin(outcomes)
        stopped_by = run_jobs(
            outcomes,
            command=lambda job: [*program, *job_arguments(job, hydra_overrides)],
            environment=lambda slot: job_environment(os.environ, shares[slot], threads),
            is_finished=lambda job: is_finished(job.run_dir, job.config_hash),
            watcher=watcher,
            n_jobs=self.n_jobs,
        )
        watcher.end()
        return outcomes, stopped_by

    def _leave_nothing(self) -> None:
        """Removes what Hydra's sweeper has made for a sweep that is not run."""
        self._record().unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # no longer empty
            for folder in self._new_folders:
                folder.rmdir()

    def _record(self) -> Path:
        """Where Hydra's sweeper has left its multirun.yaml, for the next sweep to overwrite."""
        return Path(self.config.hydra.sweep.dir) / "multirun.yaml"


def _report(sweep: Sweep, outcomes: Sequence[Outcome]) -> bool:
    """The table on the terminal and in the sweep's folder, and one line that counts; whether files could be written."""
    rows = [_row(outcome) for outcome in outcomes]
    table = sweep_table(rows, varied=varied([job.overrides for job in sweep.jobs]), table=sweep.table)
    unwritten = None
    try:
        write_table(sweep.folder, table)
    except OSError as error:
        unwritten = error.strerror
    files = "" if unwritten else f" Table: {sweep.folder}/table.md, table.csv"
    with contextlib.suppress(OSError):  # the terminal is gone, or its log is on a full disk
        print(f"\n{to_text(table)}\n{count(outcomes)}{files}")
        if any(outcome.done for outcome in outcomes):
            runs_dir = sweep.jobs[0].run_dir.parent
            print(f"With intervals, curves, errors and pictures: msil report {shlex.quote(str(runs_dir))}")
        sys.stdout.flush()
    if unwritten:
        print(
            f"error: the table cannot be written to {sweep.folder} ({unwritten}): make room and run the same command "
            "again; finished jobs are not repeated.",
            file=sys.stderr,
        )
    return unwritten is None


def count(outcomes: Sequence[Outcome]) -> str:
    """`5 ok, 1 failed of 6.`"""
    numbers = {
        "ok": sum(outcome.done for outcome in outcomes),
        "failed": sum(outcome.state == "failed" for outcome in outcomes),
        "stopped": sum(outcome.state == "interrupted" for outcome in outcomes),
        "not started": sum(outcome.state == "waiting" for outcome in outcomes),
    }
    words = ", ".join(f"{number} {word}" for word, number in numbers.items() if number or word in ("ok", "failed"))
    return f"{words} of {len(outcomes)}."


def _row(outcome: Outcome) -> dict[str, Any]:
    """What the table needs of a job: its result, or how it ended."""
    result = read_result(outcome.job.run_dir) if outcome.done else None
    if result is not None:
        return {**result, "skipped": outcome.state == "skipped"}
    status = {"waiting": "waiting", "interrupted": "stopped"}.get(outcome.state, "failed")
    return {
        "run_name": outcome.job.run_dir.name,
        "status": status,
        "exit_code": outcome.exit_code,
        "config": dict(outcome.job.values),
        "overrides": list(outcome.job.overrides),
    }


def _job_return(outcome: Outcome) -> JobReturn:
    """For sweepers that search: the AP is what a job returns."""
    result = read_result(outcome.job.run_dir)
    returned = JobReturn(overrides=list(outcome.job.overrides), status=JobStatus.COMPLETED)
    returned.return_value = None if result is None else result["metrics"].get("AP")
    return returned


def _stop(message: str, exit_code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(exit_code)


def _flags(arguments: Sequence[str]) -> list[str]:
    """Where the user keeps settings of their own: a job must find them too."""
    flags = vars(get_args_parser().parse_args(list(arguments)))
    names = [name for name in ("config_path", "config_name", "config_dir") if flags[name]]
    return [word for name in names for word in (f"--{name.replace('_', '-')}", flags[name])]


def _visible_gpus() -> list[str]:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu for gpu in chosen.split(",") if gpu.strip()]
    import torch  # late: it takes seconds, and one job at a time need not know

    return [str(gpu) for gpu in range(torch.cuda.device_count())]
