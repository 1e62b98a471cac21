"""The batch at which a training's numbers broke, once more: where do they stop being finite?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msil.detection import Target
from msil.detection.torchvision_detector import AnyDetector
from msil.errors import WeightsError


@dataclass(frozen=True)
class Replay:
    """step: of the training, from 0. losses: by term, computed anew. image_ids: of the batch.
    first_layer: the first module, in the order of the computation, with an output that is not finite; None: all are.
    inputs, weights, gradients: the image ids and the names of the parameters that are not finite."""

    step: int
    image_ids: tuple[int, ...]
    losses: Mapping[str, float]
    first_layer: str | None
    inputs: tuple[int, ...]
    weights: tuple[str, ...]
    gradients: tuple[str, ...]


def read_batch(path: str | Path) -> tuple[int, list[Tensor], list[Target]]:
    """Step, images and targets of a file nan_batch_rank<r>.pt. Raises WeightsError if it is none."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return int(saved["step"]), list(saved["images"]), [Target(**target) for target in saved["targets"]]
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise WeightsError(
            f"{path} holds no batch to replay: give a run's nan_batch_rank0.pt, which a diverged training leaves."
        ) from error


def replay(detector: AnyDetector, step: int, images: list[Tensor], targets: list[Target]) -> Replay:
    """One forward and backward pass of `detector` on a batch, without an optimizer step."""
    wrong: list[str] = []
    names = {module: name for name, module in detector.named_modules()}

    def look(module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not _finite(output):
            wrong.append(names[module])

    hooks = [module.register_forward_hook(look) for module in detector.modules() if not list(module.children())]
    try:
        losses = detector.train().loss(images, targets)
        torch.stack(list(losses.values())).sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
    parameters = dict(detector.named_parameters())
    return Replay(
        step,
        tuple(target.image_id for target in targets),
        {name: float(value.detach()) for name, value in losses.items()},
        wrong[0] if wrong else None,
        tuple(
            target.image_id
            for image, target in zip(images, targets, strict=True)
            if not (_finite(image.float()) and _finite(target.boxes))
        ),
        tuple(name for name, parameter in parameters.items() if not _finite(parameter)),
        tuple(
            name for name, parameter in parameters.items() if parameter.grad is not None and not _finite(parameter.grad)
        ),
    )


def replay_lines(found: Replay) -> list[str]:
    """What a user reads of it."""
    losses = ", ".join(f"{name} {value:.6g}" for name, value in found.losses.items())
    lines = [f"training step {found.step + 1}, images {', '.join(map(str, found.image_ids))}: {losses}"]
    for what, names in (
        ("images or boxes that are not finite", found.inputs),
        ("weights that are not finite", found.weights),
        ("gradients that are not finite", found.gradients),
    ):
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            lines.append(f"{what}: {', '.join(map(str, names[:8]))}{more}")
    if found.first_layer is not None:
        lines.append(f"the first layer with an output that is not finite: {found.first_layer}")
    if len(lines) == 1:
        lines.append("all of it is finite here: the numbers broke in another precision, on another device or process")
    return lines


def _finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())
