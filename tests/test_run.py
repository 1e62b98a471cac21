"""`python run.py` as its users meet it: exit codes, what is printed, signals, two processes, a sweep."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from msil.checkpoints.load import load_detector
from msil.data.readers.coco import CocoDataset
from msil.data.shapes import write_shapes
from msil.main import main
from msil.metrics.coco import CocoMetric
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


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes", num_train=16, num_val=8, image_size=64, seed=0)


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


def test_a_diverged_training_ends_with_70_and_says_what_to_change(ends: Any, tmp_path: Path, shapes: Path) -> None:
    wild = ("schedule.optimizer=sgd", "schedule.lr=1e9", "schedule.grad_clip=null", "schedule.warmup_steps=0")
    code, lines = ends(shapes, *SHAPES, *wild, "schedule.epochs=5")
    assert code == 70, lines
    (line,) = lines
    assert re.fullmatch(r"error: at step \d+ loss_\w+ is (nan|inf).* \(images .*\)\. .* Lower schedule\.lr.*", line)


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


def interrupted(tmp_path: Path, shapes: Path) -> subprocess.CompletedProcess[str]:
    """A run of many epochs that gets SIGINT some steps after its first checkpoint."""
    words = command(tmp_path, shapes, *SHAPES, "schedule.epochs=500", "schedule.eval_every=500", "run_name=mine")
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        # A shell that starts the tests in the background has them, and so the run, ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    checkpoint = tmp_path / "runs" / "mine" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(words, process.returncode, out, err)


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(tmp_path: Path, shapes: Path) -> None:
    done = interrupted(tmp_path, shapes)
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines() == ["stopped; the same command continues after the last checkpoint"]
    assert torch.load(tmp_path / "runs/mine/checkpoints/last.ckpt", weights_only=True)["global_step"] >= 2


# Two processes, and a sweep


@pytest.mark.slow
def test_two_processes_train_and_count_every_image_once(tmp_path: Path, shapes: Path) -> None:
    ddp = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "schedule.epochs=2", "schedule.eval_every=1")
    words = command(tmp_path, shapes, *SHAPES, *ddp)
    done = started(words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("files in ") == 1
    run_dir = only_run(tmp_path)
    result = read_result(run_dir)
    assert result is not None
    # 16 images in steps of 8 over both processes.
    expected = {"steps": 4, "epochs": 2, "val_images": 8, "train_images": 16}
    assert {name: result[name] for name in expected} == expected
    assert result["machine"]["processes"] == 2

    # The same checkpoint, evaluated here in one process: every image once, whatever process had it.
    detector, _ = load_detector(run_dir / "checkpoints" / "last.ckpt")
    dataset = CocoDataset(shapes, "val")
    metric = CocoMetric(dataset.annotations)
    for i in range(len(dataset)):
        metric.update(detector.predict([dataset[i][0]]), [dataset.image_id(i)])
    alone = {name: None if value != value else value for name, value in metric.compute_final().items()}
    assert result["metrics"] == pytest.approx(alone, abs=1e-6)
    again = started(words)
    assert again.returncode == 0
    assert result == read_result(run_dir)


@pytest.mark.slow
def test_wandb_without_an_account(tmp_path: Path, shapes: Path) -> None:
    kept = {name: value for name, value in environment().items() if not name.startswith("WANDB") and name != "NETRC"}
    (tmp_path / "home").mkdir()
    done = subprocess.run(
        command(tmp_path, shapes, *SHAPES, "schedule.epochs=1", "schedule.eval_every=1", "logger=wandb"),
        env={**kept, "HOME": str(tmp_path / "home")}, cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (line,) = [line for line in done.stdout.splitlines() if "wandb:" in line or "W&B" in line]
    assert line.startswith("W&B: no login was found, so this run is logged offline")
    (log,) = only_run(tmp_path).glob("wandb/offline-run-*/*.wandb")
    assert log.stat().st_size > 1000
    # One of the evaluation while training and one of the last.
    pictures = list(only_run(tmp_path).glob("wandb/offline-run-*/files/media/images/predictions*.png"))
    assert len(pictures) == 2
    assert all(picture.stat().st_size > 1000 for picture in pictures)
