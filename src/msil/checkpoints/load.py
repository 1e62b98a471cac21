"""From a file of weights to a detector that works, or that goes on learning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from msil.checkpoints.assemble import detector_from_config
from msil.checkpoints.description import Description, read_description
from msil.detection import Detector
from msil.detection.torchvision_detector import AnyDetector
from msil.detection.weights import differences, load_state_dict_file
from msil.errors import ConfigError, WeightsError, counted, listed
from msil.interaction import MSIL
from msil.runs import weights_file


def load_detector(path: str | Path) -> tuple[AnyDetector, Description]:
    """The detector of an imported file, a run's checkpoint or folder, in eval mode on the CPU, and what is said of it.

    Raises WeightsError for a file that is missing, unreadable, or a bare state dict that describes nothing.
    """
    path = weights_file(path)
    found = read_description(path)
    if found is None:
        raise WeightsError(
            f"{path} holds weights but does not say of what net: give a run's checkpoint or a file that "
            "`msil weights import` wrote."
        )
    detector = detector_from_config(found.model, len(found.classes), found.min_size, found.max_size)
    _load(detector, load_state_dict_file(path), path)
    return detector.eval(), found


def load_dense_detector(path: str | Path) -> tuple[Detector, Description]:
    """As load_detector, for what needs the towers of a head. Raises ConfigError for a detector of torchvision's."""
    detector, description = load_detector(path)
    if not isinstance(detector, Detector):
        raise ConfigError(
            f"{path} holds torchvision's {description.model.detector}: this works with msil's own detectors alone."
        )
    return detector, description


def load_weights(detector: AnyDetector, path: str | Path, classes: Sequence[str], *, to_train: bool) -> list[str]:
    """Load a whole detector's file into a detector of `classes`; returns what a user should know about it, in words.

    If the file names its classes, each class gets the row of its name. to_train: classes that the file does not have
    start anew, and so does MSIL where the file has none at all: with its gates at init_gate or, where that is None, at
    0.99, so that the detector starts close to the one in the file. Else both are errors.

    Raises WeightsError if anything else is missing, unknown or of another shape.
    """
    state, own, notes = load_state_dict_file(path), detector.state_dict(), []
    found = read_description(path)
    if found is not None and tuple(classes) != found.classes:
        known = listed(found.classes, 5)
        if found.model.detector is not None:
            raise WeightsError(
                f"{path} holds torchvision's {found.model.detector} of other classes, {known}: set data.classes to "
                "those, in this order."
            )
        new = [name for name in classes if name not in found.classes]
        if new and not to_train:
            raise WeightsError(
                f"{path} has no class {new[0]!r}; it knows {known}: leave data.classes out, or let it rename the "
                f"data's own, as in 'data.classes={{NAME: {found.classes[0]}}}'."
            )
        _take_rows(classes, found.classes, state, own)
        notes.append(f"of {counted(len(classes), 'class')} {len(new)} start anew: {listed(new, 5)}" if new else
                     f"{counted(len(classes), 'class')} found by name")  # fmt: skip
    if found is not None and (found.min_size, found.max_size) != (detector.min_size, detector.max_size):
        notes.append(
            f"images of {detector.min_size} to {detector.max_size} pixels, where the file's were of "
            f"{found.min_size} to {found.max_size} (data.min_size, data.max_size)"
        )
    block = {key for key in own if "head.msil." in key}
    if to_train and block and not block & state.keys():
        gated = [module for module in detector.modules() if isinstance(module, MSIL)]
        for module in gated:
            module.open_gates()
        state |= {key: value for key, value in detector.state_dict().items() if key in block}
        notes.append("MSIL is new and starts with open gates" if gated else "the block is new")
    _load(detector, state, path, block=None if found is None else found.model.msil.block)
    return notes


def _load(detector: AnyDetector, state: dict[str, Tensor], path: str | Path, block: str | None = None) -> None:
    """block: model.msil.block of the file."""
    if wrong := differences(detector.state_dict(), state):
        trained_with = "" if block is None else f" The file was trained with model.msil.block={block}."
        raise WeightsError(
            f"{path} does not fit the detector that the settings describe: it {wrong}; see model.head, model.backbone, "
            f"model.msil and model.channels.{trained_with}"
        )
    detector.load_state_dict(state)


def _take_rows(classes: Sequence[str], known: Sequence[str], state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Gives the state the classifier's rows of `classes`; those of new classes stay as they are in `own`."""
    place = {name: index for index, name in enumerate(known)}
    for key in ("head.cls_logits.weight", "head.cls_logits.bias"):
        if key in state and not len(state[key]) % len(known):
            # One row a class, in RetinaNet for each of a cell's anchors.
            theirs, ours = state[key].unflatten(0, (-1, len(known))), own[key].unflatten(0, (-1, len(classes)))
            rows = [theirs[:, place[n]] if n in place else ours[:, i] for i, n in enumerate(classes)]
            state[key] = torch.stack(rows, dim=1).flatten(0, 1)
