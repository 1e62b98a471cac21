"""Forward, loss and backward of a step as a CUDA graph: what the host would launch a thousand times, it launches once.

What the host still launches itself: the batch, the look at NaN, the limit of the gradient, the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable

import lightning as L
import torch
from torch import Tensor, nn

from msil.detection import Detector, Target
from msil.detection.assign import GroundTruth, ground_truth
from msil.detection.detector import image_sizes
from msil.errors import ConfigError

Inputs = list[Tensor]
Step = Callable[[Inputs], dict[str, Tensor]]
Replay = Callable[[], dict[str, Tensor]]
Recorder = Callable[[Step, Inputs], Replay]

MOST_GRAPHS = 64  # sizes of batches with a graph of their own; others are computed without
_WARM_UPS = 3  # steps before a capture, as PyTorch's documentation advises


class GraphedSteps:
    """Losses and gradients of training steps, replayed from one CUDA graph for each size of batch and ground truth.

    The weights' gradients lie in `.grad`, always the same tensors, and are overwritten by every step: nobody may free
    them. Steps are as without graphs up to the order of sums in a kernel that another size may choose. The norms must
    not learn from batches (norm=bn), for the steps before a capture would be counted.

    record: makes a step that may be called again and again of one that reads the same inputs; by default a capture.
    """

    def __init__(self, detector: Detector, record: Recorder | None = None) -> None:
        self.detector = detector
        self.record = record or Capture()
        self._replays: dict[tuple[object, ...], tuple[Inputs, Replay]] = {}
        self._parameters = [parameter for parameter in detector.parameters() if parameter.requires_grad]

    def __call__(self, images: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
        """N images (3, H, W) of the device and their N targets -> the loss terms, scalars without gradient."""
        batch = self.detector.batch(images)
        truth = ground_truth(targets, image_sizes(images), batch.device)
        inputs = [batch, truth.boxes, truth.labels, truth.sizes]
        # TOOD assigns otherwise after its warm-up.
        key = (*(tensor.shape for tensor in inputs), getattr(self.detector.head, "warmup", None))
        if key not in self._replays:
            if len(self._replays) == MOST_GRAPHS:
                return self._step(inputs)
            own = [tensor.clone() for tensor in inputs]
            self._replays[key] = own, self.record(self._step, own)
        own, replay = self._replays[key]
        for static, new in zip(own, inputs, strict=True):
            static.copy_(new)
        return {name: loss.clone() for name, loss in replay().items()}  # the next replay writes over the graph's own

    def _step(self, inputs: Inputs) -> dict[str, Tensor]:
        """Forward, loss and backward: fixed shapes, fixed addresses, nothing that the host looks at."""
        self._empty_gradients()
        batch, boxes, labels, sizes = inputs
        kind = batch.device.type
        # Without its cache: the weights' copies of lower precision would be those of the capture for ever.
        precision = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
        with torch.autocast(kind, cache_enabled=False, **precision):
            losses = self.detector.head.padded_loss(self.detector.net(batch), GroundTruth(boxes, labels, sizes))
        with torch.autocast(kind, enabled=False):
            torch.stack(list(losses.values())).sum().backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def _empty_gradients(self) -> None:
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        torch._foreach_zero_(gradients)  # pyright: ignore[reportPrivateImportUsage]


def check_graphs(trainer: L.Trainer, detector: Detector) -> None:
    """Raises ConfigError where trainer.cuda_graph cannot work."""
    norms = [m for m in detector.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    reasons = {
        "needs an NVIDIA GPU, and this run is on the CPU": trainer.strategy.root_device.type != "cuda",
        f"works on one device, and this run has {trainer.world_size}": trainer.world_size > 1,
        "does not go with model.backbone.norm=bn, whose statistics each capture would move": bool(norms),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"trainer.cuda_graph=true {reason}: leave it out.")


class Capture:
    """Records a step into a CUDA graph; all graphs share one pool of memory, for one is replayed at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step, inputs: Inputs) -> Replay:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                step(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Not "global": the data loader's thread that pins memory would break the capture, and the capture it.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            losses = step(inputs)

        def replay() -> dict[str, Tensor]:
            graph.replay()
            return losses

        return replay
