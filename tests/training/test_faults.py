"""Losses and gradients that are not finite, too little memory, a folder that another run works in."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from msil.detection import Detector
from msil.lock import Locked, locked
from msil.runs import read_result
from msil.training.experiment import run
from msil.training.faults import CurrentStep, TrainingDiverged, explained
from msil.training.module import DetectionModule

from .cases import assert_same, folder, last, rows, tiny_config

ROOT = Path(__file__).resolve().parents[2]


def break_losses(monkeypatch: pytest.MonkeyPatch, batch: int, value: float) -> list[list[int]]:
    """Multiply loss_bbox by `value` in this batch (from 0); the image ids and weights of each."""
    real, seen = Detector.loss, []

    def loss(self: Detector, images: Any, targets: Any) -> Any:
        found = real(self, images, targets)
        if len(seen) == batch:
            found["loss_bbox"] = found["loss_bbox"] * value
        seen.append([target.image_id for target in targets])
        return found

    monkeypatch.setattr(Detector, "loss", loss)
    return seen


@pytest.mark.parametrize(("value", "parts"), [(float("nan"), 1), (float("inf"), 1), (float("nan"), 2)])
def test_a_loss_that_is_not_finite_stops_the_run_before_the_step(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch, value: float, parts: int
) -> None:
    """In the third step; of two batches in its first."""
    config = tiny_config(tmp_path, shapes, f"trainer.accumulate={parts}")
    ids = break_losses(monkeypatch, 2 * parts, value)
    with pytest.raises(TrainingDiverged) as caught:
        run(config)
    assert caught.value.exit_code == 70
    named = ", ".join(str(image) for batch in ids[2 * parts :] for image in batch)
    assert f"at step 3 loss_bbox is {value} (images {named})" in str(caught.value)
    last_row = rows(folder(config))[-1]
    assert last_row == {"epoch": "0", "step": "2", "diverged": "1", "loss_bbox": str(value)}
    assert len(named.split(", ")) == 4 and len(ids) == 3 * parts
    assert last(config)["global_step"] == 2
    assert all(torch.isfinite(tensor).all() for tensor in last(config)["state_dict"].values())
    assert read_result(folder(config)) is None


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, shapes)
    real = Detector.loss

    def loss(self: Detector, images: Any, targets: Any) -> Any:
        found = real(self, images, targets)
        # The square root's slope at 0 is infinite, its value is 0.
        weight = self.head.cls_logits.bias
        found["loss_cls"] = found["loss_cls"] + torch.sqrt((weight - weight.detach()).abs().sum())
        return found

    monkeypatch.setattr(Detector, "loss", loss)
    with pytest.raises(TrainingDiverged, match=r"at step 1 the losses are finite, but some gradients are not \(images"):
        run(config)


@pytest.mark.parametrize("save_every", [1, 100])
def test_a_bad_step_and_all_that_follow_are_left_out(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch, save_every: int
) -> None:
    """The host learns of the sixth step one step later, or at the save."""
    settings = ("schedule.optimizer=sgd", "schedule.lr=0.001", f"trainer.save_every={save_every}")
    config = tiny_config(tmp_path, shapes, *settings)
    ids = break_losses(monkeypatch, 5, float("nan"))
    weights: list[dict[str, Any]] = []
    real = Detector.set_epoch

    def before_each_step(self: Detector, epoch: int) -> None:
        weights.append({name: value.clone() for name, value in self.state_dict().items()})
        real(self, epoch)

    monkeypatch.setattr(Detector, "set_epoch", before_each_step)
    with pytest.raises(TrainingDiverged) as caught:
        run(config)
    assert f"at step 6 loss_bbox is nan (images {', '.join(map(str, ids[5]))})" in str(caught.value)
    assert len(ids) == (6 if save_every == 1 else 7)
    assert not torch.equal(weights[4]["head.scales"], weights[5]["head.scales"])
    assert_same(weights[-1], weights[5])
    assert last(config)["global_step"] == (5 if save_every == 1 else 4)


@pytest.mark.parametrize(
    ("device", "ranks", "precision", "fused"),
    [
        ("cuda", 1, "bf16-mixed", True),
        ("cuda", 8, "32-true", True),
        ("cuda", 1, "16-mixed", None),
        ("cpu", 1, "32-true", True),
        ("cpu", 2, "32-true", None),
        ("mps", 1, "32-true", None),
    ],
)
def test_the_optimizer_is_fused_where_it_can_leave_a_step_out(
    device: str, ranks: int, precision: str, fused: bool | None
) -> None:
    strategy = SimpleNamespace(root_device=torch.device(device))
    module: Any = SimpleNamespace(trainer=SimpleNamespace(strategy=strategy, precision=precision, world_size=ranks))
    assert DetectionModule.fused.fget(module) is fused  # pyright: ignore


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_fused_optimizer_takes_the_same_steps(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """PyTorch's for a CPU does not look at strides, so the gradients must have those of the weights."""
    settings = (f"schedule.optimizer={optimizer}", "schedule.lr=0.001", "schedule.max_steps=2")
    weights = []
    for fused in (True, None):
        monkeypatch.setattr(DetectionModule, "fused", fused)
        config = tiny_config(tmp_path / str(fused), shapes, *settings)
        run(config)
        weights.append(last(config)["state_dict"])
    first, second = weights
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(
            value, second[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name} {text}"
        )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_goes_on_where_the_optimizer_is_another_kind(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """Begun without a fused optimizer, continued with one, then without it."""
    config = tiny_config(tmp_path, shapes, f"schedule.optimizer={optimizer}", "schedule.lr=0.001")
    ids = break_losses(monkeypatch, 2, float("nan"))
    for fused, step in ((None, 3), (True, 5), (None, 7)):
        monkeypatch.setattr(DetectionModule, "fused", fused)
        with pytest.raises(TrainingDiverged, match=f"at step {step} "):
            run(config)
        assert last(config)["optimizer_states"][0]["param_groups"][0]["fused"] is fused
        del ids[:]


def test_too_little_memory_is_said_with_what_to_set(tmp_path: Path) -> None:
    """A process whose address space is limited, and images (of 64 pixels, made larger for the net) too large for it."""
    words = [
        "schedule=smoke", "data.image_size=64", "data.num_train=4", "data.num_val=2", "data.min_size=2048",
        "data.max_size=2048", f"data.root={tmp_path}/data", f"runs_dir={tmp_path}/runs", "trainer.accelerator=cpu",
        "run_name=large", "logger=csv",
    ]  # fmt: skip
    limit = 7 << 30
    ended = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert ended.returncode == 2, ended.stderr
    assert re.fullmatch(
        r"error: out of memory in training step 1 on 2 images of up to 2048x2048 pixels: raise trainer\.accumulate.*or"
        r" lower data\.batch_size \(now 2\), lower data\.min_size .*, each of which makes another run .*anew\.",
        ended.stderr.strip().splitlines()[-1],
    ), ended.stderr
    assert "Traceback" not in ended.stderr


def test_of_what_too_little_memory_advises_eval_batch_size_alone_continues_the_run() -> None:
    """run_name ends in the hash of the settings, so another one is another run's folder."""
    config = tiny_config("runs", "data")
    current = CurrentStep(3, evaluating=True, image_ids=[1, 2], size=(64, 64))
    said = str(explained(MemoryError(), config, Path("runs"), current))
    assert "lower data.eval_batch_size (now 4) and the run continues; or lower" in said
    continued, _, anew = said.partition("; or ")
    assert anew.endswith("each of which makes another run that starts anew.")
    for setting in ("data.eval_batch_size=2", "data.min_size=32", "data.max_size=48", "trainer.precision=bf16-mixed"):
        same = tiny_config("runs", "data", setting).run_name == config.run_name
        assert setting.partition("=")[0] in (continued if same else anew)


def test_a_second_run_is_told_who_is_there(tmp_path: Path, shapes: Path) -> None:
    """Until the first is killed, even while a child of it, such as a loader's worker, still lives."""
    config = tiny_config(tmp_path, shapes, "schedule.max_steps=1")
    ready, done = os.pipe(), os.pipe()
    holder = os.fork()
    if holder == 0:
        with locked(folder(config)):
            if os.fork() == 0:
                os.write(ready[1], b"x")
                os.read(done[0], 1)
                os._exit(0)
            signal.pause()
    os.read(ready[0], 1)
    with pytest.raises(
        Locked, match=rf" is in use by another run \(pid {holder} on host {os.uname().nodename}"
    ) as told:
        run(config)
    assert told.value.exit_code == 73
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert run(config)["steps"] == 1
    os.write(done[1], b"x")
