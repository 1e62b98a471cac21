"""A stand-in for run.py: the same checks, settings and launcher, but its jobs end at once, in a way their seeds say.

seed 0, and any not listed: a complete result; 1: an error; 2: a segmentation fault; 3: exit code 0 without a result;
4: waits to be stopped.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import hydra
from omegaconf import DictConfig

from msil.config import config_hash, plain, register
from msil.errors import UserError
from msil.overrides import check_command_line, typed
from msil.reporting.results import REQUIRED_KEYS

CONF = Path(__file__).resolve().parents[1] / "conf"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def job(composed: DictConfig) -> None:
    config = typed(composed)
    run_dir = Path(config.runs_dir) / config.run_name
    (run_dir / "environment.json").write_text(json.dumps(dict(os.environ)))
    (run_dir / "arguments.json").write_text(json.dumps(sys.argv[1:]))
    print("the job's own words")
    match config.seed:
        case 1:
            sys.exit("error: no such image")
        case 2:
            os.kill(os.getpid(), 11)
        case 3:
            return
        case 4:
            time.sleep(60)
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
        "config": values,
    }
    (run_dir / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    register()
    try:
        check_command_line(sys.argv[1:], CONF)
    except UserError as error:
        sys.exit(f"error: {error}")
    job()
