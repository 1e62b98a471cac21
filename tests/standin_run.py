"""A stand-in for run.py: the same checks, settings and launcher, but its jobs end at once, in a way their seeds say.

seed 0, and any not listed: a complete result; 1: an error; 2: a segmentation fault; 3: exit code 0 without a result;
4: waits to be stopped, and saves then; 5: raises MemoryError under a real limit of memory; 6: is killed by SIGKILL, as
the system does when memory runs out; 7: sys.exit(3); 8: is preempted by a signal to itself alone; 11: ends
well and leaves a full disk, in a file `filler` of the working folder. A file `mended` in
the working folder makes all of them end well; seed 4 saves as soon as there is a file `may_save`.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import hydra
from msil.overrides import check_command_line, typed
from omegaconf import DictConfig

from msil.compose import register
from msil.config import Config, config_hash, plain
from msil.errors import UserError
from msil.lock import locked
from msil.runs import REQUIRED_KEYS
from msil.sweep.orphans import end_with_parent

CONF = Path(__file__).resolve().parents[1] / "conf"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def job(composed: DictConfig) -> None:
    config = typed(composed)
    run_dir = Path(config.runs_dir) / config.run_name
    with locked(run_dir):
        work(config, run_dir)


def work(config: Config, run_dir: Path) -> None:
    (run_dir / "environment.json").write_text(json.dumps(dict(os.environ)))
    (run_dir / "arguments.json").write_text(json.dumps(sys.argv[1:]))
    print("the job's own words")
    if not Path("mended").exists():
        go_wrong(config.seed, run_dir)
    values = plain(config)
    result = dict.fromkeys(REQUIRED_KEYS, 1) | {
        "run_name": config.run_name,
        "status": "finished",
        "config_hash": config_hash(values),
        "metrics": {"AP": 0.412, "AP50": 0.6, "AP75": None, "APs": 0.1, "APm": 0.2, "APl": 0.3},
        "flops_image_size": [128, 128],
        "classes": ["circle"],
        "versions": {},
        "machine": {},
        "total_seconds": 120.0,
        "config": values,
    }
    (run_dir / "result.json").write_text(json.dumps(result))
    if config.seed == 11 and not Path("mended").exists():
        with Path("filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(4096))


def go_wrong(seed: int, run_dir: Path) -> None:
    match seed:
        case 1:
            raise FileNotFoundError("no such image")
        case 2:
            os.kill(os.getpid(), signal.SIGSEGV)
        case 3:
            os._exit(0)
        case 4:
            wait_for_a_signal(run_dir)
        case 5:
            resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
            bytearray(2**32)
        case 6:
            os.kill(os.getpid(), signal.SIGKILL)
        case 7:
            sys.exit(3)
        case 8:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
            os.kill(os.getpid(), signal.SIGTERM)


def wait_for_a_signal(run_dir: Path) -> None:
    """As a training run: saves and exits with 75."""
    received: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    (run_dir / "metrics.csv").write_text("epoch,step,loss,AP\n0,4,1.2345,\n1,9,0.9876,\n1,9,,0.2104\n")
    (run_dir / "waiting").write_text(str(os.getpid()))
    while not (received and Path("may_save").exists()):
        time.sleep(0.02)
    (run_dir / "saved").touch()
    sys.exit(75)


if __name__ == "__main__":
    end_with_parent()
    register()
    try:
        check_command_line(sys.argv[1:], CONF)
    except UserError as error:
        sys.exit(f"error: {error}")
    job()
