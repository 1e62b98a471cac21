"""schedule.ema: the average is what hand arithmetic says, what is evaluated, saved and predicted with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from msil.checkpoints.load import load_detector
from msil.config import Config, config_hash, plain
from msil.data.coco import CocoDataset
from msil.metrics.record import read_record
from msil.training.averaging import TRAINED, AveragedWeights
from msil.training.experiment import run
from msil.training.module import DetectionModule

from .cases import assert_same, load, module_of, tiny_config


class FakeTrainer:
    """As much of a trainer as the callback looks at."""

    class state:
        fn = None


def test_the_average_by_hand() -> None:
    """Weights 1, 3, 6, 10 at decay 0.15: d = min(0.15, 1/10, 2/11, 3/12) = 0.1, 0.15, 0.15."""
    module = module_of(tiny_config("runs", "data", "model.backbone.norm=bn"))
    state = module.detector.state_dict(keep_vars=True)
    weight = state["head.cls_logits.weight"]
    mean = next(tensor for name, tensor in state.items() if name.endswith("running_mean"))
    count = next(tensor for name, tensor in state.items() if name.endswith("num_batches_tracked"))
    averaging = AveragedWeights(0.15)

    def put(value: int) -> None:
        with torch.no_grad():
            weight.fill_(value)
            mean.fill_(-value)
            count.fill_(value)

    trainer: Any = FakeTrainer()
    put(1)
    averaging.on_fit_start(trainer, module)
    for value in (3, 6, 10):
        put(value)
        averaging.on_train_batch_end(trainer, module, None, ([], []), 0)
    # 0.1 * 1 + 0.9 * 3 = 2.8; 0.15 * 2.8 + 0.85 * 6 = 5.52; 0.15 * 5.52 + 0.85 * 10 = 9.328
    averaging.on_validation_start(trainer, module)
    torch.testing.assert_close(weight.detach(), torch.full_like(weight, 9.328))
    torch.testing.assert_close(mean, torch.full_like(mean, -9.328))
    assert count == 10  # a count is no mean of counts
    averaging.on_validation_start(trainer, module)  # a second one changes nothing
    assert weight.flatten()[0] < 10


class Raw(Callback):
    """Keeps the weights behind every optimizer step, and those in use during and right behind every evaluation."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.evaluations: list[tuple[int, dict[str, Tensor]]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_train_batch_end(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.states.append(_copy(pl_module))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.evaluations.append((trainer.global_step, _copy(pl_module)))

    on_validation_end = on_validation_epoch_end


def _copy(module: L.LightningModule) -> dict[str, Tensor]:
    assert isinstance(module, DetectionModule)
    return {name: tensor.clone() for name, tensor in module.detector.state_dict().items()}


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> tuple[Config, Path, dict[str, Any], Raw]:
    """A whole run of two epochs of two steps with schedule.ema=0.5, and its weights after each step."""
    config = tiny_config(tmp_path_factory.mktemp("runs"), shapes, "schedule.ema=0.5")
    raw = Raw()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("msil.training.fitting.SeedSteps", lambda _seed: raw)
        result = run(config)
    return config, Path(config.runs_dir) / config.run_name, result, raw


def test_a_run_s_average_is_that_of_its_steps(averaged: tuple[Config, Path, dict[str, Any], Raw]) -> None:
    _, run_dir, _, raw = averaged
    start, *steps = raw.states
    assert len(steps) == 4
    expected = start
    for n, state in enumerate(steps):
        decay = min(0.5, (1 + n) / (10 + n))
        expected = {name: decay * expected[name] + (1 - decay) * tensor for name, tensor in state.items()}
    checkpoint = load(run_dir / "checkpoints" / "last.ckpt")
    kept = {name.removeprefix("detector."): tensor for name, tensor in checkpoint["state_dict"].items()}
    torch.testing.assert_close(kept, dict(expected))
    trained = {name.removeprefix("detector."): tensor for name, tensor in checkpoint[TRAINED].items()}
    assert_same(trained, steps[-1])
    assert not torch.equal(kept["head.scales"], trained["head.scales"])


def test_the_average_is_what_is_evaluated(averaged: tuple[Config, Path, dict[str, Any], Raw]) -> None:
    """After both epochs and at the end, by the metrics as well as by callbacks that look at the detector."""
    _, run_dir, _, raw = averaged
    assert [step for step, *_ in raw.evaluations] == [2, 2, 4, 4, 4, 4]
    kept = load(run_dir / "checkpoints" / "last.ckpt")["state_dict"]
    average = {name.removeprefix("detector."): tensor for name, tensor in kept.items()}
    for step, state in raw.evaluations:
        assert not torch.equal(state["head.scales"], raw.states[step]["head.scales"])
        if step == 4:
            assert_same(state, average)
    # by hand as above: d = 0.1 and then 2/11
    start, first, second = (raw.states[step]["head.scales"] for step in range(3))
    expected = (0.1 * start + 0.9 * first) * 2 / 11 + second * 9 / 11
    for _, state in raw.evaluations[:2]:
        torch.testing.assert_close(state["head.scales"], expected)


def test_the_average_is_what_a_checkpoint_predicts_with(
    averaged: tuple[Config, Path, dict[str, Any], Raw], shapes: Path
) -> None:
    """The run's recorded detections are those of the file, and not those of the weights that were trained."""
    _, run_dir, _, raw = averaged
    record = read_record(run_dir)
    detector, _ = load_detector(run_dir / "checkpoints" / "last.ckpt")
    dataset = CocoDataset(shapes, "val")

    def scores() -> Tensor:
        return torch.cat([detector.predict([dataset[i][0]])[0].scores for i in range(len(dataset))]).sort().values

    expected = torch.from_numpy(record.found_scores).float().sort().values
    torch.testing.assert_close(scores(), expected, rtol=1e-4, atol=1e-6)
    detector.load_state_dict(raw.states[-1])
    other = scores()
    assert other.shape != expected.shape or (other - expected).abs().max() > 1e-4


def test_best_is_saved_with_the_average_that_was_scored(averaged: tuple[Config, Path, dict[str, Any], Raw]) -> None:
    _, run_dir, _, raw = averaged
    best = load(run_dir / "checkpoints" / "best.ckpt")
    step, scored = next(entry for entry in raw.evaluations if entry[0] == best["global_step"])
    assert_same({name.removeprefix("detector."): tensor for name, tensor in best["state_dict"].items()}, scored)
    trained = {name.removeprefix("detector."): tensor for name, tensor in best[TRAINED].items()}
    assert_same(trained, raw.states[step])


def test_no_average_by_default(finished: tuple[Config, Path, dict[str, Any]]) -> None:
    config, run_dir, _ = finished
    assert config.schedule.ema is None
    assert TRAINED not in load(run_dir / "checkpoints" / "last.ckpt")
    values = plain(config)
    without = copy.deepcopy(values)
    del without["schedule"]["ema"], without["model"]["test_scales"], without["model"]["test_flip"]
    assert config_hash(without) == config_hash(values)
    assert config_hash({**values, "schedule": {**values["schedule"], "ema": 0.999}}) != config_hash(values)


class Interrupt(Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 3:  # in the middle of the second epoch
            raise RuntimeError("the power went")


def test_interrupted_and_resumed_is_undisturbed(
    averaged: tuple[Config, Path, dict[str, Any], Raw], tmp_path: Path, shapes: Path
) -> None:
    """Bit for bit: the average, the weights being trained, the optimizer's state and the numbers."""
    _, undisturbed, result, _ = averaged
    config = tiny_config(tmp_path / "runs", shapes, "schedule.ema=0.5")
    run_dir = Path(config.runs_dir) / config.run_name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("msil.training.fitting.SeedSteps", lambda _seed: Interrupt())
        with pytest.raises(RuntimeError, match="the power went"):
            run(config)
    assert load(run_dir / "checkpoints" / "last.ckpt")["global_step"] == 2
    again = run(config)
    ours, theirs = (load(folder / "checkpoints" / "last.ckpt") for folder in (run_dir, undisturbed))
    for part in ("state_dict", TRAINED, "optimizer_states"):
        assert_same(ours[part], theirs[part], part)
    assert again["metrics"] == pytest.approx(result["metrics"], abs=0, nan_ok=True)
