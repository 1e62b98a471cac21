"""Whether an exported file finds what PyTorch finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msil.detection import Detections, Detector
from msil.errors import UserError

BOX_TOLERANCE, SCORE_TOLERANCE = 1e-2, 1e-4  # pixels, probability
CANDIDATES = 100  # at a trained net's own threshold made-up images may show next to nothing
SEEDS = 3  # a detection may come or go with the rounding of the last digit, but not in each of three images


class ExportError(UserError):
    """A detector cannot be exported, or the exported file does not do what the detector does."""


class Mismatch(Exception):
    """Two lists of detections are not the same; the message says by how much."""


def compare_with_pytorch(
    path: Path, reference: Detector, sizes: list[tuple[int, int]], batch: int | None = None
) -> list[str]:
    """The file in onnxruntime against reference.predict, on one made-up image, or a batch, of each size; returns a line
    for each.

    At the detector's own score threshold or, where that would leave few candidates, at a lower one, to which the same
    file is set in memory. reference: on the CPU, resizing nothing; its score threshold changes.

    Raises ExportError if the detections differ, or onnxruntime cannot run the file.
    """
    own, failure = reference.score_thresh, None
    for seed in range(SEEDS):
        try:
            seeds = range(seed, seed + (batch or 1))
            return [
                _compared(path, reference, torch.stack([made_up_image(size, one) for one in seeds]), own, batch)
                for size in sizes
            ]
        except Mismatch as mismatch:
            failure = mismatch
        except Exception as error:  # onnxruntime's own classes have no other base in common
            raise ExportError(
                f"onnxruntime cannot run the exported file ({str(error).splitlines()[0]}): the file was not kept, try "
                "another version of onnxruntime."
            ) from error
    raise ExportError(f"the exported file and PyTorch differ {failure}: the file was not kept, please report this.")


def _compared(path: Path, reference: Detector, images: Tensor, own: float, batch: int | None) -> str:
    reference.score_thresh = threshold = min(own, _busy_threshold(reference, images))
    expected = reference.predict(images)
    given = {"image": images[0].numpy()} if batch is None else {"images": images.numpy()}
    arrays = [torch.from_numpy(array) for array in _session(path, threshold).run(None, given)]
    found = [Detections(*arrays)] if batch is None else [
        Detections(*(values[:count] for values in image)) for *image, count in zip(*arrays, strict=True)
    ]  # fmt: skip
    where = f"on {images.shape[-2]} x {images.shape[-1]} above score {threshold:.3g}"
    try:
        differences = [difference(*pair) for pair in zip(found, expected, strict=True)]
    except Mismatch as mismatch:
        raise Mismatch(f"{where} {mismatch}") from mismatch
    box, score = map(max, zip(*differences, strict=True))
    return (
        f"checked in onnxruntime {where}: {sum(len(one.boxes) for one in expected)} detections agree with PyTorch to "
        f"{box:.1e} px and {score:.1e} in score"
    )


def made_up_image(size: tuple[int, int], seed: int) -> Tensor:
    """(3, height, width) uint8: coloured patches and some noise, by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randint(20, 236, (1, 3, 6, 8), generator=generator).float()
    noise = torch.randint(-20, 21, (3, *size), generator=generator)
    return (F.interpolate(patches, size)[0] + noise).to(torch.uint8)


def difference(found: Detections, expected: Detections) -> tuple[float, float]:
    """The largest differences of boxes (pixels) and scores between two lists of the same detections; 0 if empty.

    Detections of nearly equal score may stand in any order, so each expected one is compared with the nearest box of
    its label and score that is left.

    Raises Mismatch if the numbers of detections differ, or one of them is not found.
    """
    if len(found.boxes) != len(expected.boxes):
        raise Mismatch(f"({len(found.boxes)} detections instead of {len(expected.boxes)})")
    boxes = (expected.boxes[:, None] - found.boxes[None]).abs().amax(-1)
    scores = (expected.scores[:, None] - found.scores[None]).abs()
    distance = boxes.masked_fill((expected.labels[:, None] != found.labels) | ~(scores <= SCORE_TOLERANCE), torch.inf)
    box, score = 0.0, 0.0
    for i, row in enumerate(distance):
        j = int(row.argmin())
        if not row[j] <= BOX_TOLERANCE:  # so that NaN fails too
            raise Mismatch(
                f"(place by place, boxes by up to {boxes.diagonal().max():.3g} px, allowed {BOX_TOLERANCE:g}; "
                f"scores by up to {scores.diagonal().max():.3g}, allowed {SCORE_TOLERANCE:g}; "
                f"{int((found.labels != expected.labels).sum())} of {len(distance)} labels)"
            )
        box, score = max(box, float(row[j])), max(score, float(scores[i, j]))
        distance[:, j] = torch.inf
    return box, score


def _session(path: Path, score_thresh: float) -> Any:
    """onnxruntime's session of the file, its score threshold set to the one given."""
    import numpy as np
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # fatal: errors come as exceptions
    model = onnx.load(path)
    (constant,) = [tensor for tensor in model.graph.initializer if tensor.name == "score_thresh"]
    constant.CopyFrom(onnx.numpy_helper.from_array(np.array(score_thresh, np.float32), "score_thresh"))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def _busy_threshold(reference: Detector, images: Tensor) -> float:
    """A score threshold that CANDIDATES of the images' scores reach, if there are so many."""
    scores = reference(list(images)).logits.float().sigmoid().flatten()
    best = scores.topk(min(CANDIDATES + 1, len(scores))).values
    return float(best[-2:].mean())
