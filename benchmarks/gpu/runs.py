"""Whole runs through run.py: 12 steps with 3 evaluations of each mode, their losses beside eager float32's."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from benchmarks.gpu.common import Setup, emit
from msil.data.shapes import write_shapes
from msil.runs import read_result

ROOT = Path(__file__).resolve().parents[2]
SIDE_BY_SIDE = 12
BASE = (
    "schedule=smoke", "schedule.max_steps=null", "schedule.epochs=3", "schedule.eval_images=16", "data.num_train=32",
    "data.num_val=16", "data.batch_size=8", "data.eval_batch_size=8", "model.head.num_convs=1", "schedule.lr=0.0005",
    "trainer.progress_bar=false",
)  # fmt: skip
BF16 = "trainer.precision=bf16-mixed"
EAGER = "eager"
COMPILED = {
    "compile=default": ("trainer.compile=default",),
    "compile=reduce-overhead": ("trainer.compile=reduce-overhead",),
    "bf16, compile=default": (BF16, "trainer.compile=default"),
}
MODES = {
    EAGER: (),
    **COMPILED,
    "bf16": (BF16,),
    "fp16": ("trainer.precision=16-mixed",),
    "device_transforms": ("data.device_transforms=true", "data.workers=2"),
    "accumulate": ("trainer.accumulate=2",),
    "ddp of one": ("trainer=ddp", "trainer.devices=1"),
    "ema": ("schedule.ema=0.9",),
}
# Of a rehearsal.
ON_A_CPU = (EAGER, "ddp of one")
SMALL = ("trainer.accelerator=cpu", "model.channels=64", "data.min_size=64", "data.max_size=64")
FAR = {"bf16": 0.15, "fp16": 0.15, "bf16, compile=default": 0.15, "ema": 0.1}  # losses from eager ones; else 0.05
TIMM = "fcos of timm"
MODELS = {name: (f"model/head={name}",) for name in ("fcos", "vfnet", "retinanet", "atss", "gfl", "tood")}
MODELS[TIMM] = ("model/backbone=timm", "model.backbone.name=convnext_atto")


def runs(setup: Setup) -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        Runs(setup, Path(name)).all()


class Runs:
    def __init__(self, setup: Setup, folder: Path) -> None:
        self.setup, self.folder = setup, folder
        self.lock, self.curves = threading.Lock(), {}
        write_shapes(folder / "shapes", num_train=32, num_val=16, image_size=128, seed=0)

    def all(self) -> None:
        modes = MODES if self.setup.on_gpu else {mode: MODES[mode] for mode in ON_A_CPU}
        jobs = [(model, mode) for mode in modes for model in ("fcos", "vfnet")]
        few = (EAGER, "bf16") if self.setup.on_gpu else ("bf16",)
        jobs += [(model, mode) for model in list(MODELS)[2:] for mode in few]
        with ThreadPoolExecutor(SIDE_BY_SIDE if self.setup.on_gpu else 1) as pool:
            futures: list[Future[None]] = [pool.submit(self.trained, *job) for job in jobs]
            futures[0].result()
            futures += [pool.submit(self.said, *job) for job in self.with_weights().items()]
        for future in futures:
            future.result()

    def words(self, name: str, *more: str) -> list[str]:
        device = () if self.setup.on_gpu else SMALL
        places = [f"runs_dir={self.folder}", f"data.root={self.folder}/shapes", f"run_name={name}"]
        return [sys.executable, "run.py", *BASE, *device, *places, *more]

    def trained(self, model: str, mode: str) -> None:
        name = f"{model}-{mode}".translate(str.maketrans(" ,=", "___"))
        began = time.monotonic()
        code, text = self.ended(self.words(name, *MODELS[model], *MODES[mode]))
        result, path = read_result(self.folder / name), self.folder / name / "metrics.csv"
        curve = []
        if path.exists():
            with path.open(newline="") as file:
                curve = [float(row["loss"]) for row in csv.DictReader(file) if row.get("loss")]
        right = code == 0 and result is not None and len(curve) == 12
        warned = [line for line in text.splitlines() if "warn" in line.lower()][-3:]
        found = {"losses": [round(loss, 3) for loss in curve], "said": warned if right else text[-900:]}
        if result is not None:
            found |= {"img/s": result["images_per_second"], "AP": result["metrics"].get("AP")}
        emit(right, check=f"{model} {mode}", detail=found, s=round(time.monotonic() - began, 1))
        with self.lock:
            self.curves[model, mode] = curve
            pairs = [(model, other) for other in MODES] if mode == EAGER else [(model, mode)]
        for pair in pairs:
            self.compared(*pair)

    def compared(self, model: str, mode: str) -> None:
        """Once both are there. The last four losses lie behind two evaluations."""
        with self.lock:
            curve, eager = (self.curves.get((model, one)) for one in (mode, EAGER))
        if mode != EAGER and curve and eager and len(curve) == len(eager):
            far = [abs(mine / other - 1) for mine, other in zip(curve, eager, strict=True)]
            said = f"12 steps to {max(far):.1%}, the first to {far[0]:.2%}, the last four to {max(far[-4:]):.1%}"
            emit(max(far) < FAR.get(mode, 0.05), check=f"{model}: losses of {mode} beside eager's", detail=said, s=0)

    def with_weights(self) -> dict[str, list[str]]:
        """What uses the weights of the first run."""
        weights = self.folder / "fcos-eager" / "checkpoints" / "last.ckpt"
        test = ("mode=test", f"model.weights={weights}", *MODELS["fcos"])
        image = next(iter(sorted((self.folder / "shapes").rglob("*.png"))), self.folder / "no-image")
        predict = [sys.executable, "-m", "msil.cli", "predict", "--checkpoint", str(weights), str(image)]
        found = {
            "mode=test": self.words("tested", *test),
            "mode=test, views": self.words("views", *test, "model.test_scales=[96,128]", "model.test_flip=true"),
            "msil predict": [*predict, "--out", str(self.folder / "drawn")],
        }
        if self.setup.on_gpu:
            found["mode=test, compiled, bf16"] = self.words("compiled", *test, *MODES["bf16, compile=default"])
        return found

    def said(self, name: str, words: list[str]) -> None:
        began = time.monotonic()
        code, text = self.ended(words)
        emit(code == 0, check=name, detail=text[-200 if code == 0 else -900 :], s=round(time.monotonic() - began, 1))

    def ended(self, words: list[str]) -> tuple[int, str]:
        """Exit code and what was printed, also into the log."""
        env = {**os.environ, "PYTHONWARNINGS": "default"}
        done = subprocess.run(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(" ".join(words[2:]), done.stdout, sep="\n", flush=True)
        return done.returncode, done.stdout
