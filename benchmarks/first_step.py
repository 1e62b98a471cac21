"""`python run.py` with time stamps, up to the end of its first training step: what start_up.py starts.

    STARTED=$(date +%s.%N) python -m benchmarks.first_step runs_dir=/tmp/runs run_name=a

Prints {"stages": {what: seconds}, "cpu": seconds} as its last line. It imports nothing that run.py does not, in the
same order, and only the standard library before it: the stamps are put into msil.training.build when run.py's own
imports have come there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

BUILD = "msil.training.build"
ROOT = Path(__file__).resolve().parents[1]


class Stages:
    """Seconds between stamps, each called by what came before it; `begun` is a time as time.time() gives it."""

    def __init__(self, begun: float) -> None:
        self.last = begun
        self.seconds: dict[str, float] = {}

    def stamp(self, name: str) -> None:
        now = time.time()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now

    def around(self, function: Callable[..., Any], before: str, during: str) -> Callable[..., Any]:
        def stamped(*arguments: Any, **keywords: Any) -> Any:
            self.stamp(before)
            result = function(*arguments, **keywords)
            self.stamp(during)
            return result

        return stamped

    def into(self, build: ModuleType) -> None:
        """Stamps into the functions and the callback that msil.training.build calls."""
        stages = self

        class EndsFirstStep(build.Throughput):
            def on_train_batch_start(self, *arguments: Any) -> None:
                stages.stamp("making the trainer, first batch")
                super().on_train_batch_start(*arguments)

            def on_train_batch_end(self, *arguments: Any) -> None:
                stages.stamp("first step")
                print(json.dumps({"stages": stages.seconds, "cpu": time.process_time()}), flush=True)
                os._exit(0)  # nothing of what a run does at its end

        build.Throughput = EndsFirstStep  # pyright: ignore[reportAttributeAccessIssue]
        built, between = build.build, "making the trainer, first batch"

        def stamped_build(*arguments: Any) -> Any:
            self.stamp("imports of torch, lightning and the rest")
            return built(*arguments)

        build.build = stamped_build  # pyright: ignore[reportAttributeAccessIssue]
        for name, stage in (("training_data", "reading the data set"), ("detector_from_config", "building the net")):
            setattr(build, name, self.around(getattr(build, name), between, stage))


class AfterImport:
    """A finder that calls `then` with BUILD as soon as that module is loaded."""

    def __init__(self, then: Callable[[ModuleType], None]) -> None:
        self.then = then

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != BUILD:
            return None
        spec = PathFinder.find_spec(name, path, target)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def load_then(module: ModuleType) -> None:
            load(module)
            self.then(module)

        spec.loader.exec_module = load_then
        return spec


def main() -> None:
    stages = Stages(float(os.environ["STARTED"]))
    stages.stamp("Python")
    sys.meta_path.insert(0, AfterImport(stages.into))
    os.environ["HYDRA_MAIN_MODULE"] = "__main__"  # or Hydra looks for conf/ in a package, as run.py is imported here
    spec = importlib.util.spec_from_file_location("run", ROOT / "run.py")
    assert spec is not None and spec.loader is not None
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    stages.stamp("imports of run.py: Hydra, settings")
    run.prepare()
    run.check_command_line(sys.argv[1:], ROOT / "conf")
    stages.stamp("checking the command line")
    setattr(run, "one_run", stages.around(run.one_run, "Hydra's composing", ""))  # noqa: B010
    run.train()


if __name__ == "__main__":
    main()
