"""What a finished evaluation shows in a dashboard: a table of classes, charts, example images, heat maps."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
import wandb
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image

from msil.data.annotations import AnnotatedImages
from msil.detection import Detector
from msil.detection.torchvision_detector import AnyDetector
from msil.metrics.breakdown import breakdown, confusion
from msil.metrics.matching import Matches, match_coco
from msil.metrics.precision import per_class, precision_recall, scores
from msil.metrics.record import EvaluationRecord, corners
from msil.reporting import charts, curves
from msil.reporting.canvas import as_png
from msil.reporting.comparisons import line_label
from msil.reporting.drawing import draw_boxes
from msil.reporting.gallery import gallery_pictures, image_scores
from msil.reporting.heatmaps import CELL_SIDE, HeatmapRow, draw_heatmaps, tower_maps
from msil.reporting.matrix import confusion_matrix
from msil.training.loggers import has_dashboard, log_pictures, log_result

GALLERY = 12  # images
HEATMAPS = 4
GAP = 8  # pixels between a gallery's pictures
SIZES = ("APs", "APm", "APl")
_UNSAFE = re.compile(r"[^\w. -]")  # a panel's name becomes one of a file


@dataclass(frozen=True)
class ClassRow:
    """objects: that count, ignored ones left out. ap, ap50: COCO's, fractions, NaN without objects."""

    name: str
    objects: int
    ap: float
    ap50: float


@dataclass(frozen=True)
class GalleryRow:
    """truth, found: the image with its ground truth and with the detections of at least 0.3, uint8 (H, W, 3).
    f1: of these detections, see reporting.gallery.image_scores. objects: that count."""

    name: str
    truth: np.ndarray
    found: np.ndarray
    f1: float
    objects: int


@dataclass(frozen=True)
class Panels:
    """recalls: (R,). precisions: (R,), at IoU 0.5, the mean over the classes, NaN without objects.
    charts: pictures by name, uint8 (H, W, 3). heatmaps: None where no image has a box."""

    classes: tuple[ClassRow, ...]
    recalls: np.ndarray
    precisions: np.ndarray
    charts: Mapping[str, np.ndarray]
    gallery: tuple[GalleryRow, ...]
    heatmaps: np.ndarray | None


def show_panels(
    loggers: Sequence[Any],
    result: Mapping[str, Any],
    record: EvaluationRecord | None,
    detector: AnyDetector,
    data: AnnotatedImages,
    step: int,
) -> None:
    """Log the numbers of result.json and, with a record, the panels, where a dashboard is on.

    The run is complete by then: what cannot be logged is said in one line, and is no reason to fail.
    """
    shown = [logger for logger in loggers if has_dashboard([logger])]
    if not shown:
        return
    try:
        log_result(shown, result, step)
        if record is not None:
            log_panels(shown, make_panels(record, detector, data, line_label(result)), step)
        for logger in shown:
            if isinstance(logger, TensorBoardLogger):
                logger.finalize("success")
    except Exception as error:  # a network, a disk, an image that has gone: none undoes the training
        print(f"the run is complete, but not all of its panels could be logged ({type(error).__name__}: {error})")


def make_panels(record: EvaluationRecord, detector: AnyDetector, data: AnnotatedImages, label: str) -> Panels:
    """Everything that is shown of one evaluation.

    record: what it compared. detector: that was evaluated, on any device; left in eval mode. data: holds the record's
    images. label: what charts call the detector.
    """
    matches = match_coco(record)
    recalls, by_class = precision_recall(matches)
    chosen = example_images(record)
    places = {data.image_id(place): place for place in range(len(data))}
    images = {index: data[places[int(record.image_ids[index])]][0] for index in chosen}
    f1 = image_scores(record)
    shown = chosen[:: -(-len(chosen) // HEATMAPS)] if chosen else []
    return Panels(
        _class_rows(record, matches),
        recalls,
        _mean(by_class),
        _charts(record, matches, recalls, by_class, label),
        tuple(_gallery_row(record, index, images[index], float(f1[index])) for index in chosen),
        _heatmaps(record, detector, [(index, images[index]) for index in shown], label)
        if shown and isinstance(detector, Detector)
        else None,
    )


def example_images(record: EvaluationRecord) -> list[int]:
    """Positions of at most 12 images with objects, evenly spread: the same ones for all runs on the same data, so that
    a dashboard can set them side by side."""
    usable = np.unique(record.truth_images[~record.truth_ignored])
    if not len(usable):
        return []
    return usable[np.unique(np.linspace(0, len(usable) - 1, GALLERY).round().astype(int))].tolist()


def log_panels(loggers: Sequence[Any], panels: Panels, step: int) -> None:
    """Pictures to every dashboard; to W&B tables and a chart of its own besides.

    W&B keeps the pictures of a table among the user's artifacts and not in the run's folder, which alone would not hold
    the gallery then: it goes there as pictures too.
    """
    pictures = {f"charts/{name}": picture for name, picture in panels.charts.items()}
    if panels.heatmaps is not None:
        pictures["heatmaps"] = panels.heatmaps
    for place, row in enumerate(panels.gallery, start=1):
        pictures[f"gallery/{place:02} {_UNSAFE.sub('-', PurePath(row.name).name)}"] = _side_by_side(row)
    log_pictures(loggers, pictures, step)
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_metrics(_wandb_tables(panels), step=step)


def _wandb_tables(panels: Panels) -> dict[str, Any]:
    classes = [[row.name, row.objects, row.ap, row.ap50] for row in panels.classes]
    points = [[float(x), float(y)] for x, y in zip(panels.recalls, panels.precisions, strict=True)]
    curve = wandb.Table(["recall", "precision"], points)
    gallery = [
        [row.name, _wandb_image(row.truth), _wandb_image(row.found), row.f1, row.objects] for row in panels.gallery
    ]
    return {
        "classes": wandb.Table(["class", "objects", "AP", "AP50"], classes),
        "precision_recall": wandb.plot.line(curve, "recall", "precision", title="Precision and recall at IoU 0.5"),
        "gallery": wandb.Table(["image", "ground truth", "detections", "F1", "objects"], gallery),
    }


def _wandb_image(picture: np.ndarray) -> wandb.Image:
    return wandb.Image(Image.fromarray(picture), file_type="jpg")


def _class_rows(record: EvaluationRecord, matches: Matches) -> tuple[ClassRow, ...]:
    found = per_class(matches)
    objects = np.bincount(record.truth_labels[~record.truth_ignored], minlength=len(record.classes))
    return tuple(
        ClassRow(str(name), int(count), float(ap), float(ap50))
        for name, count, ap, ap50 in zip(record.classes, objects, found["AP"], found["AP50"], strict=True)
    )


def _charts(
    record: EvaluationRecord, matches: Matches, recalls: np.ndarray, by_class: np.ndarray, label: str
) -> dict[str, np.ndarray]:
    """The report's charts of a single run."""
    classes = [str(name) for name in record.classes]
    made: dict[str, Callable[[], bytes]] = {
        "class AP": lambda: charts.class_bars(classes, {label: per_class(matches)["AP"]}),
        "precision and recall": lambda: curves.precision_recall(recalls, {label: _mean(by_class)}),
        "precision and recall by class": lambda: curves.precision_recall_classes(recalls, classes, {label: by_class}),
        "confusion": lambda: confusion_matrix(classes, confusion(record)),
        "errors": lambda: charts.error_bars({label: breakdown(record).costs}),
        "sizes": lambda: charts.size_bars({label: {k: float(v) for k, v in scores(matches, metrics=SIZES).items()}}),
    }
    with as_png():
        return {name: _pixels(draw()) for name, draw in made.items()}


def _gallery_row(record: EvaluationRecord, index: int, image: Any, f1: float) -> GalleryRow:
    truth, found, _ = gallery_pictures(index, image, record, record)
    objects = np.count_nonzero(_truths(record, index))
    return GalleryRow(str(record.file_names[index]), _pixels(truth), _pixels(found), f1, int(objects))


def _heatmaps(
    record: EvaluationRecord, detector: Detector, images: Sequence[tuple[int, Any]], label: str
) -> np.ndarray:
    detector.eval()
    rows = []
    for index, image in images:
        mine = _truths(record, index)
        boxes = corners(record.truth_boxes[mine])
        drawn = draw_boxes(image, boxes, record.truth_labels[mine], record.classes.tolist(), side=CELL_SIDE)
        titles = (str(record.file_names[index]), f"ground truth: {len(boxes)}")
        rows.append(HeatmapRow(image, titles, drawn, boxes, [tower_maps(detector, image)]))
    return draw_heatmaps(rows, [label])


def _truths(record: EvaluationRecord, index: int) -> np.ndarray:
    """Which boxes are objects to be found on an image: (G,) bool."""
    return (record.truth_images == index) & ~record.truth_ignored


def _side_by_side(row: GalleryRow) -> np.ndarray:
    gap = np.full((row.truth.shape[0], GAP, 3), 255, dtype=np.uint8)
    return np.concatenate([row.truth, gap, row.found], axis=1)


def _pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def _mean(by_class: np.ndarray) -> np.ndarray:
    """(K, R) -> (R,), over the classes with objects; NaN where none has any."""
    counted = by_class[~np.isnan(by_class).any(axis=1)]
    return counted.mean(axis=0) if len(counted) else np.full(by_class.shape[1], np.nan)
