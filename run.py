"""Train, evaluate and sweep detectors from the command line; `python run.py --help` begins with ten useful commands."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from msil.config import Config, register
from msil.errors import UserError
from msil.interruption import Interruption, Preempted
from msil.lock import Locked, locked
from msil.overrides import check_command_line, settled, typed
from msil.runs import read_result
from msil.sweep.orphans import end_with_parent
from msil.sweep.ranks import devices_here, run_ranks, started_from_outside
from msil.validate import validate


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def train(composed: DictConfig) -> float | None:
    """One run: prints its numbers and returns its AP."""
    if in_a_launchers_worker():
        prepare()
        # This job's own command, for result.json and for its processes.
        sys.argv = ["run.py", *HydraConfig.get().overrides.task, "hydra.mode=RUN"]
    interruption = Interruption()
    with interruption.watching():  # already: a run that is told to stop while it starts stops at its first batch
        return one_run(composed, interruption)


def one_run(composed: DictConfig, interruption: Interruption) -> float | None:
    try:
        config = typed(composed)
        validate(config)
    except UserError as error:
        stop(error)
    devices = 1 if started_from_outside(os.environ) else devices_here(config.trainer)
    if devices > 1:
        return on_devices(config, devices)
    # Late, because they take seconds that --help, a typo and shell completion need not wait for. They make a million
    # objects that stay: looking for garbage among them would take a quarter of these seconds.
    loaded = "torch" in sys.modules  # by an earlier job in this process, whose garbage is not to be kept
    gc.disable()
    from lightning.pytorch.utilities import rank_zero_only

    from msil.reporting.tables import result_line
    from msil.training.experiment import run
    from msil.training.faults import PeerLost, TrainingDiverged

    if not loaded:
        gc.freeze()
    gc.enable()

    try:
        result = run(config, interruption)
    except TrainingDiverged as error:
        stop(error, 70)
    except Locked as error:
        stop(error, 73)
    except Preempted as error:
        stop(error, 75)
    except PeerLost as error:
        stop(error, 1)
    except UserError as error:
        stop(error)
    if rank_zero_only.rank == 0:
        if result.get("skipped"):
            print("finished before with these very settings, so nothing was trained; remove the folder to run it again")
        print(result_line(result))
    return result["metrics"].get("AP")


def on_devices(config: Config, devices: int) -> float | None:
    """The same command as one process a device."""
    run_dir = Path(config.runs_dir) / config.run_name
    try:
        with locked(run_dir):  # or another run's logs would be overwritten before its folder is found in use
            pass
    except Locked as error:
        stop(error, 73)
    except UserError as error:
        stop(error)
    code = run_ranks([sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]], devices, run_dir)
    if code != 0:
        leave(f"a process of {run_dir} ended with an error, exit code {code}", code)
    result = read_result(run_dir)
    return None if result is None else result["metrics"].get("AP")


def stop(error: Exception, exit_code: int = 2) -> NoReturn:
    # An error in a loader's worker process arrives with that process's traceback in its text.
    lines = str(error).strip().splitlines() or [type(error).__name__]
    message = lines[-1].removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")
    print(f"error: {message}", file=sys.stderr)
    leave(message, exit_code)


def leave(message: str, exit_code: int) -> NoReturn:
    if in_a_launchers_worker() and exit_code != 75:  # 75 is to be run again, so the job must not count as over
        raise CompactHydraException(f"error: {message}")  # which such a launcher reports when the other jobs are done
    sys.exit(exit_code)


def in_a_launchers_worker() -> bool:
    """Whether SLURM's or Ray's launcher runs this job; a job of this project's own launcher is a single run."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def prepare() -> None:
    # Threads that spin while they wait cost three times the CPU seconds as soon as anything else runs on the machine.
    # Must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # A user needs the sentence, not the line of our code that warned.
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    # conf/hydra/launcher gives values to the settings of plugins that have the same names, on purpose.
    warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")
    register(settled)


if __name__ == "__main__":
    end_with_parent()  # a sweep's job does not outlive the sweep, a run's process not the run
    prepare()
    try:
        check_command_line(sys.argv[1:], Path(__file__).resolve().parent / "conf")
        train()  # pyright: ignore[reportCallIssue]
    except UserError as error:
        stop(error)
    except KeyboardInterrupt:
        print("stopped; the same command continues after the last checkpoint", file=sys.stderr)
        sys.exit(130)
