"""The jobs of a sweep: their folders, and the command, environment and GPUs of each."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msil.config import Config, LoggerName, config_hash, plain
from msil.errors import ConfigError

# What Lightning and torchrun set; a job that inherited it would join a process group that no longer exists.
LEAKED = (
    "LOCAL_RANK", "NODE_RANK", "RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "PL_GLOBAL_SEED", "PL_SEED_WORKERS",
)  # fmt: skip
# A job is a plain single run: these settings of Hydra are not passed on to it.
SWEEP_ONLY = re.compile(r"[+~]*hydra[./](mode|run|sweep|sweeper|launcher)\b")


@dataclass(frozen=True)
class Job:
    number: int  # from 1
    overrides: tuple[str, ...]  # as a user would type them
    config_hash: str
    run_dir: Path
    values: Mapping[str, Any]  # its resolved settings
    label: str  # the settings in which the jobs differ, e.g. align=false apply=cls


@dataclass(frozen=True)
class Sweep:
    name: str  # <table>-<8 hex of the jobs' hashes>, so the same sweep finds its folder again
    folder: Path
    jobs: tuple[Job, ...]


def plan(configs: Sequence[Config], overrides: Sequence[Sequence[str]]) -> Sweep:
    """The sweep of these jobs.

    Raises ConfigError for two jobs with one folder, and where there is no job at all.
    """
    if not configs:
        raise ConfigError("the sweep has no job: what it lists is empty.")
    settings = [plain(config) for config in configs]
    hashes = [config_hash(values) for values in settings]
    folders = [Path(config.runs_dir) / config.run_name for config in configs]
    labels = [label or folder.name for label, folder in zip(labels_of(overrides), folders, strict=True)]
    for number, folder in enumerate(folders):
        first = folders.index(folder)
        if first != number:
            raise ConfigError(
                f"jobs {first + 1} ({labels[first]}) and {number + 1} ({labels[number]}) would both write to {folder}: "
                "drop the repeated value, or the run_name that they share."
            )
    tables = {config.table for config in configs}
    table = tables.pop() if len(tables) == 1 else None
    name = f"{table or 'sweep'}-{hashlib.sha256(' '.join(hashes).encode()).hexdigest()[:8]}"
    jobs = []
    for number, (config, job_overrides) in enumerate(zip(configs, overrides, strict=True)):
        grouped = config.logger.name == LoggerName.wandb and config.logger.group is None
        typed = (*job_overrides, f"logger.group={name}") if grouped else tuple(job_overrides)
        jobs.append(Job(number + 1, typed, hashes[number], folders[number], settings[number], labels[number]))
    return Sweep(name, Path(configs[0].runs_dir) / "sweeps" / name, tuple(jobs))


def labels_of(overrides: Sequence[Sequence[str]]) -> list[str]:
    """For each job the overrides in which the jobs differ, by the last part of their names: `align=true apply=cls`."""
    parsed = [_pairs(job) for job in overrides]
    varying = varied(overrides)
    short = {key: key.replace("/", ".").rpartition(".")[2] for key in varying}
    clash = {tail for tail in short.values() if list(short.values()).count(tail) > 1}
    names = {key: key if short[key] in clash else short[key] for key in varying}
    typed = {"True": "true", "False": "false", "None": "null"}  # Hydra's sweeper gives Python's words
    return [
        " ".join(f"{names[key]}={typed.get(job[key], job[key])}" for key in varying if key in job) for job in parsed
    ]


def varied(overrides: Sequence[Sequence[str]]) -> list[str]:
    """The settings and groups that differ between the jobs, as typed, in the order of the command."""
    parsed = [_pairs(job) for job in overrides]
    keys = list(dict.fromkeys(key for job in parsed for key in job))
    return [key for key in keys if len({job.get(key) for job in parsed}) > 1]


def _pairs(overrides: Sequence[str]) -> dict[str, str]:
    return {key: value for key, _, value in (line.partition("=") for line in overrides)}


def job_arguments(job: Job, hydra_overrides: Sequence[str]) -> list[str]:
    """The words after `run.py` that run this job alone."""
    kept = [line for line in hydra_overrides if not SWEEP_ONLY.match(line)]
    return [*job.overrides, *kept, "hydra.mode=RUN"]


def job_environment(environment: Mapping[str, str], gpus: str | None, threads: int | None) -> dict[str, str]:
    """`environment` without `LEAKED`; with `gpus` (CUDA_VISIBLE_DEVICES) and `threads`, where given."""
    kept = {name: value for name, value in environment.items() if name not in LEAKED}
    kept["PYTHONUNBUFFERED"] = "1"  # so that console.log can be followed
    if gpus is not None:
        kept["CUDA_VISIBLE_DEVICES"] = gpus
    if threads is not None:
        kept.setdefault("OMP_NUM_THREADS", str(threads))
    return kept


def gpu_shares(gpus: Sequence[str], n_jobs: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES for each of `n_jobs` jobs at a time: equal shares, one GPU in turn if there are too few.

    None (leave it as it is) for one job at a time and on a machine without GPUs.
    """
    if n_jobs == 1 or not gpus:
        return [None] * n_jobs
    share = max(1, len(gpus) // n_jobs)
    starts = [slot * share % len(gpus) for slot in range(n_jobs)]
    return [",".join(gpus[start : start + share]) for start in starts]
