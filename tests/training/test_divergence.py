"""Losses, gradients and pixels that are no numbers: nothing is learnt from them."""

from __future__ import annotations

import resource
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from msil.cli import main
from msil.data.module import AugmentedImages
from msil.runs import read_result
from msil.training.divergence import TrainingDiverged
from msil.training.experiment import run

from .cases import assert_same, load, tiny_config
from .faults import SETTINGS, before_reading, folder, last


def break_losses(monkeypatch: pytest.MonkeyPatch, steps: set[int], value: float) -> list[list[int]]:
    """Multiply loss_bbox by `value` in these steps (from 0); the image ids of each step."""
    from msil.detection import Detector

    real, seen = Detector.loss, []

    def loss(self: Detector, images: Any, targets: Any) -> Any:
        found = real(self, images, targets)
        if len(seen) in steps:
            found["loss_bbox"] = found["loss_bbox"] * value
        seen.append([target.image_id for target in targets])
        return found

    monkeypatch.setattr(Detector, "loss", loss)
    return seen


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_not_learnt_from(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    config = tiny_config(tmp_path, shapes, *SETTINGS)
    ids = break_losses(monkeypatch, {2}, value)
    with pytest.raises(TrainingDiverged) as caught:
        run(config)
    named = ", ".join(map(str, ids[2]))
    assert f"at step 3 loss_bbox is {value} (images {named})" in str(caught.value)
    assert last(config)["global_step"] == 2  # of before the step
    path = folder(config) / "nan_batch_rank0.pt"
    kept = load(path)
    assert [target["image_id"] for target in kept["targets"]] == ids[2]
    weights = last(config)["state_dict"]
    assert_same(kept["state_dict"], {key: weights[key] for key in kept["state_dict"]})
    # Replayed without what broke it, the batch is well again: that is what the verb says.
    monkeypatch.undo()
    assert main(["replay", str(path)]) == 0
    said = capsys.readouterr().out
    assert f"training step 3, images {named}: loss_cls" in said and "all of it is finite here" in said
    assert read_result(folder(config)) is None


def test_a_gradient_that_is_no_number_is_not_learnt_from(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, shapes, *SETTINGS)
    from msil.detection import Detector

    real = Detector.loss

    def loss(self: Detector, images: Any, targets: Any) -> Any:
        found = real(self, images, targets)
        # The square root's slope at 0 is infinite, its value is 0.
        weight = self.head.cls_logits.bias
        found["loss_cls"] = found["loss_cls"] + torch.sqrt((weight - weight.detach()).abs().sum())
        return found

    monkeypatch.setattr(Detector, "loss", loss)
    expected = r"at step 1 the losses are finite, but the gradients of parameter head\.cls_logits\.bias are not"
    with pytest.raises(TrainingDiverged, match=expected):
        run(config)


def test_pixels_that_are_no_numbers_are_named(tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path, shapes, *SETTINGS)
    real, ids = AugmentedImages.__getitem__, []

    def reads(self: AugmentedImages, key: tuple[int, int]) -> Any:
        image, target = real(self, key)
        if not ids:
            ids.append(target.image_id)
            image = image.float() / 255
            image[0, 0, 0] = float("nan")
        return image, target

    monkeypatch.setattr(AugmentedImages, "__getitem__", reads)
    with pytest.raises(TrainingDiverged, match=r"at step 1 the pixels or boxes of image \d+ are not finite") as caught:
        run(config)
    assert f"image {ids[0]} " in str(caught.value)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer of a GPU, on the CPU: it passes over bad steps by itself, and the host learns of them later."""
    monkeypatch.setattr(torch.optim, "SGD", lambda *args, **options: SGD(*args, **{**options, "fused": True}))


SGD = torch.optim.SGD
BY_SGD = ("schedule.optimizer=sgd", "schedule.lr=0.001")


@pytest.mark.usefixtures("fused")
def test_a_gpu_learns_nothing_from_a_bad_step_nor_from_those_before_the_host_knows(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, shapes, *SETTINGS, *BY_SGD, "trainer.save_every=100", "schedule.eval_every=9")
    ids = break_losses(monkeypatch, {4}, float("nan"))
    with pytest.raises(TrainingDiverged) as caught:
        run(config)
    named = ", ".join(map(str, ids[4]))
    assert f"at step 5 loss_bbox is nan (images {named})" in str(caught.value)
    assert len(ids) == 7  # it came to light at step 7: LATE is 2
    kept = load(folder(config) / "nan_batch_rank0.pt")
    assert kept["step"] == 4 and [target["image_id"] for target in kept["targets"]] == ids[4]
    # The weights are those of the first epoch's four steps, though three more were made.
    assert last(config)["global_step"] == 4
    weights = last(config)["state_dict"]
    assert_same(kept["state_dict"], {key: weights[key] for key in kept["state_dict"]})


@pytest.mark.usefixtures("fused")
def test_a_gpu_skips_bad_steps_alone(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also the last step of all, which no later one brings to light."""
    config = tiny_config(tmp_path, shapes, *SETTINGS, *BY_SGD, "trainer.nan_policy=skip", "model.backbone.norm=bn")
    ids = break_losses(monkeypatch, {1, 2, 7}, float("inf"))
    result = run(config)
    assert (len(ids), result["steps"], result["skipped_steps"]) == (8, 8, 3)
    said = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert [line.split(" loss_bbox")[0] for line in said] == ["at step 2", "at step 3", "at step 8"]
    assert [line.split("; ")[-1] for line in said] == [f"skipped, {n} of at most 3 in a row" for n in (1, 2, 1)]
    state = last(config)
    assert state["callbacks"]["FiniteSteps"] == {"skipped": 3, "in_a_row": 1}
    statistics = state["state_dict"]
    counts = [int(value) for name, value in statistics.items() if name.endswith("num_batches_tracked")]
    assert counts and set(counts) == {5}  # of eight steps five counted


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("resumed", [False, True])
def test_a_gpu_learns_nothing_after_the_fourth_bad_step_in_a_row(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch, resumed: bool
) -> None:
    """Nor from the good step 8, which begins before the host knows. Also where the four are of a continued run."""
    settings = (*SETTINGS, *BY_SGD, "trainer.nan_policy=skip", "trainer.save_every=100", "schedule.eval_every=9")
    config = tiny_config(tmp_path, shapes, *settings)
    bad = {3, 4, 5, 6}
    if resumed:
        with monkeypatch.context() as patch:
            break_losses(patch, bad, float("nan"))
            before_reading(patch, 18, partial(signal.raise_signal, signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                run(config)
        bad = {number - 4 for number in bad}
    ids = break_losses(monkeypatch, bad, float("nan"))
    with pytest.raises(TrainingDiverged, match=r"at step 7 loss_bbox is nan .*, the 4th time in a row"):
        run(config)
    assert len(ids) == (4 if resumed else 8)
    # The weights are those of the first epoch's end, whose last step was the first of the four.
    state = last(config)
    assert state["global_step"] == 4 and state["callbacks"]["FiniteSteps"] == {"skipped": 1, "in_a_row": 1}
    kept = load(folder(config) / "nan_batch_rank0.pt")["state_dict"]
    assert_same(kept, {key: state["state_dict"][key] for key in kept})


@pytest.mark.usefixtures("fused")
def test_a_gpu_goes_on_with_nan_policy_stop_after_skipped_steps(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of four steps says that the last of them was skipped; the four after it are good."""
    settings = (*SETTINGS, *BY_SGD, "trainer.save_every=100")
    skipping = tiny_config(tmp_path, shapes, *settings, "trainer.nan_policy=skip")
    with monkeypatch.context() as patch:
        break_losses(patch, {3}, float("nan"))
        before_reading(patch, 18, partial(signal.raise_signal, signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            run(skipping)
    before = last(skipping)
    assert before["callbacks"]["FiniteSteps"]["in_a_row"] == 1
    stopping = tiny_config(tmp_path, shapes, *settings, "trainer.nan_policy=stop")
    run(stopping)
    after = last(stopping)
    assert (after["global_step"], after["callbacks"]["FiniteSteps"]) == (8, {"skipped": 1, "in_a_row": 0})
    name = "detector.head.cls_logits.weight"
    assert not torch.equal(after["state_dict"][name], before["state_dict"][name])


@pytest.mark.usefixtures("fused")
def test_a_gpu_may_skip_the_very_first_step(tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused optimizer makes its momentum of uninitialised memory, and leaves it so when it passes over a step."""
    config = tiny_config(tmp_path, shapes, *SETTINGS, *BY_SGD, "trainer.nan_policy=skip")
    break_losses(monkeypatch, {0}, float("nan"))
    monkeypatch.setattr(torch, "empty_like", lambda values, **options: torch.full_like(values, 1e6, **options))
    result = run(config)
    assert (result["steps"], result["skipped_steps"]) == (8, 1)
    assert max(float(value.abs().max()) for value in last(config)["state_dict"].values()) < 100


def test_three_bad_steps_in_a_row_may_be_skipped_and_no_fourth(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path / "three", shapes, *SETTINGS, "trainer.nan_policy=skip")
    with monkeypatch.context() as patch:
        break_losses(patch, {1, 2, 3, 5}, float("nan"))
        result = run(config)
    assert (result["steps"], result["skipped_steps"]) == (8, 4)
    said = capsys.readouterr().err.splitlines()
    assert [line.split("; ")[-1] for line in said if "skipped" in line] == [
        f"skipped, {count} of at most 3 in a row" for count in (1, 2, 3, 1)
    ]
    # Of the eight steps four were taken: the optimizer counts no other.
    states = last(config)["optimizer_states"][0]["state"]
    assert {int(state["step"]) for state in states.values()} == {4}

    config = tiny_config(tmp_path / "four", shapes, *SETTINGS, "trainer.nan_policy=skip")
    break_losses(monkeypatch, {1, 2, 3, 4}, float("nan"))
    with pytest.raises(TrainingDiverged, match=r"at step 5 loss_bbox is nan .*, the 4th time in a row"):
        run(config)


def test_a_skipped_step_leaves_the_statistics_of_norms_alone(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward pass has moved them already: here by pixels that are no numbers, in the second of two steps."""
    config = tiny_config(
        tmp_path, shapes, *SETTINGS, "model.backbone.norm=bn", "trainer.nan_policy=skip", "schedule.max_steps=2"
    )
    real, seen = AugmentedImages.__getitem__, []

    def reads(self: AugmentedImages, key: tuple[int, int]) -> Any:
        seen.append(key)
        image, target = real(self, key)
        return (image.float() * (float("nan") if len(seen) > 4 else 1 / 255)), target

    monkeypatch.setattr(AugmentedImages, "__getitem__", reads)
    assert run(config)["skipped_steps"] == 1
    state = last(config)["state_dict"]
    counts = [value for name, value in state.items() if name.endswith("num_batches_tracked")]
    assert counts and all(int(count) == 1 for count in counts)
    assert all(torch.isfinite(value).all() for value in state.values())


def test_a_full_disk_does_not_hide_that_the_numbers_broke(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, shapes, *SETTINGS, "trainer.save_every=100")
    break_losses(monkeypatch, {2}, float("nan"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    before_reading(monkeypatch, 9, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1])))
    try:
        with pytest.raises(
            TrainingDiverged, match=r"at step 3 loss_bbox is nan .* there is no room to keep the batch in"
        ):
            run(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(folder(config).rglob("nan_batch*"))
