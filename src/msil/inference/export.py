"""A detector as one ONNX file, from the image's bytes to its detections, checked against PyTorch before it is kept."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msil.detection import Detector
from msil.detection.preprocess import STRIDE, normalize
from msil.errors import install
from msil.inference.export_check import ExportError, compare_with_pytorch
from msil.runs import check_own, replacing

SMALLEST, LARGEST = STRIDE, 16384  # pixels a side
OPSET = 20  # of ONNX; DeformConv, which VFNet needs, came with 19
# All five feature maps have sides above 1 and no two sides are alike, so that none is taken for a constant.
TRACED_SIZE = (320, 416)


def export_onnx(
    detector: Detector,
    path: str | Path,
    *,
    classes: Sequence[str],
    image_size: tuple[int, int] = (800, 1088),
    dynamic: bool = True,
    batch: int | None = None,
    progress: Callable[[str], object] = lambda line: None,
) -> list[str]:
    """Write `detector` to `path` as one ONNX file, and compare it with Detector.predict in onnxruntime, on the CPU.

    Input: `image` (3, H, W) uint8 RGB, of any size from 32 x 32 if `dynamic`, else of `image_size`, height and width.
    Outputs, D detections by descending score: `boxes` (D, 4) float32 x1 y1 x2 y2 in the pixels of `image`,
    `scores` (D,) float32, `labels` (D,) int64.
    With a batch of N, the input is `images` (N, 3, H, W), all of one size, and with K for detections_per_img the
    outputs are `boxes` (N, K, 4), `scores` (N, K), `labels` (N, K) and `counts` (N,) int64: image i has counts[i]
    detections, and zeros after them (labels: -1).
    Inside: channel order, normalisation, padding, the net, decoding, score threshold, NMS and detections_per_img.
    Outside: resizing. The file takes the image at the size that the net shall see; for the results of
    Detector.predict, resize it as msil.detection.preprocess.resized_size says for min_size and max_size, and scale the
    boxes back. test_scales and test_flip have no part in it.
    The file's metadata_props, as text: classes (a json list, label i is its i-th name), min_size and max_size (empty if
    the detector resizes nothing), score_thresh, nms_thresh, detections_per_img.

    classes: the names of the labels. progress is called with a line before each step that takes long. `path` appears
    only once the check has passed, on made-up images of image_size and, if dynamic, of a second size: boxes within
    1e-2 px, scores within 1e-4. Returns what was done, as lines.

    Raises ExportError if a package is missing, the file cannot be written, the export fails, or the check does;
    ConfigError for another's file at `path`.
    """
    if len(classes) != detector.head.num_classes:
        raise ValueError(f"the detector has {detector.head.num_classes} classes, not {len(classes)}.")
    if batch is not None and batch < 1:
        raise ExportError(f"a batch must hold 1 image or more, but is to hold {batch}: choose another size.")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"an export needs {' and '.join(missing)}: {install('export')}.")
    path, (height, width) = Path(path), image_size
    if not all(SMALLEST <= side <= LARGEST for side in image_size):
        raise ExportError(
            f"an export for images of {height} x {width} pixels (height x width) is not possible: choose sides from "
            f"{SMALLEST} to {LARGEST}."
        )
    reference = copy.deepcopy(detector).cpu().eval().requires_grad_(False)
    reference.min_size = reference.max_size = reference.test_scales = None
    reference.test_flip = False
    named = ("min_size", "max_size", "score_thresh", "nms_thresh", "detections_per_img")
    settings = {name: getattr(detector, name) for name in named}
    metadata = {"classes": json.dumps(list(classes))} | {k: "" if v is None else str(v) for k, v in settings.items()}
    sizes = [(height, width)]
    if dynamic:  # another shape, with sides that need padding
        sizes.append((max(width * 2 // 3, SMALLEST) | 1, max(height * 3 // 4, SMALLEST) | 1))
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        check_own(path)
        with replacing(path) as partial:
            partial.touch()  # fails before the minutes that an export takes
            progress(f"exporting to {path}: this takes a minute or so")
            write_graph(reference, partial, None if dynamic else sizes[0], metadata, batch)
            progress("checking in onnxruntime: some seconds")
            checks = compare_with_pytorch(partial, reference, sizes, batch)
    except OSError as error:
        raise ExportError(
            f"{path} cannot be written ({error.strerror or error}): give the path of a file in a folder of yours."
        ) from error
    takes = f"of any size from {SMALLEST} x {SMALLEST}" if dynamic else f"of {height} x {width} pixels"
    images = "one image" if batch is None else f"{batch} image{'s' * (batch > 1)}"
    lines = [f"{path}: {path.stat().st_size / 1e6:.1f} MB, ONNX opset {OPSET}, {images} {takes}"]
    if detector.test_scales is not None or detector.test_flip:
        lines.append("model.test_scales and model.test_flip have no part in it: it takes one view of an image")
    return lines + checks


class ExportedDetector(nn.Module):
    """What the file holds: image (3, H, W) uint8 RGB -> boxes (D, 4), scores (D,), labels (D,); batched: as export_onnx
    says."""

    score_thresh: Any  # a tensor, so that it stays a constant of that name in the file

    def __init__(self, detector: Detector, batched: bool) -> None:
        super().__init__()
        self.detector, self.batched = detector, batched
        self.register_buffer("score_thresh", torch.tensor(detector.score_thresh))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        detector = self.detector
        images = images if self.batched else images[None]
        height, width = images.shape[-2:]
        if detector.channel_order == "bgr":
            images = images.flip(1)
        pixels = normalize(images, detector.image_mean, detector.image_std)
        batch = F.pad(pixels, (0, _missing(width), 0, _missing(height)))
        found = detector.head.detect(
            detector.head(detector.fpn(detector.backbone(batch))),
            [(height, width)] * len(images),
            score_thresh=self.score_thresh,
            nms_thresh=detector.nms_thresh,
            topk_candidates=detector.topk_candidates,
            detections_per_img=detector.detections_per_img,
        )
        if not self.batched:
            return found[0].boxes, found[0].scores, found[0].labels
        most = detector.detections_per_img
        rows = [(_filled(one.boxes, most, 0), _filled(one.scores, most, 0), _filled(one.labels, most, -1),
                 torch.ones_like(one.labels).sum()) for one in found]  # fmt: skip
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))


def _filled(values: Tensor, length: int, value: int) -> Tensor:
    """Up to `length` rows -> exactly that many. Cut, since padding by a number that depends on the data is refused."""
    return torch.cat([values, values.new_full((length, *values.shape[1:]), value)])[:length]


def write_graph(
    detector: Detector,
    path: Path,
    image_size: tuple[int, int] | None,
    metadata: Mapping[str, str],
    batch: int | None = None,
) -> None:
    """Trace and write, unchecked. image_size: the only one that the file shall take; None: any."""
    model = ExportedDetector(copy.deepcopy(detector), batch is not None).eval()
    shape = (*(() if batch is None else (batch,)), 3, *(image_size or TRACED_SIZE))
    sides = {i: torch.export.Dim(name, min=SMALLEST, max=LARGEST) for i, name in ((-2, "height"), (-1, "width"))}
    sides = {len(shape) + i: side for i, side in sides.items()}
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                (torch.zeros(shape, dtype=torch.uint8),),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                dynamic_shapes={"images": sides} if image_size is None else None,
                input_names=["image" if batch is None else "images"],
                output_names=["boxes", "scores", "labels", *([] if batch is None else ["counts"])],
                custom_translation_table={torch.ops.msil.batched_nms.default: _batched_nms_to_onnx},
            )
    except Exception as error:  # the exporter lets through whatever torch.export, onnxscript or onnx raise
        reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
        advice = "export for one image size (--static)" if image_size is None else "try another version of torch"
        raise ExportError(f"torch {torch.__version__} cannot export this detector ({reason}): {advice}.") from error
    assert program is not None
    _describe(program.model, metadata, batch is not None)
    program.save(str(path))


def _describe(model: Any, metadata: Mapping[str, str], batched: bool) -> None:
    """Say what the file is for, in place of how it was made (lines of Python on the machine that made it)."""
    from onnxscript import ir

    model.producer_name = "msil"  # see runs.check_own
    for part in (model, model.graph, *model.graph.all_nodes()):
        part.metadata_props.clear()
    model.metadata_props.update(metadata)
    taken, found = "image (3, height, width)", "detections"
    if batched:
        taken, found = "images (N, 3, height, width)", "of image i, counts[i] detections"
    else:  # of a batch all shapes are known
        for output in model.graph.outputs:
            output.shape = ir.Shape(["detections", *output.shape[1:]])
    model.doc_string = (
        f"{taken} uint8 RGB, already resized -> {found} by descending score: boxes x1 y1 x2 y2 in its pixels, scores, "
        "labels (positions in the list `classes` of the metadata)."
    )


def _batched_nms_to_onnx(boxes: Any, scores: Any, labels: Any, nms_thresh: float) -> Any:
    """msil::batched_nms in ONNX, whose own operator takes the scores as (1, classes, C)."""
    from onnxscript import opset18

    op: Any = opset18
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    # With a zero among them, for there may be no label at all.
    classes = op.Add(op.ReduceMax(op.Concat(labels, op.Constant(value_ints=[0]), axis=0), keepdims=0), one)
    of_class = op.Equal(op.Unsqueeze(op.Range(zero, classes, one), [1]), op.Unsqueeze(labels, [0]))
    table = op.Where(of_class, op.Unsqueeze(scores, [0]), op.Constant(value_float=0.0))
    kept = op.NonMaxSuppression(
        op.Unsqueeze(boxes, [0]),
        op.Unsqueeze(table, [0]),
        op.Constant(value_int=2**31 - 1),
        op.Constant(value_float=nms_thresh),
        op.Constant(value_float=0.0),  # only scores above it: what is left of `table`
    )
    index = op.Squeeze(op.Slice(kept, [2], [3], [1]), [1])  # kept: (D, 3) image, class, box
    _, order = op.TopK(op.Gather(scores, index), op.Shape(index), axis=0)
    return op.Gather(index, order)


def _missing(side: int) -> int:
    # In whole numbers from 0 up: ONNX divides negative ones towards zero, Python downwards.
    return (side + STRIDE - 1) // STRIDE * STRIDE - side


@contextmanager
def _quiet():
    """Without the exporter's remarks about itself."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
