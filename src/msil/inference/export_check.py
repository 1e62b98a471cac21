"""Whether an exported file finds what PyTorch finds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msil.detection import Detections, Detector
from msil.errors import UserError

BOX_TOLERANCE, SCORE_TOLERANCE = 1e-2, 1e-4  # pixels, probability
SEEDS = 3
# At a trained net's own threshold made-up images may show next to nothing, and the check would compare nothing.
CANDIDATES = (60, 200)


class ExportError(UserError):
    """A detector cannot be exported, or the exported file does not do what the detector does."""


class Mismatch(Exception):
    """Two lists of detections are not the same; the message says by how much."""


@dataclass(frozen=True)
class Comparison:
    """One image: the largest differences over its detections, 0 if there are none.

    image_size: height and width. score_thresh: what was compared at. box_difference in pixels.
    """

    image_size: tuple[int, int]
    score_thresh: float
    detections: int
    box_difference: float
    score_difference: float


def compare_with_pytorch(path: Path, reference: Detector, sizes: list[tuple[int, int]]) -> list[Comparison]:
    """The file in onnxruntime against reference.predict, on one made-up image of each size.

    At the detector's own score threshold and, where that leaves few candidates, also at a lower one, to which the same
    file is set in memory. reference: on the CPU, resizing nothing; it comes back as it was.

    Raises ExportError if the detections differ, or onnxruntime cannot run the file.
    """
    own, failure = reference.score_thresh, None
    try:
        for seed in range(SEEDS):
            images = [made_up_image(size, seed) for size in sizes]
            cases = [(image, own) for image in images]
            cases += [(image, lower) for image in images if (lower := _busy_threshold(reference, image)) < own]
            try:
                return [_compare(path, reference, image, threshold) for image, threshold in cases]
            except Mismatch as mismatch:
                failure = mismatch
            # A detection that comes or goes with the rounding of the last digit tells nothing: other images then.
            if all(_stable(reference, image, threshold) for image, threshold in cases):
                break
    finally:
        reference.score_thresh = own
    raise ExportError(
        f"the exported file and PyTorch differ {failure}: the file was not kept, please report this."
    ) from failure


def made_up_image(size: tuple[int, int], seed: int) -> Tensor:
    """(3, height, width) uint8: coloured rectangles and some noise on a plain ground, by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    image = torch.randint(60, 200, (3, 1, 1), generator=generator).repeat(1, height, width)
    for _ in range(12):
        (top, bottom), (left, right) = (
            sorted(torch.randint(side + 1, (2,), generator=generator).tolist()) for side in size
        )
        image[:, top:bottom, left:right] = torch.randint(256, (3, 1, 1), generator=generator)
    noise = torch.randint(-20, 21, (3, height, width), generator=generator)
    return (image + noise).clamp(0, 255).to(torch.uint8)


def difference(found: Detections, expected: Detections) -> tuple[float, float]:
    """The largest differences of boxes (pixels) and scores between two lists of the same detections.

    Detections of nearly equal score may stand in any order, so each expected one is compared with the nearest box of
    its label and score that is left.

    Raises Mismatch if the numbers of detections differ, or one of them is not found.
    """
    if len(found.boxes) != len(expected.boxes):
        raise Mismatch(f"({len(found.boxes)} detections instead of {len(expected.boxes)})")
    if len(expected.boxes) == 0:
        return 0.0, 0.0
    boxes = (expected.boxes[:, None] - found.boxes[None]).abs().amax(-1)
    scores = (expected.scores[:, None] - found.scores[None]).abs()
    same = (expected.labels[:, None] == found.labels[None]) & (scores <= SCORE_TOLERANCE)
    distance = torch.where(same, boxes, torch.inf)
    partners = []
    for row in distance:
        partner = int(row.argmin())
        partners.append(partner)
        if not row[partner] <= BOX_TOLERANCE:  # so that NaN fails too
            wrong = int((found.labels != expected.labels).sum())
            raise Mismatch(
                f"(place by place, boxes by up to {boxes.diagonal().max():.3g} px, allowed {BOX_TOLERANCE:g}; "
                f"scores by up to {scores.diagonal().max():.3g}, allowed {SCORE_TOLERANCE:g}; "
                f"{wrong} of {len(distance)} labels)"
            )
        distance[:, partner] = torch.inf
    rows = torch.arange(len(partners))
    return float(boxes[rows, partners].max()), float(scores[rows, partners].max())


def _compare(path: Path, reference: Detector, image: Tensor, threshold: float) -> Comparison:
    size = (image.shape[-2], image.shape[-1])
    expected = _predict(reference, image, threshold)
    where = f"on an image of {size[0]} x {size[1]} pixels"
    session = _session(path, threshold)
    try:
        arrays = session.run(None, {"image": image.numpy()})
    except Exception as error:  # onnxruntime's own classes have no other base in common
        raise ExportError(
            f"onnxruntime cannot run the exported file {where} ({str(error).splitlines()[0]}): the file was not kept, "
            "try another version of onnxruntime."
        ) from error
    try:
        box, score = difference(Detections(*(torch.from_numpy(array) for array in arrays)), expected)
    except Mismatch as mismatch:
        raise Mismatch(f"{where} at score threshold {threshold:.3g} {mismatch}") from mismatch
    return Comparison(size, threshold, len(expected.boxes), box, score)


def _session(path: Path, score_thresh: float) -> Any:
    """onnxruntime's session of the file, its score threshold set to the one given."""
    import numpy as np
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # fatal: errors come as exceptions
    model = onnx.load(path)
    (constant,) = [tensor for tensor in model.graph.initializer if tensor.name == "score_thresh"]
    if onnx.numpy_helper.to_array(constant) == np.float32(score_thresh):
        content = str(path)
    else:
        constant.CopyFrom(onnx.numpy_helper.from_array(np.array(score_thresh, np.float32), "score_thresh"))
        content = model.SerializeToString()
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # as above
        raise ExportError(
            f"onnxruntime {onnxruntime.__version__} cannot read the exported file ({str(error).splitlines()[0]}): the "
            "file was not kept, try another opset or a newer onnxruntime."
        ) from error


def _predict(reference: Detector, image: Tensor, threshold: float) -> Detections:
    reference.score_thresh = threshold
    return reference.predict([image])[0]


@torch.no_grad()
def _busy_threshold(reference: Detector, image: Tensor) -> float:
    """A score threshold that leaves 60 to 200 candidates, in the widest gap there."""
    logits = reference([image]).logits.float().flatten()
    best = logits.sigmoid().topk(min(CANDIDATES[1], len(logits))).values[CANDIDATES[0] - 1 :]
    if len(best) < 2:
        return reference.score_thresh
    gap = int((best[:-1] / best[1:]).argmax())
    return float((best[gap] + best[gap + 1]) / 2)


def _stable(reference: Detector, image: Tensor, threshold: float) -> bool:
    """Whether the detections stay the same if each pixel changes by up to a hundred-thousandth of itself."""
    noise = torch.rand(image.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    changed = (image.float() / 255) * (1 + 1e-5 * noise)
    try:
        difference(_predict(reference, changed, threshold), _predict(reference, image, threshold))
    except Mismatch:
        return False
    return True
