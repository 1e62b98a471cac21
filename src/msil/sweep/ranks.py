"""One run on several devices of this machine: a process for each of them, which end together.

Lightning would start the others from the first. Then nothing watches the first: where it dies, they wait on, and how
one of the others ended is lost.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from msil.config import TrainerConfig
from msil.sweep.orphans import PARENT_PIPE, lifeline
from msil.sweep.processes import tail

POLL_SECONDS = 0.1
FORWARDED = (signal.SIGTERM, signal.SIGUSR1)
TOLD = (2, 70, 73, 75)  # exit codes that a process has explained in a sentence
# How long the others may take to end by themselves. A preempted run saves its checkpoint meanwhile.
GRACE_SECONDS, PREEMPTED, PREEMPTED_GRACE_SECONDS = 10.0, 75, 60.0


@dataclass
class Rank:
    number: int
    process: subprocess.Popen[bytes]
    log: Path | None  # of all but rank 0, which writes to the terminal
    code: int | None = None
    stopped: bool = False  # by this module, for another's sake


def started_from_outside(environment: Mapping[str, str]) -> bool:
    """Whether torchrun, srun or this module has started this process as one of several."""
    return "LOCAL_RANK" in environment or int(environment.get("SLURM_NTASKS", "1")) > 1


def devices_here(trainer: TrainerConfig) -> int:
    """How many processes a run takes on this machine; 1: none but this one."""
    if isinstance(trainer.devices, int) and trainer.devices > 0:
        return trainer.devices
    if trainer.devices not in (-1, "-1", "auto"):
        return len([index for index in str(trainer.devices).split(",") if index.strip()])
    import torch  # late: only to count the GPUs

    return 1 if trainer.accelerator == "cpu" else max(1, torch.cuda.device_count())


def run_ranks(command: Sequence[str], count: int, run_dir: Path) -> int:
    """Run `command` as `count` processes; returns the run's exit code once all of them have ended.

    Each finds its number in LOCAL_RANK. Rank 0 has this process's terminal, the others write to run_dir/rank_<r>.log,
    which stays if the run fails. SIGTERM and SIGUSR1 are passed on to all. When one ends with an error the others have
    a few seconds and are then killed, and a sentence says who it was, unless it has said so itself.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with lifeline() as pipe:
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "NODE_RANK": "0",
            **os.environ,
            PARENT_PIPE: str(pipe),
        }
        ranks = [_start(command, number, environment, pipe, run_dir) for number in range(count)]
        forwarded: list[int] = []
        before = {number: signal.signal(number, _forward_to(ranks, forwarded)) for number in FORWARDED}
        try:
            _wait(ranks)
        except KeyboardInterrupt:  # Ctrl-C in the terminal has reached all of them
            _end(ranks, GRACE_SECONDS)
            return 130
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            for rank in ranks:
                if rank.process.poll() is None:
                    rank.process.kill()
                    rank.process.wait()
    guilty = _guilty(ranks)
    if guilty is None or guilty.code == PREEMPTED:
        _remove_logs(ranks)
    if guilty is None:
        return 0
    if guilty.code in [-number for number in forwarded]:  # it was only just starting
        print("error: stopped by a signal at the start; run again to resume", file=sys.stderr)
        return PREEMPTED
    code = guilty.code if guilty.code in TOLD else 1
    if guilty.number != 0 or code not in TOLD:  # else it has told its reason in this terminal
        print(_told(guilty), file=sys.stderr)
    return code


def _start(command: Sequence[str], number: int, environment: Mapping[str, str], pipe: int, run_dir: Path) -> Rank:
    log = None if number == 0 else run_dir / f"rank_{number}.log"
    own = {**environment, "LOCAL_RANK": str(number)}
    if log is None:
        return Rank(number, subprocess.Popen(command, env=own, pass_fds=(pipe,)), None)
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=own, pass_fds=(pipe,), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
    return Rank(number, process, log)


def _wait(ranks: Sequence[Rank]) -> None:
    """Until all have ended; soon after one has ended with an error."""
    while _running(ranks):
        wrong = next((rank for rank in ranks if rank.code), None)
        if wrong is not None:
            _end(ranks, PREEMPTED_GRACE_SECONDS if wrong.code == PREEMPTED else GRACE_SECONDS)
        time.sleep(POLL_SECONDS)


def _end(ranks: Sequence[Rank], grace_seconds: float) -> None:
    """Wait for those that are left, then kill them: they may hang in waiting for one that is dead."""
    deadline = time.monotonic() + grace_seconds
    while _running(ranks) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    for rank in _running(ranks):
        rank.stopped = True
        rank.process.kill()
        rank.code = rank.process.wait()


def _running(ranks: Sequence[Rank]) -> list[Rank]:
    for rank in ranks:
        rank.code = rank.process.poll()
    return [rank for rank in ranks if rank.code is None]


def _guilty(ranks: Sequence[Rank]) -> Rank | None:
    """Who knows best why the run failed: one with a code that says what it was, else one that a signal killed, else
    any other; None if all ended well."""
    failed = [rank for rank in ranks if rank.code and not rank.stopped]
    return min(failed, key=lambda rank: (rank.code not in TOLD, (rank.code or 0) > 0), default=None)


def _told(rank: Rank) -> str:
    assert rank.code is not None
    how = f"ended with exit code {rank.code}"
    if rank.code < 0:
        name = signal.Signals(-rank.code).name
        how = f"was killed by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
    lines = [] if rank.log is None else tail(rank.log)
    said = [f"      | {line}" for line in lines]
    where = "" if rank.log is None else f" Its log, {rank.log}, ends:" if said else f" Its log is {rank.log}."
    sentence = (
        f"error: process {rank.number} of this run {how}, so the others were stopped; the same command continues after"
        f" the last checkpoint.{where}"
    )
    return "\n".join([sentence, *said])


def _remove_logs(ranks: Sequence[Rank]) -> None:
    for rank in ranks:
        if rank.log is not None:
            rank.log.unlink(missing_ok=True)


def _forward_to(ranks: Sequence[Rank], forwarded: list[int]):
    def forward(number: int, _frame: FrameType | None) -> None:
        forwarded.append(number)
        for rank in ranks:
            if rank.process.poll() is None:
                rank.process.send_signal(number)

    return forward


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
