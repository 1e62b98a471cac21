"""`python run.py` and `msil train`: one command to one run, or by Hydra's sweeper to many."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import resource
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from msil.check import check_launcher, checked
from msil.command_line import inherited, normalised
from msil.compose import CONF, composed_by_hydra, config_folders, register
from msil.config import Config
from msil.errors import ConfigError, RunError, UserError, exit_code_of, plain_output
from msil.explain import explain, parse, refuse_unknown
from msil.interruption import Interruption, Preempted
from msil.launch.lifeline import end_with_parent
from msil.launch.processes import count_devices, program, run_ranks, started_from_outside
from msil.lock import locked
from msil.runs import earlier_result, is_finished, read_result, remove_if_empty
from msil.untrusted import refuse_code

# Hydra's own folders, which runs do not use.
NOT_OURS = ("hydra.run.", "hydra.sweep.", "hydra.output_subdir", "hydra.job.chdir")


def main() -> None:
    """Runs the command of sys.argv; exits with the code of what went wrong (docs/reliability.md)."""
    end_with_parent()  # a sweep's job does not outlive the sweep, a run's process not the run
    prepare()

    def typed() -> int:
        sys.argv[1:] = normalised(sys.argv[1:])
        command(sys.argv[1:])
        return 0

    if code := exit_code_of(typed, stopped="stopped; the same command continues after the last checkpoint"):
        sys.exit(code)


def prepare() -> None:
    # Threads that spin while they wait cost three times the CPU seconds as soon as anything else runs on the machine.
    # Must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra raises; its errors are reworded below
    plain_output()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # shells often allow 1024, and workers need some each
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard != resource.RLIM_INFINITY else soft, hard))
    # conf/hydra/launcher gives values to the settings of the plugin of the same name, on purpose.
    warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")
    register()


def command(words: Sequence[str]) -> dict[str, Any] | None:
    """Raises UserError or RunError. Returns the result of a single run."""
    flags = get_args_parser().parse_args(list(words))
    if flags.help or flags.hydra_help or flags.info or flags.shell_completion:
        hydra_entry()  # pyright: ignore[reportCallIssue]
        return None
    if flags.experimental_rerun:
        raise ConfigError("--experimental-rerun reads a pickle, which can run code: give the settings themselves.")
    typed = [parse(word) for word in flags.overrides]
    if idle := [one.key_or_group for one in typed if one.key_or_group.startswith(NOT_OURS)]:
        raise ConfigError(f"{idle[0]} has no effect: a run's files are in runs_dir/run_name; set those.")
    refuse_unknown(typed, config_folders(flags))
    taken = inherited(typed)
    overrides = [*map(parse, taken), *typed]
    composed = composed_by_hydra(flags, overrides)
    if flags.multirun or composed.hydra.mode == RunMode.MULTIRUN:
        sweep(flags, typed, composed)
        return None
    check_single(typed)
    config = checked(composed, [override.key_or_group for override in typed])
    if flags.cfg:
        at = len(sys.argv) - len(typed)
        sys.argv[at:at] = taken
        hydra_entry()  # pyright: ignore[reportCallIssue]
        return None
    return run(config)


def check_single(overrides: Sequence[Override]) -> None:
    for override in overrides:
        if override.key_or_group.replace("/", ".").startswith(("hydra.launcher", "hydra.sweeper")):
            raise ConfigError(f"{override.input_line} is for a sweep: add -m, or leave it out for a single run.")
        if override.is_sweep_override() and not override.is_hydra_override():
            raise ConfigError(
                f"{override.input_line} names several values: add -m to run one job for each, "
                "or write [a,b] if one list is meant."
            )


def sweep(flags: argparse.Namespace, overrides: Sequence[Override], composed: DictConfig) -> None:
    """Hydra's sweeper makes the jobs; the launcher checks all of them before it starts the first."""
    if flags.cfg:
        raise ConfigError("--cfg shows the settings of one run: leave out -m and what it sweeps.")
    refuse_code(composed)
    params = OmegaConf.to_container(composed.hydra.sweeper.get("params") or OmegaConf.create(), resolve=True)
    assert isinstance(params, dict)
    swept = [*overrides, *(parse(f"{key}={value}") for key, value in params.items())]
    for override in swept:
        several = override.is_sweep_override() or isinstance(override.value(), list)
        if several and override.key_or_group == "experiment":
            raise ConfigError(
                f"{override.input_line} would lose the sweeps of both files: run one experiment after the other, "
                "in a command each."
            )
    launcher = OmegaConf.to_container(composed.hydra.launcher, resolve=True)
    check_launcher(cast(dict[str, Any], launcher), composed.trainer.devices)
    try:
        hydra_entry()  # pyright: ignore[reportCallIssue]
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise explain(error, swept, config_folders(flags)) from error


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def hydra_entry(composed: DictConfig) -> float | None:
    """Hydra's entry: --help, --cfg and sweeps end before it is called; in a worker of submitit it is the job."""
    prepare()
    overrides = list(HydraConfig.get().overrides.task)
    sys.argv = ["run.py", *overrides, "hydra.mode=RUN"]  # for result.json, and for the run's processes
    try:
        return run(checked(composed))["metrics"].get("AP")
    except Preempted as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)  # it must not count as over
    except UserError as error:
        raise RunError(str(error)) from error  # of one job: the command ends with 1


def run(config: Config) -> dict[str, Any]:
    """One run, on one device or on several; prints its numbers and returns what result.json holds."""
    interruption = Interruption()
    with interruption.watching():  # from here on, so that a signal during start-up stops the run at its first batch
        devices = 1
        if not started_from_outside(os.environ):
            devices = count_devices(config.trainer.devices, cpu=config.trainer.accelerator == "cpu")
        if devices > 1:
            return on_devices(config, devices)
        # Late: they take seconds, in which collecting garbage among a million objects that stay would be a quarter.
        gc.disable()
        from lightning.pytorch.utilities import rank_zero_only

        from msil.reporting.sweep_table import result_line
        from msil.training.experiment import run as run_here

        gc.freeze()
        gc.enable()
        result = run_here(config, interruption)
    if rank_zero_only.rank == 0:
        if result.get("skipped"):
            print("finished before with these very settings, so nothing was run; remove the folder to run it again")
            if not is_finished(Path(config.runs_dir) / config.run_name, result["config_hash"]):
                file = earlier_result(result["epochs"])
                print(f"the run has gone on since: these are the numbers in {file}, its other files are newer")
        print(result_line(result))
    return result


def on_devices(config: Config, devices: int) -> dict[str, Any]:
    """The same command as one process a device."""
    run_dir = Path(config.runs_dir) / config.run_name
    with locked(run_dir):  # or another run's logs would be overwritten before its folder is found in use
        pass
    code = run_ranks([*program(), *sys.argv[1:]], devices, run_dir)
    if code != 0:
        with contextlib.suppress(UserError), locked(run_dir):
            remove_if_empty(run_dir)
        sys.exit(code)
    result = read_result(run_dir)
    assert result is not None
    return result
