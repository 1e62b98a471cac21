"""What the runs of one detector show: charts over seeds, images where two detectors differ, and heat maps."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from msil.checkpoints.load import load_dense_detector
from msil.errors import ConfigError, DataError, WeightsError, counted
from msil.metrics.breakdown import breakdown, confusion
from msil.metrics.matching import Matches
from msil.metrics.precision import nan_mean, precision_recall, scores
from msil.metrics.record import EvaluationRecord, corners
from msil.reporting.evidence import Evidence, max_dets
from msil.reporting.figures import charts
from msil.reporting.figures.gallery import gallery_picture, image_scores, most_different, read_gallery_image
from msil.reporting.figures.heatmaps import MERGED, draw_heatmaps, energy_table, heatmap_row, split_energy
from msil.reporting.figures.pictures import image_bytes, series
from msil.reporting.groups import DetectorLines, Lines, Result, lookup
from msil.reporting.page import Curves, Picture, Section
from msil.runs import CHECKPOINTS, LAST, METRICS, RECORD

AREAS = {"APs": "small\n< 32² px", "APm": "medium", "APl": "large\n≥ 96² px"}  # COCO's
ERRORS = {"Cls": "Cls\nclass", "Loc": "Loc\nlocation", "Both": "Both\nclass, box", "Dupe": "Dupe\nduplicate",
          "Bkg": "Bkg\nbackground", "Miss": "Miss\nmissed"}  # fmt: skip
IMAGES = 12  # of a gallery
HEATMAPS = 4  # images with heat maps
ENERGY_IMAGES = 200  # the first so many of a split
CHART_WIDTH = 614  # CSS pixels: 6.4 inches


def detector_section(detector: DetectorLines, evidence: Evidence) -> Section:
    """The loss of all its lines, then the plain detector against MSIL (or whichever lines there are)."""
    title = f"{detector.name}: sizes, errors, confusion"
    losses = _curves(detector.lines, "step", "loss")
    pictures = []
    if losses:
        svg = charts.curves(losses, "step (thin: one seed, bold: mean)", "loss", "Training loss")
        pictures.append(_chart(svg, f"Training loss of {', '.join(losses)}"))
    shown = islice(detector.lines.items(), 2)
    kept = {label: runs for label, runs in shown if all(evidence.record(run) is not None for run in runs)}
    if not kept:
        missing = "These runs kept no detections (evaluation.npz), so there are no charts of them."
        return Section(title, (missing,), pictures=tuple(pictures), folded=True)
    names = " and ".join(f"{label} ({counted(len(runs), 'seed')})" for label, runs in kept.items())
    compared = (
        f"Charts of {names}; curves and bars are means over the seeds. AP by size is COCO's; precision and "
        "recall, errors and the confusion matrix are at IoU 0.5. Types of errors, and what each costs in AP50, are "
        "TIDE's (Bolya et al. 2020, arXiv 2008.08115): Cls a wrong class, Loc a poor box (IoU 0.1 to 0.5), Both, Dupe "
        "a second detection of an object, Bkg no object, Miss an object that nothing found."
    )
    return Section(title, (compared,), pictures=(*pictures, *_detections(kept, evidence)), folded=True)


def gallery_section(plain: Sequence[Result], msil: Sequence[Result], evidence: Evidence) -> Section:
    """Ground truth, plain and MSIL side by side, of the first seed that both have; else a sentence why not."""
    title = "Where the two differ most"
    runs = _same_seed(plain, msil)
    if runs is None:
        return Section(title, ("The two lines have no seed in common, so no gallery.",))
    first, second = (evidence.record(run) for run in runs)
    if first is None or second is None:
        return Section(title, (f"One of the two has no readable {RECORD}, so no gallery.",))
    if first.question() != second.question():
        return Section(title, ("The two were not evaluated on the same images, so no gallery.",))
    found = [image_scores(record) for record in (first, second)]
    better, worse = (int(np.count_nonzero(sign * (found[1] - found[0]) > 0)) for sign in (1, -1))
    if not better + worse:
        return Section(title, (f"Both find the same in each of the {len(first.image_ids)} images, so no gallery.",))
    pictures = []
    try:
        image = _reader(first, runs[0])
        for index in most_different(first, second, IMAGES).tolist():
            name, (plain_score, msil_score) = str(first.file_names[index]), (scores[index] for scores in found)
            picture = gallery_picture(index, image(index), first, second)
            caption = f"{name}: ground truth; plain, F1 {plain_score:.2f}; MSIL, F1 {msil_score:.2f}"
            alt = f"The objects of image {name}, and what the plain detector and the one with MSIL find"
            pictures.append(Picture(alt, image_bytes(picture, "JPEG"), "jpeg", picture.shape[1], caption))
    except DataError as error:
        return Section(title, (f"No gallery: {str(error).rstrip('.')}.",))
    words = (
        f"Seed {runs[0]['seed']}. An image's score is the F1 of its detections of at least 0.3 at IoU 0.5; it also "
        "moves with the scores of the same boxes, which AP does not see. MSIL is "
        f"better on {better} of {len(first.image_ids)} images and worse on {worse}; shown are the largest "
        "differences, half of them each way, so that the choice flatters neither."
    )
    return Section(title, (words,), pictures=tuple(pictures))


def heatmap_section(plain: Sequence[Result], msil: Sequence[Result], evidence: Evidence) -> Section:
    """Figures 4 and 6 for the first seed that both have, and the shares of energy that they only suggest."""
    title = "Where the towers' features are strong (Figures 4 and 6)"
    runs = _same_seed(plain, msil)
    record = None if runs is None else evidence.record(runs[0])
    if runs is None or record is None:
        return Section(title, ("The two lines have no seed with detections in common, so no heat maps.",))
    try:
        image = _reader(record, runs[0])
        detectors = {
            label: load_dense_detector(Path(run["folder"]) / CHECKPOINTS / LAST)[0]
            for label, run in zip(("plain", "MSIL"), runs, strict=True)
        }
        indices = np.unique(record.truth_images[~record.truth_ignored]).tolist()
        samples = ((image(i), _boxes(record, i)) for i in indices[:ENERGY_IMAGES])
        energy = split_energy(detectors, samples)
        rows = [
            heatmap_row(
                detectors,
                image(index),
                ("", str(record.file_names[index])),
                _boxes(record, index),
                record.truth_labels[_mine(record, index)],
                record.classes.tolist(),
            )
            for index in indices[:: -(-len(indices) // HEATMAPS)]
        ]
    except (WeightsError, DataError, ConfigError) as error:
        return Section(title, (f"No heat maps: {str(error).rstrip('.')}.",))
    levels = (energy.levels[0], MERGED)
    words = (
        f"Seed {runs[0]['seed']}: the mean over channels of the feature's absolute value behind the MSIL seam, at the "
        "finest level and with all levels merged. The paper shows such maps; the table says how much of a map's energy "
        f"lies inside the boxes and near their border, over {len(energy.uniform)} images with boxes, with 95 % "
        "intervals over images; another seed may give other signs."
    )
    pictures = []
    for level in levels:
        picture = draw_heatmaps(rows, list(detectors), level)
        alt = f"Heat maps of the two towers of {' and '.join(detectors)} on {len(rows)} images, {level}"
        pictures.append(Picture(alt, image_bytes(picture, "JPEG"), "jpeg", picture.shape[1], f"Level: {level}."))
    return Section(title, (words,), (energy_table(energy),), pictures=tuple(pictures))


def _chart(svg: bytes, alt: str) -> Picture:
    return Picture(alt, svg, "svg", CHART_WIDTH)


def learning_curves(number: int, lines: Lines) -> Curves | None:
    """AP during training, of any of the lines; None where no run has two evaluations. number: of the section."""
    found = _curves(lines, "epoch", "AP")
    if not any(len(xs) > 1 for seeds in found.values() for xs, _ in seeds):
        return None
    x_label = "epoch (thin: one seed, bold: mean)"
    svg, keys = charts.chosen_curves(found, f"curve{number}", x_label, "COCO AP, percent", "AP during training")
    return Curves(svg, tuple((start, name, color) for name, (start, color) in zip(found, keys, strict=True)))


def _curves(lines: Lines, x: str, y: str) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    found = {name: [curve for run in runs if len((curve := _curve(run, x, y))[0])] for name, runs in lines.items()}
    return {name: curves for name, curves in found.items() if curves}


def _curve(run: Result, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """Two columns of the run's metrics.csv; without points where there is none, and, with a warning, where it is
    damaged."""
    path = Path(run["folder"]) / METRICS
    if path.exists():
        try:
            with path.open(newline="", encoding="utf-8") as file:
                return series(list(csv.DictReader(file)), x, y)
        except (ValueError, csv.Error) as error:  # ValueError: a cell that is not a number, or invalid UTF-8
            warnings.warn(f"{path} is damaged ({error}): that run has no curves.", stacklevel=2)
    return series([], x, y)


def _detections(lines: Lines, evidence: Evidence) -> list[Picture]:
    records = {label: [record for run in runs if (record := evidence.record(run))] for label, runs in lines.items()}
    judged = {label: [evidence.matches(run, "AP") for run in runs] for label, runs in lines.items()}
    classes = next(iter(records.values()))[0].classes.tolist()
    precisions = {name: [_mean_precision(one) for one in found] for name, found in judged.items()}
    sizes = {name: _means([scores(one, metrics=tuple(AREAS)) for one in found]) for name, found in judged.items()}
    limit = max(max_dets(run) for runs in lines.values() for run in runs)
    errors = {name: _means([breakdown(record, limit).costs for record in found]) for name, found in records.items()}
    pictures = [
        _chart(
            charts.curves(precisions, "recall", "precision, mean over classes", "Precision and recall at IoU 0.5"),
            f"Precision over recall at IoU 0.5, mean over the classes, of {', '.join(precisions)}",
        ),
        _chart(
            charts.grouped_bars(sizes, AREAS, "AP, percent", "AP by size of object"),
            f"AP by size of object: {_in_words(sizes)}",
        ),
        _chart(
            charts.grouped_bars(errors, ERRORS, "AP50 lost, points", "AP50 lost to each kind of error (TIDE)"),
            f"AP50 that each type of error costs: {_in_words(errors)}",
        ),
    ]
    for name, found in records.items():
        title = f"Confusion of {name}" + (f" (sum of {len(found)} seeds)" if len(found) > 1 else "")
        svg = charts.confusion_matrix(classes, np.sum([confusion(record) for record in found], axis=0), title)
        alt = f"{title}: rows are the true classes and background, columns the predicted ones and missed"
        pictures.append(_chart(svg, alt))
    return pictures


def _means(seeds: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {name: float(nan_mean(np.array([one[name] for one in seeds]))) for name in seeds[0]}


def _mean_precision(matches: Matches) -> tuple[np.ndarray, np.ndarray]:
    recalls, precisions = precision_recall(matches)
    return recalls, nan_mean(precisions)


def _in_words(rows: Mapping[str, Mapping[str, float]]) -> str:
    """The numbers of a chart for those who do not see it."""
    return "; ".join(
        f"{name}: " + ", ".join(f"{kind} {100 * value:.1f}".strip() for kind, value in values.items())
        for name, values in rows.items()
    )


def _same_seed(plain: Sequence[Result], msil: Sequence[Result]) -> tuple[Result, Result] | None:
    """The two runs of the lowest seed that both lines have."""
    first, second = ({run["seed"]: run for run in runs} for runs in (plain, msil))
    common = sorted(set(first) & set(second))
    return (first[common[0]], second[common[0]]) if common else None


def _data_root(run: Result) -> Path:
    """Where the run's images are; a relative folder is sought beside the runs first, where the run found it, then here.

    Raises DataError where it is not."""
    root, runs = Path(run["config"]["data"]["root"]), Path(str(run["config"].get("runs_dir", "runs")))
    beside = Path(run["folder"]).resolve().parents[len(runs.parts) :][:1]  # where a relative runs_dir started
    for place in (*(folder / root for folder in beside), root):
        if place.is_dir():
            return place
    raise DataError(f"the data folder {root} is not here: make the report where the runs were started")


def _reader(record: EvaluationRecord, run: Result) -> Callable[[int], Tensor]:
    """The images of the run's record by their place in it. Raises DataError where they are not here."""
    root, bits = _data_root(run), lookup(run, "data", "bits") or 16

    def image(index: int) -> Tensor:
        height, width = record.sizes[index].tolist()
        return read_gallery_image(root, str(record.file_names[index]), (height, width), bits)

    return image


def _mine(record: EvaluationRecord, index: int) -> np.ndarray:
    return (record.truth_images == index) & ~record.truth_ignored


def _boxes(record: EvaluationRecord, index: int) -> np.ndarray:
    return corners(record.truth_boxes[_mine(record, index)])
