"""Steps that are replayed.

There is no CUDA here: a recorder that runs the step again stands in for the capture. It makes visible what a graph
needs: inputs and gradients that stay where they are.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from msil.validate import validate
from torch import Tensor

from msil.detection import Detector, Target, build_detector
from msil.detection.heads import head_class
from msil.errors import ConfigError
from msil.training import graphs
from msil.training.experiment import run
from msil.training.graphs import GraphedSteps, Inputs, Replay, Step

from .cases import assert_same, load, tiny_config


def small_detector(head: str) -> Detector:
    torch.manual_seed(0)
    options = head_class(head).Options(num_convs=1, norm_groups=4)
    return build_detector(options, "resnet10", 4, channels=16, msil={"reduction": 4})


def random_targets(counts: list[int], seed: int) -> list[Target]:
    """Boxes in images of 64 x 64 pixels."""
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for number, count in enumerate(counts):
        corner = torch.rand(count, 2, generator=generator) * 30
        boxes = torch.cat([corner, corner + 4 + 30 * torch.rand(count, 2, generator=generator)], dim=1)
        targets.append(Target(boxes, torch.randint(4, (count,), generator=generator), number, (64, 64)))
    return targets


class Recorder:
    """Plays a recorded step by running it on the very tensors that it was recorded with."""

    def __init__(self) -> None:
        self.recorded: list[list[torch.Size]] = []
        self.replayed = 0

    def __call__(self, step: Step, inputs: Inputs) -> Replay:
        self.recorded.append([tensor.shape for tensor in inputs])
        addresses = [tensor.data_ptr() for tensor in inputs]
        losses = step(inputs)  # a warm-up, which leaves nothing behind; and the outputs, always the same tensors

        def replay() -> dict[str, Tensor]:
            assert [tensor.data_ptr() for tensor in inputs] == addresses
            self.replayed += 1
            for name, value in step(inputs).items():
                losses[name].copy_(value)
            return losses

        return replay


def gradients(detector: Detector) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in detector.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("head", ["fcos", "vfnet"])
def test_losses_and_gradients_are_those_of_plain_steps(head: str) -> None:
    detector = small_detector(head)
    recorder = Recorder()
    graphed = GraphedSteps(detector, recorder)
    where = None
    earlier: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    # Two sizes of images, in turn; 9 boxes take the next number of slots.
    for number, (side, boxes) in enumerate([(64, 3), (96, 3), (64, 1), (64, 9), (96, 2)]):
        images = [torch.full((3, 64, side), 10 * number + i, dtype=torch.uint8) for i in range(2)]
        targets = random_targets([boxes, 0], number)
        losses = graphed(images, targets)
        found = gradients(detector)
        addresses = {name: p.grad.data_ptr() for name, p in detector.named_parameters() if p.grad is not None}
        where = where or addresses
        assert addresses == where
        assert not any(value.requires_grad for value in losses.values())
        earlier.append((losses, {name: value.clone() for name, value in losses.items()}))

        plain = small_detector(head)
        plain.load_state_dict(detector.state_dict())
        expected = plain.loss(images, targets)
        torch.stack(list(expected.values())).sum().backward()
        assert_same(losses, {name: value.detach() for name, value in expected.items()})
        assert_same(found, gradients(plain))
    assert (len(recorder.recorded), recorder.replayed) == (3, 5)
    for losses, as_given in earlier:  # they are read late: no later step may write over them
        assert_same(losses, as_given)


def test_sizes_beyond_the_limit_are_computed_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 1)
    detector, recorder = small_detector("fcos"), Recorder()
    graphed = GraphedSteps(detector, recorder)
    for side in (64, 96, 64):
        graphed([torch.zeros(3, 64, side, dtype=torch.uint8)], random_targets([2], 0))
        found = gradients(detector)
        plain = small_detector("fcos")
        plain.load_state_dict(detector.state_dict())
        losses = plain.loss([torch.zeros(3, 64, side, dtype=torch.uint8)], random_targets([2], 0))
        torch.stack(list(losses.values())).sum().backward()
        assert_same(found, gradients(plain))
    assert (len(recorder.recorded), recorder.replayed) == (1, 2)


@pytest.mark.parametrize("head", ["fcos", "vfnet"])
def test_a_training_with_graphs_ends_with_the_same_weights(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch, head: str
) -> None:
    plain = tiny_config(tmp_path / "plain", shapes, f"model/head={head}", "model.head.num_convs=1")
    run(plain)
    recorder = Recorder()
    monkeypatch.setattr(graphs, "Capture", lambda: recorder)
    monkeypatch.setattr("msil.training.module.check_graphs", lambda trainer, detector: None)  # there is no GPU
    graphed = tiny_config(
        tmp_path / "graphed", shapes, f"model/head={head}", "model.head.num_convs=1", "trainer.cuda_graph=true"
    )
    run(graphed)
    assert recorder.replayed == 4
    ours, theirs = (
        load(Path(config.runs_dir) / config.run_name / "checkpoints" / "last.ckpt") for config in (graphed, plain)
    )
    assert_same(ours["state_dict"], theirs["state_dict"])


def test_without_a_gpu_it_is_refused_in_a_sentence(tmp_path: Path, shapes: Path) -> None:
    config = tiny_config(tmp_path, shapes, "trainer.cuda_graph=true", "trainer.accelerator=auto")
    with pytest.raises(ConfigError, match=r"trainer\.cuda_graph=true needs an NVIDIA GPU, and this run is on the CPU"):
        run(config)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("trainer.accumulate=2", "trainer.accumulate"),
        ("trainer.precision=16-mixed", "trainer.precision=16-mixed"),
        ("trainer.accelerator=cpu", "trainer.accelerator=cpu"),
    ],
)
def test_what_contradicts_it_is_named(tmp_path: Path, shapes: Path, setting: str, named: str) -> None:
    config = tiny_config(tmp_path, shapes, "trainer.cuda_graph=true", "trainer.accelerator=auto", setting)
    with pytest.raises(ConfigError, match=named.replace(".", r"\.")):
        validate(config)
