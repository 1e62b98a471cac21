"""One run on several devices of this machine: a process for each, which end together.

Lightning would start the others from rank 0, and nothing would then watch rank 0. Tried instead: elastic_launch of
torch.distributed. Its workers outlive a kill -9 of the agent (they inherit no pipe), a signal to the agent loses their
exit code (75), and the first failure, by whole seconds, may name the rank that only lost its peer.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from msil.launch.lifeline import PARENT_PIPE, lifeline

POLL_SECONDS = 0.1
TAIL_LINES = 8
FORWARDED = (signal.SIGTERM, signal.SIGUSR1)
PREEMPTED = 75
REFUSED = 2
EXPLAINED = (REFUSED, 70, 73, PREEMPTED)  # exit codes of processes that have printed the reason
# For the others to end by themselves. A preempted run saves its checkpoint meanwhile.
GRACE_SECONDS, PREEMPTED_GRACE_SECONDS = 10.0, 60.0


@dataclass(frozen=True)
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    log: Path  # rank 0 has none: it writes to the terminal

    @property
    def code(self) -> int:
        return self.process.poll() or 0


def started_from_outside(environment: Mapping[str, str]) -> bool:
    """Whether torchrun, srun or this module has started this process as one of several."""
    return "LOCAL_RANK" in environment or int(environment.get("SLURM_NTASKS", "1")) > 1


def count_devices(devices: int | str, *, cpu: bool) -> int:
    """How many processes trainer.devices asks for on this machine; `auto` and -1: one a GPU, or one on the CPU."""
    if str(devices) not in ("auto", "-1"):
        return devices if isinstance(devices, int) else len([index for index in devices.split(",") if index.strip()])
    if cpu:
        return 1
    import torch  # late: only to count the GPUs

    return max(1, torch.cuda.device_count())


def program() -> list[str]:
    """The words of this command before its settings, to start it again as `python run.py` or `msil train`."""
    script = Path(sys.argv[0]).resolve()
    words = {"msil": [str(script), "train"], "cli.py": ["-m", "msil.cli", "train"]}
    return [sys.executable, *words.get(script.name, [str(script)])]


def run_ranks(command: Sequence[str], count: int, run_dir: Path) -> int:
    """Run `command` as `count` processes; returns the run's exit code once all of them have ended.

    Each has its number in LOCAL_RANK. Rank 0 has this process's terminal, the others write to run_dir/rank_<r>.log,
    which stays if the run fails but was not refused. SIGTERM and SIGUSR1 are passed on to all. When one ends with an
    error the others have a few seconds and are then killed, and a sentence names it, unless it has printed the reason
    itself.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    forwarded: list[int] = []

    def forward(number: int, _frame: object) -> None:
        forwarded.append(number)
        for rank in ranks:
            rank.process.send_signal(number)  # nothing, if it has ended

    with lifeline() as pipe:
        environment = {"MASTER_PORT": str(_free_port()), **os.environ, PARENT_PIPE: str(pipe)}
        ranks = [_start(command, number, environment, pipe, run_dir) for number in range(count)]
        before = {number: signal.signal(number, forward) for number in FORWARDED}
        try:
            failed = _failed(ranks)
        except KeyboardInterrupt:  # Ctrl-C in the terminal has reached all of them
            _failed(ranks, time.monotonic() + GRACE_SECONDS)
            return 130
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            for rank in ranks:
                rank.process.kill()
                rank.process.wait()
    # One with an explained code, else one killed by a signal: the others may have failed for lack of their peer.
    first = min(failed, key=lambda rank: (rank.code not in EXPLAINED, rank.code > 0), default=None)
    refused = first is not None and first.number == 0 and first.code == REFUSED
    if first is None or first.code == PREEMPTED or refused:
        for rank in ranks[1:]:
            rank.log.unlink(missing_ok=True)
    if first is None:
        return 0
    if -first.code in forwarded:  # before it could handle signals
        print("error: stopped by a signal at the start; run again to resume", file=sys.stderr)
        return PREEMPTED
    code = first.code if first.code in EXPLAINED else 1
    if first.number != 0 or code == 1:
        print(
            f"error: process {first.number} of this run failed ({ending(first.code)}), so the others were stopped; the"
            " same command continues after the last checkpoint.",
            file=sys.stderr,
        )
    if first.number != 0:
        print("\n      | ".join([f"      log: {first.log}", *tail(first.log)]), file=sys.stderr)
    return code


def ending(exit_code: int) -> str:
    """An exit code as subprocess gives it, in words."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    memory = ", usually because memory ran out: lower data.batch_size or data.workers"
    return f"{signal.strsignal(-exit_code)}, signal {-exit_code}" + (memory if exit_code == -signal.SIGKILL else "")


def tail(path: Path, start: int = 0) -> list[str]:
    """The last lines that are not blank, from byte `start` on; of a progress bar only its last state."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - 65536))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:  # removed
        return []
    shown = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]
    return [line for line in shown if line.strip()][-TAIL_LINES:]


def _start(command: Sequence[str], number: int, environment: Mapping[str, str], pipe: int, run_dir: Path) -> _Rank:
    log = run_dir / f"rank_{number}.log"
    own = {**environment, "LOCAL_RANK": str(number)}
    with nullcontext() if number == 0 else log.open("wb") as file:
        process = subprocess.Popen(
            command, env=own, pass_fds=(pipe,), stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
    return _Rank(number, process, log)


def _failed(ranks: Sequence[_Rank], deadline: float = math.inf) -> list[_Rank]:
    """Those that ended with an error by themselves, once all have ended or the grace after the first error is over."""
    while any(rank.process.poll() is None for rank in ranks) and time.monotonic() < deadline:
        codes = [rank.code for rank in ranks if rank.code != 0]
        if codes and deadline == math.inf:  # the others may hang in waiting for it
            deadline = time.monotonic() + (PREEMPTED_GRACE_SECONDS if PREEMPTED in codes else GRACE_SECONDS)
        time.sleep(POLL_SECONDS)
    return [rank for rank in ranks if rank.code != 0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
