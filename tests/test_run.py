"""`python run.py` as its users meet it: exit codes, what is printed, signals."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.launch.faults import until

from msil.main import main
from msil.runs import read_result

ROOT = Path(__file__).resolve().parents[1]
NET = (
    "model.channels=16", "model.head.num_convs=1", "model.head.norm_groups=4", "model.msil.reduction=4",
    "model.score_thresh=0.001", "data.batch_size=8", "data.eval_batch_size=4", "trainer.accelerator=cpu",
)  # fmt: skip
SHAPES = ("data.num_train=16", "data.num_val=8", "data.image_size=64")
# The same images as somebody's own data.
OWN = ("data=coco", "data.train_split=train", "data.val_split=val", "data.min_size=64", "data.max_size=64",
       "data.workers=0")  # fmt: skip


def command(tmp_path: Path, root: Path, *arguments: str) -> list[str]:
    return [sys.executable, "run.py", *NET, f"runs_dir={tmp_path / 'runs'}", f"data.root={root}", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def started(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)


def only_run(tmp_path: Path) -> Path:
    (run_dir,) = [path for path in (tmp_path / "runs").iterdir() if path.name != "sweeps"]
    return run_dir


SUMMARY = re.compile(
    r"AP [\d.]+  AP50 [\d.]+  AP75 [\d.]+  APs [\d.-]+  APm [\d.-]+  APl [\d.-]+\n"
    r"percent, on \d+ validation images of shapes\n"
    r"AP by class: circle [\d.-]+, square [\d.-]+, triangle [\d.-]+, cross [\d.-]+\n"
    r"[\d.]+ M parameters, [\d.]+ M FLOPs for one 64x64 image\n2 training steps in .*\nfiles in (.*)\n"
)


def test_smoke_trains_prints_its_summary_and_says_nothing_on_stderr(tmp_path: Path, shapes: Path) -> None:
    done = started(command(tmp_path, shapes, *SHAPES, "schedule=smoke"))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    summary = SUMMARY.search(done.stdout)
    assert summary is not None, done.stdout
    assert done.stdout.endswith(summary.group())
    run_dir = only_run(tmp_path)
    assert summary.group(1) == str(run_dir)
    result = read_result(run_dir)
    assert result is not None
    assert result["command"].startswith("python run.py model.channels=16")
    # Progress and scores, and no line of a library's.
    rest = done.stdout[: summary.start()].splitlines()
    assert rest
    assert [line.partition(" ")[0] for line in rest[:4]] == ["net", "data", "steps", "folder"]
    assert [line for line in rest[4:] if not line.startswith(("epoch ", "step "))] == []


# Exit codes, in this process: importing torch anew for each would take the most of the time.


@pytest.fixture
def ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Runs `python run.py ...` and returns its exit code and the lines of its stderr."""

    def run(root: Path, *arguments: str) -> tuple[Any, list[str]]:
        monkeypatch.setattr(sys, "argv", command(tmp_path, root, *arguments)[1:])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, capfd.readouterr().err.splitlines()

    return run


def test_missing_data_ends_with_2_and_names_the_place(ends: Any, tmp_path: Path) -> None:
    code, lines = ends(tmp_path / "nowhere", *OWN)
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert str(tmp_path / "nowhere") in lines[0]


def damaged_inside(path: Path) -> None:
    """Makes `path` a JPEG whose header and end are whole, so that only decoding can tell that it is damaged."""
    content = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").save(content, "JPEG")
    data = bytearray(content.getvalue())
    table = data.index(b"\xff\xc4") + 5  # the code lengths of the first Huffman table
    data[table : table + 16] = b"\xff" * 16
    path.write_bytes(data)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_decoded_ends_with_2_and_is_named(
    ends: Any, tmp_path: Path, shapes: Path, workers: int
) -> None:
    root = tmp_path / "own"
    shutil.copytree(shapes, root)
    image = sorted((root / "train").iterdir())[3]
    damaged_inside(image)
    code, lines = ends(root, *OWN, "schedule.epochs=2", f"data.workers={workers}")
    assert code == 2, lines
    (line,) = [line for line in lines if line]
    assert line.startswith(f"error: image file {image} is truncated, damaged")
    assert "Traceback" not in line


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="this machine has a GPU")
def test_a_required_gpu_that_is_missing_ends_with_2(ends: Any, tmp_path: Path, shapes: Path) -> None:
    code, lines = ends(shapes, *SHAPES, "trainer.accelerator=gpu", "trainer.require_gpu=true")
    assert code == 2, lines
    (line,) = lines
    assert line.startswith("error: trainer.require_gpu=true, and no GPU was found")


def test_a_png_with_a_flipped_byte_is_an_error_not_a_crash(tmp_path: Path, shapes: Path) -> None:
    """torchvision 0.29 ends the process with a segmentation fault on a PNG whose data are damaged."""
    path = tmp_path / "damaged.png"
    content = bytearray((shapes / "train" / "000001.png").read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    code = (
        "import sys; from pathlib import Path; from msil.data.images import read_image; read_image(Path(sys.argv[1]))"
    )
    done = started([sys.executable, "-c", code, str(path)])
    assert done.returncode == 1  # Python's own, of the exception that follows
    assert f"DataError: image file {path} is truncated, damaged or of an unknown kind" in done.stderr


# Signals


@contextlib.contextmanager
def training(tmp_path: Path, root: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A run of many epochs that has saved a checkpoint; what is left of it is killed at the end."""
    long = ("schedule.epochs=5000", "schedule.eval_every=5000", "run_name=mine")
    process = subprocess.Popen(
        command(tmp_path, root, *SHAPES, *long, *arguments), cwd=ROOT, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
        # A shell that starts the tests in the background has them, and so the run, ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        checkpoint = tmp_path / "runs" / "mine" / "checkpoints" / "last.ckpt"
        until(lambda: checkpoint.exists() or process.poll() is not None)
        assert process.poll() is None, process.communicate()
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def session(pid: int) -> list[int]:
    """The processes of that session that still live."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, sid = stat.read_text().rpartition(")")[2].split()[:4]
            if int(sid) == pid and state != "Z":
                found.append(int(stat.parent.name))
    return found


def test_a_killed_worker_ends_the_run_in_one_sentence(tmp_path: Path, shapes: Path) -> None:
    with training(tmp_path, shapes, "data.workers=2") as run:
        workers = [pid for pid in session(run.pid) if Path(f"/proc/{pid}/comm").read_text().strip() == "pt_data_worker"]
        os.kill(workers[0], signal.SIGKILL)
        _, err = run.communicate(timeout=120)
        assert run.returncode == 2, err
        (line,) = err.splitlines()
        assert line.startswith(f"error: loader worker process {workers[0]} was killed by a signal (Killed)")
        assert "lower data.workers or data.batch_size; the same command continues after the last checkpoint." in line
        assert session(run.pid) == []
    assert read_result(tmp_path / "runs" / "mine") is None


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(tmp_path: Path, shapes: Path) -> None:
    with training(tmp_path, shapes) as run:
        os.killpg(run.pid, signal.SIGINT)
        _, err = run.communicate(timeout=60)
    assert run.returncode == 130, err
    assert err.splitlines() == ["stopped; the same command continues after the last checkpoint"]
    assert torch.load(tmp_path / "runs/mine/checkpoints/last.ckpt", weights_only=True)["global_step"] >= 2
