"""`python run.py` when an image is truncated, or a loader worker killed, in the middle of a training."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from msil.data.shapes import write_shapes
from msil.runs import read_result

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "data=coco", "data.train_split=train", "data.val_split=val", "data.min_size=64", "data.max_size=64",
    "data.batch_size=8", "data.eval_batch_size=4", "model.channels=16", "model.head.num_convs=1",
    "model.head.norm_groups=4", "model.msil.reduction=4", "schedule.eval_every=1000", "trainer.accelerator=cpu",
    "run_name=mine",
)  # fmt: skip


@pytest.fixture
def root(tmp_path: Path, shapes: Path) -> Path:
    return Path(shutil.copytree(shapes, tmp_path / "data"))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("bad") / "shapes", num_train=16, num_val=8, image_size=64, seed=0)


@contextlib.contextmanager
def training(tmp_path: Path, root: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A run that has trained for at least an epoch; what is left of it is killed at the end."""
    words = [sys.executable, "run.py", *TINY, f"runs_dir={tmp_path / 'runs'}", f"data.root={root}", *arguments]
    process = subprocess.Popen(
        words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        checkpoint = tmp_path / "runs" / "mine" / "checkpoints" / "last.ckpt"
        wait(lambda: checkpoint.exists() or process.poll() is not None)
        assert process.poll() is None, process.communicate()
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def truncated(path: Path) -> Path:
    """In one step, so that no reader meets half of it."""
    new = path.with_suffix(".new")
    new.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    new.replace(path)
    return path


def session(pid: int) -> list[int]:
    """The processes of that session that still live."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, sid = stat.read_text().rpartition(")")[2].split()[:4]
            if int(sid) == pid and state != "Z":
                found.append(int(stat.parent.name))
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_truncated_during_training_ends_it_by_name(tmp_path: Path, root: Path, workers: int) -> None:
    with training(tmp_path, root, "schedule.epochs=5000", f"data.workers={workers}") as run:
        image = truncated(sorted((root / "train").iterdir())[3])
        _, err = run.communicate(timeout=120)
        assert run.returncode == 2, err
        assert err.startswith(f"error: image file {image} is truncated, damaged or of an unknown kind")
        assert err.count("\n") == 1
        assert session(run.pid) == []
    assert read_result(tmp_path / "runs" / "mine") is None


def test_a_killed_worker_ends_the_run_in_one_sentence(tmp_path: Path, root: Path) -> None:
    with training(tmp_path, root, "schedule.epochs=5000", "data.workers=2") as run:
        workers = [pid for pid in session(run.pid) if Path(f"/proc/{pid}/comm").read_text().strip() == "pt_data_worker"]
        os.kill(workers[0], signal.SIGKILL)
        _, err = run.communicate(timeout=120)
        assert run.returncode == 2, err
        (line,) = err.splitlines()
        assert line.startswith(f"error: loader worker process {workers[0]} was killed by a signal (Killed)")
        assert "lower data.workers or data.batch_size; the same command continues after the last checkpoint." in line
        assert session(run.pid) == []
