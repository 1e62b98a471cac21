"""benchmarks/gpu_training.py at a size that a CPU can do; a GPU is not needed to see that it works."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from benchmarks import gpu_training, gpu_ways
from benchmarks.compare import NotRun, Row
from benchmarks.gpu_training import against, agreement, each, inference, training, variants, weights
from benchmarks.gpu_ways import Setup, Way, our_training
from benchmarks.wall_clock import medians

TOY = Setup("cpu", size=(64, 64), boxes=3, rounds=1, steps=1)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning",
                                        "ignore::DeprecationWarning:lightning")  # fmt: skip


@pytest.fixture(autouse=True)
def quick_and_quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(gpu_ways, "WARM_UP", 1)
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(NotRun, match="no GPU here"):
        list(gpu_training.measure())


def test_the_rows_that_a_cpu_can_give() -> None:
    rows = [*weights(TOY), *training(TOY, 2, on_gpu=False), *inference(TOY, 1, on_gpu=False), *variants(TOY, 1)]
    assert [row.name.split(",")[0] for row in rows] == [
        "G1 the same nets", "G1 training", "G1 training", "G5 fcos", "G5 vfnet", "G1 FCOS", "G1 FCOS + MSIL 3x3",
        "G1 FCOS + MSIL 1x1", "G1 VFNet",
    ]  # fmt: skip
    for row in rows[1:]:
        value, unit = row.ours.split()
        assert float(value) > 0 and unit in ("img/s", "fps")


def test_our_steps_are_those_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock sees `steps` steps after the warm-up, and the weights have moved by all of them."""
    detector = gpu_training.other(TOY, "fcos", None)
    before = detector.head.cls_logits.weight.detach().clone()
    calls = 0
    loss = detector.loss

    def counting(*arguments):
        nonlocal calls
        calls += 1
        return loss(*arguments)

    monkeypatch.setattr(detector, "loss", counting)
    way = our_training(TOY, detector, 1, precision="32-true")
    assert way.turn() > 0
    assert calls == gpu_ways.WARM_UP + TOY.steps
    assert not torch.equal(detector.head.cls_logits.weight, before)
    assert set(way.losses()) == {"loss_cls", "loss_bbox", "loss_centerness"}


def test_the_median_of_the_rounds() -> None:
    said = {"ours": iter([3.0, 1.0, 8.0]), "anchor": iter([5.0, 5.0, 6.0])}
    assert medians({name: values.__next__ for name, values in said.items()}, 3) == {"ours": 3.0, "anchor": 5.0}


def test_rates_and_their_goal() -> None:
    row = against("G1", 100.0, 40.0, 2.5, "")  # 2.5 times, just enough
    assert row.met is True and row.ratio == 2.5 and row.goal == ">= 2.5x"
    assert against("G1", 99.0, 40.0, 2.5, "").met is False


def test_losses_that_differ_are_an_error() -> None:
    ways = {name: Way(lambda: 1.0, lambda value=value: {"loss_cls": value}) for name, value in
            {"eager": 1.0, "shipped": 9.0, "compiled": 1.01}.items()}  # fmt: skip
    assert agreement(ways) == "our ways' losses to 1e-02"
    ways["CUDA graph"] = Way(lambda: 1.0, lambda: {"loss_cls": 1.03})
    with pytest.raises(AssertionError):
        agreement(ways)


def test_a_part_that_fails_says_so_and_the_others_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> Iterator[Row]:
        yield against("G1 before", 1.0, 1.0, None, "")
        raise RuntimeError("out of memory\nand more")

    rows = list(each({"broken": fails, "whole": lambda: iter([against("G1 after", 1.0, 1.0, None, "")])}))
    assert [(row.name, row.met) for row in rows] == [("G1 before", None), ("broken", False), ("G1 after", None)]
    assert rows[1].agreement == "RuntimeError: out of memory"
    assert "Traceback" in capsys.readouterr().err
