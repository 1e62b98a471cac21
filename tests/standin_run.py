"""A stand-in for run.py: the same settings, launcher and checks, but for those of the net; its jobs train nothing and
end as their seeds say.

1: an error; 4: waits for SIGTERM and a file `may_save`, saves, exits with 75; 11: a result, and a full disk by a file
`filler`; others: a complete result. With a file `mended` in the working folder all give a result.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import msil.check
import msil.main
from msil.config import Config, config_hash, plain
from msil.lock import locked
from msil.runs import REQUIRED_KEYS


def work(config: Config) -> None:
    run_dir = Path(config.runs_dir) / config.run_name
    mended = Path("mended").exists()
    with locked(run_dir):
        (run_dir / "started.json").write_text(json.dumps({"words": sys.argv[1:], "environment": dict(os.environ)}))
        print("the job's own words")
        if config.seed == 1 and not mended:
            raise FileNotFoundError("no such image")
        if config.seed == 4 and not mended:
            wait_for_a_signal(run_dir)
        values = plain(config)
        result = dict.fromkeys(REQUIRED_KEYS, 1) | {
            "run_name": config.run_name, "status": "finished", "config_hash": config_hash(values), "config": values,
            "metrics": {"AP": 0.412, "AP50": 0.6, "AP75": None, "APs": 0.1, "APm": 0.2, "APl": 0.3},
            "flops_image_size": [128, 128], "classes": ["circle"], "versions": {}, "machine": {},
        }  # fmt: skip
        (run_dir / "result.json").write_text(json.dumps(result))
        if config.seed == 11 and not mended:
            with Path("filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
                while True:
                    filler.write(bytes(4096))


def wait_for_a_signal(run_dir: Path) -> None:
    received: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    (run_dir / "waiting").write_text(str(os.getpid()))
    while not (received and Path("may_save").exists()):
        time.sleep(0.02)
    (run_dir / "saved").touch()
    sys.exit(75)


if __name__ == "__main__":
    msil.main.run = work
    msil.check._check_model = lambda model: None  # which imports torch, seconds a process
    msil.main.main()
