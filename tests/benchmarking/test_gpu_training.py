"""G1-G5 at toy size on the CPU: what is measured, what agrees, what is left out. Times are not tested."""

from __future__ import annotations

import dataclasses
import re
import warnings
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from benchmarks import gpu_setup, gpu_waits
from benchmarks import gpu_training as benchmark
from benchmarks.compare import NotRun, Row
from benchmarks.gpu_setup import Scene, Setup, begun, failed, medians, peak_bytes
from benchmarks.gpu_ways import OurTraining
from benchmarks.nets import torchvision_fcos

from msil.training.module import DetectionModule

TOY = Setup(
    size=(64, 96), batches=(1,), inference_batch=1, boxes=3, backbone="resnet18", device="cpu", compiled=False,
    rounds=1, images_a_turn=1, uncounted=1, limit_s=1000,
)  # fmt: skip


pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning", "ignore:.*:FutureWarning:lightning")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(NotRun, match=r"^no GPU here; python -m benchmarks\.gpu_training on a machine with one"):
        next(benchmark.measure())


def numbers_of(row: Row) -> list[float]:
    return [float(number) for number in re.findall(r"^[\d.]+", f"{row.ours}\n{row.anchor}", re.MULTILINE)]


def test_rows_of_a_device_that_is_no_gpu() -> None:
    """No graph, no peak of memory, no waits; nothing compiled, as TOY says; and no goal of another size."""
    rows = {row.name: row for row in benchmark.rows(TOY)}
    assert list(rows) == [
        "G1 FCOS batch 1 eager, as shipped",
        "G1 FCOS batch 1 eager, bf16",
        "G2 FCOS batch 1 eager",
        "G5 fcos batch 1 eager, as shipped",
        "G5 fcos batch 1 eager, bf16",
        "G5 vfnet batch 1 eager",
        "G1 VFNet batch 1 eager",
        "G1 FCOS + MSIL 3x3 batch 1 eager",
        "G1 FCOS + MSIL 1x1 batch 1 eager",
    ]
    for name, row in rows.items():
        numbers = numbers_of(row)
        assert numbers and min(numbers) > 0, row
        assert len(numbers) == (1 if row.anchor == "" else 2), row
        assert (row.met is None) == (not name.endswith((", as shipped", ", bf16")) or "G5" in name), row
    assert rows["G1 FCOS batch 1 eager, as shipped"].goal == ">= 2.5x"
    assert rows["G1 FCOS batch 1 eager, bf16"].goal == ">= 1.3x"
    assert "logits of the same weights to" in rows["G1 FCOS batch 1 eager, bf16"].agreement
    assert "100 detections an image" in rows["G5 vfnet batch 1 eager"].agreement


@pytest.mark.slow
def test_compiled_losses_are_the_eager_ones() -> None:
    setup = dataclasses.replace(TOY, compiled=True)
    net = torchvision_fcos(TOY.size, TOY.classes, backbone=TOY.backbone)
    rows = {row.name: row for row in benchmark.training(setup, net, 1)}
    assert "losses as eager to " in rows["G1 FCOS batch 1 compiled, as shipped"].agreement
    assert not any(row.ours == "failed" for row in rows.values())


def way_with(*losses: float) -> OurTraining:
    fake = SimpleNamespace(losses=[{"loss_cls": loss} for loss in losses], steps=1, setup=TOY)
    return cast(OurTraining, fake)


def test_other_losses_are_an_error() -> None:
    eager = way_with(2.0, 1.0)
    assert benchmark.same_losses(way_with(2.0, 1.01), eager, 0.02) == "losses as eager to 1e-02"
    with pytest.raises(AssertionError, match="are not the eager ones"):
        benchmark.same_losses(way_with(2.0, 1.03), eager, 0.02)
    with pytest.raises(AssertionError, match="are not the eager ones"):
        benchmark.same_losses(way_with(2.0, float("nan")), eager, 0.02)


def test_a_part_that_fails_says_so_and_leaves_the_others_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any):
        yield Row("first", "1", "", None, "", None, "")
        raise RuntimeError("out of luck\nand more")

    monkeypatch.setattr(benchmark, "training", broken)
    monkeypatch.setattr(benchmark, "inference", lambda *_: iter(()))
    monkeypatch.setattr(benchmark, "others", lambda *_: iter([Row("last", "1", "", None, "", None, "")]))
    rows = list(benchmark.rows(TOY))
    assert [row.name for row in rows] == ["first", "G1-G3 FCOS batch 1", "last"]
    assert (rows[1].ours, rows[1].met, rows[1].agreement) == ("failed", False, "RuntimeError: out of luck")
    assert "Traceback" in capsys.readouterr().err


def test_no_part_begins_after_the_limit() -> None:
    rows = list(benchmark.rows(dataclasses.replace(TOY, limit_s=-1)))
    assert [row.name for row in rows] == ["G1-G3 FCOS batch 1", "G5 fcos", "G5 vfnet", "G1 other heads"]
    assert {(row.met, row.agreement) for row in rows} == {(None, "left out: -1 s had passed")}


def test_a_way_that_fails_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> float:
        raise ValueError("no")

    ways, errors = begun({"whole": lambda: lambda: 2.0, "broken": lambda: fails})
    assert list(ways) == ["whole"] and list(errors) == ["broken"]
    assert "ValueError: no" in capsys.readouterr().err
    row = failed("G1 broken", ">= 2x", errors["broken"])
    assert (row.goal, row.met, row.agreement) == (">= 2x", False, "ValueError: no")


def test_medians_of_turns_in_turn() -> None:
    calls: list[str] = []
    left = {"a": iter([1.0, 9.0, 2.0]), "b": iter([5.0, 4.0, 6.0])}

    def turn(name: str) -> float:
        calls.append(name)
        return next(left[name])

    assert medians({name: partial(turn, name) for name in left}, 3) == {"a": 2.0, "b": 5.0}
    assert calls == ["a", "b"] * 3


def test_a_turn_counts_what_comes_after_the_first_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(gpu_setup.time, "perf_counter", lambda: now[0])
    left = iter([90.0, 80.0, 1.0, 3.0])  # two steps that do not count; then (1 + 3) / 2 seconds a step

    def step() -> None:
        now[0] += next(left)

    assert gpu_setup.Clock(torch.device("cpu")).seconds_of(step, uncounted=2, steps=2) == 2.0


def test_peak_is_what_the_way_itself_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 350)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    assert peak_bytes(lambda: lambda: 1.0, gpu_setup.Clock(torch.device("cpu"))) == 250


@pytest.mark.parametrize(("share", "met"), [(60, True), (61, False)])
def test_memory_goal(monkeypatch: pytest.MonkeyPatch, share: int, met: bool) -> None:
    peaks = iter([100 * 2**30, 80 * 2**30, share * 2**30, share * 2**30])  # theirs twice, ours twice
    monkeypatch.setattr(benchmark, "peak_bytes", lambda make, clock: next(peaks))
    rows = list(benchmark.memory(TOY, torchvision_fcos(TOY.size, backbone=TOY.backbone)))
    assert [row.met for row in rows] == [met, None, None, None]
    assert (rows[0].name, rows[0].ours, rows[0].anchor, rows[0].ratio) == (
        "G4 peak memory batch 1 eager, as shipped", f"{share}.0 GiB", "100.0 GiB", share / 100
    )  # fmt: skip


class Debug:
    """Stands in for CUDA's debug mode: steps ask it whether a wait is to be complained of."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.modes = ["default"]
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self.modes.append)
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: int(self.modes[-1] != "default"))

    def wait(self) -> None:
        if self.modes[-1] == "warn":
            warnings.warn(f"{gpu_waits.WAIT} (where)", stacklevel=2)
        assert self.modes[-1] != "error"


def our_way() -> OurTraining:
    setup = dataclasses.replace(TOY, images_a_turn=3, precision="32-true")
    return OurTraining(benchmark.built("fcos", setup), Scene.of(setup, 1), setup)


def test_waits_of_the_counted_steps_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    debug, step = Debug(monkeypatch), DetectionModule.step_loss

    def waits(self, *arguments: Any):
        debug.wait()
        return step(self, *arguments)

    monkeypatch.setattr(DetectionModule, "step_loss", waits)
    found = gpu_waits.waits_of_fit(our_way())
    # Steps 1, 2 and 3 of 0 to 3.
    assert [place.split(":")[0] for place in found] == ["test_gpu_training.py"] * 3
    assert debug.modes == ["default", "warn", "default", "default"]


def test_without_waits_the_steps_run_as_if_each_were_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    debug = Debug(monkeypatch)
    assert gpu_waits.waits_of_fit(our_way()) == []
    assert debug.modes == ["default", "warn", "default", "default", "error", "default", "default"]
