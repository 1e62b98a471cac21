"""What the runs of one detector show, as the charts of a report's section."""

from __future__ import annotations

import csv
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from msil.metrics.breakdown import breakdown, confusion
from msil.metrics.precision import per_class, precision_recall, scores
from msil.metrics.record import EvaluationRecord
from msil.reporting import charts, curves, matrix
from msil.reporting.comparisons import DetectorLines, Line
from msil.reporting.evidence import Evidence
from msil.reporting.page import Picture, Section
from msil.reporting.paper_tables import Regenerated

SIZES = ("APs", "APm", "APl")
AREAS = {"APs": (0.0, 32.0**2), "APm": (32.0**2, 96.0**2), "APl": (96.0**2, np.inf)}  # COCO's, in px^2


def difference_picture(tables: Sequence[Regenerated]) -> Picture | None:
    """Every difference of these tables with its interval, or None where there is none."""
    found = []
    for one in tables:
        metric = one.filled.metric[one.filled.paper.metrics[0]]
        what = f"Table {one.number}" + ("" if metric == "AP" else f" ({metric.replace('_', ' ')})")
        for place, difference in one.differences.items():
            name = f"{what}: {one.filled.label(one.filled.rows[place])}"
            found.append((name, difference.estimate, difference.low, difference.high))
    if not found:
        return None
    names, estimates, lows, highs = zip(*found, strict=True)
    return svg_picture(
        charts.difference_plot(names, estimates, lows, highs),
        "Differences of AP to the row each is compared with, with 95 % intervals: "
        + "; ".join(f"{name} {100 * one:+.1f}" for name, one in zip(names, estimates, strict=True)),
    )


def detector_section(id: str, detector: DetectorLines, evidence: Evidence) -> Section:
    """Learning curves of all its lines, then the plain detector against MSIL (or whichever line there is)."""
    pictures = [*_training(detector)]
    pair = detector.pair() or detector.lines[:2]
    with_records = [line for line in pair if all(evidence.record(run) is not None for run in line.runs)]
    paragraphs = []
    if with_records:
        pictures += _detections(with_records, evidence)
        paragraphs.append(_what_is_compared(with_records))
    else:
        paragraphs.append("These runs kept no detections (evaluation.npz), so there are no charts of them.")
    return Section(id, detector.name, tuple(paragraphs), pictures=tuple(pictures))


def svg_picture(svg: bytes, alt: str, caption: str = "") -> Picture:
    """An SVG at its own size: its viewBox is in points, of which 72 are 96 CSS pixels."""
    box = re.search(rb'viewBox="0 0 ([0-9.]+) ([0-9.]+)"', svg)
    assert box is not None
    width, height = (round(float(side) * 4 / 3) for side in box.groups())
    return Picture(alt, svg, "svg", width, height, caption)


def _what_is_compared(lines: Sequence[Line]) -> str:
    names = " and ".join(f"{line.label} ({_seeds(line)})" for line in lines)
    return (
        f"Charts of {names}; curves and bars are means over the seeds. AP per class and size are COCO's; precision and "
        "recall, errors and the confusion matrix are at IoU 0.5. Types of errors, and what each costs in AP50, are "
        "TIDE's (Bolya et al. 2020, arXiv 2008.08115): Cls a wrong class, Loc a poor box (IoU 0.1 to 0.5), Both, Dupe "
        "a second detection of an object, Bkg no object, Miss an object that nothing found."
    )


def _seeds(line: Line) -> str:
    return f"{len(line.runs)} seed{'' if len(line.runs) == 1 else 's'}"


def _training(detector: DetectorLines) -> list[Picture]:
    logs = {line.label: [log for run in line.runs if (log := _log(run)) is not None] for line in detector.lines}
    ap = {name: [_columns(log, "epoch", "AP") for log in found] for name, found in logs.items() if found}
    loss = {name: [_columns(log, "step", "loss") for log in found] for name, found in logs.items() if found}
    ap = {name: [(epochs + 1, values) for epochs, values in found] for name, found in ap.items()}
    if not ap:
        return []
    names = ", ".join(ap)
    return [
        svg_picture(curves.learning_curves(ap), f"Validation AP over the epochs of {names}"),
        svg_picture(curves.loss_curves(loss), f"Training loss over the steps of {names}"),
    ]


def _detections(lines: Sequence[Line], evidence: Evidence) -> list[Picture]:
    records = {line.label: [_record(run, evidence) for run in line.runs] for line in lines}
    judged = {line.label: [evidence.matches(run, "AP") for run in line.runs] for line in lines}
    first = next(iter(records.values()))[0]
    classes = first.classes.tolist()
    by_class = {name: np.stack([per_class(one)["AP"] for one in found]) for name, found in judged.items()}  # pyright: ignore
    means = {name: _mean(values) for name, values in by_class.items()}
    spreads = {name: values.std(axis=0, ddof=1) for name, values in by_class.items() if len(values) > 1}
    recalls = precision_recall(next(iter(judged.values()))[0])[0]  # pyright: ignore[reportArgumentType]
    precisions = {
        name: _mean(np.stack([precision_recall(one)[1] for one in found]))  # pyright: ignore[reportArgumentType]
        for name, found in judged.items()
    }
    sizes = {name: _sizes(found) for name, found in judged.items()}
    errors = {name: _errors(found) for name, found in records.items()}
    pictures = [
        svg_picture(charts.class_bars(classes, means, spreads=spreads), f"AP of each class: {_told(means, classes)}"),
        svg_picture(
            curves.precision_recall(recalls, {name: _mean(values) for name, values in precisions.items()}),
            f"Precision over recall at IoU 0.5, mean over the classes, of {', '.join(precisions)}",
        ),
        svg_picture(
            curves.precision_recall_classes(recalls, classes, precisions), "Precision over recall at IoU 0.5, by class"
        ),
        svg_picture(charts.size_bars(sizes, counts=_size_counts(first)), f"AP by size of object: {_told_names(sizes)}"),
        svg_picture(charts.error_bars(errors), f"AP50 that each type of error costs: {_told_names(errors)}"),
    ]
    for name, found in records.items():
        counts = np.sum([confusion(record) for record in found], axis=0)
        title = f"Confusion of {name}" + (f" (sum of {len(found)} seeds)" if len(found) > 1 else "")
        pictures.append(
            svg_picture(
                matrix.confusion_matrix(classes, counts, title=title),
                f"{title}: rows are the true classes and background, columns the predicted ones and missed",
            )
        )
    return pictures


def _record(run: Mapping[str, Any], evidence: Evidence) -> EvaluationRecord:
    record = evidence.record(run)
    assert record is not None
    return record


def _mean(values: np.ndarray) -> np.ndarray:
    """Over the first axis, NaN (a class without objects) left out; NaN where nothing is left."""
    counted = ~np.isnan(values)
    total = np.where(counted, values, 0.0).sum(axis=0)
    return np.divide(total, counted.sum(axis=0), out=np.full_like(total, np.nan), where=counted.any(axis=0))


def _sizes(judged: Sequence[Any]) -> dict[str, float]:
    found = [scores(one, metrics=SIZES) for one in judged]
    return {name: float(_mean(np.array([float(one[name]) for one in found]))) for name in SIZES}


def _size_counts(record: EvaluationRecord) -> dict[str, int]:
    areas = record.truth_areas[~record.truth_ignored]
    return {name: int(((areas >= low) & (areas < high)).sum()) for name, (low, high) in AREAS.items()}


def _errors(records: Sequence[EvaluationRecord]) -> dict[str, float]:
    found = [breakdown(record).costs for record in records]
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def _told(rows: Mapping[str, np.ndarray], classes: Sequence[str]) -> str:
    """The numbers of a chart in words, for those who do not see it; of many classes only how many."""
    if len(classes) > 12:
        return f"{', '.join(rows)}, {len(classes)} classes"
    return "; ".join(
        f"{name}: " + ", ".join(f"{label} {100 * one:.1f}" for label, one in zip(classes, values, strict=True))
        for name, values in rows.items()
    )


def _told_names(rows: Mapping[str, Mapping[str, float]]) -> str:
    return "; ".join(
        f"{name}: " + ", ".join(f"{kind} {100 * value:.1f}" for kind, value in values.items())
        for name, values in rows.items()
    )


def _log(run: Mapping[str, Any]) -> list[dict[str, str]] | None:
    """The rows of the run's metrics.csv; None where there is none, and, with a warning, where it is damaged."""
    path = Path(run["folder"]) / "metrics.csv"
    if not path.exists():
        return None
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for x, y in (("epoch", "AP"), ("step", "loss")):
            _columns(rows, x, y)
    except (ValueError, csv.Error) as error:  # ValueError: text that is no number, bytes that are no text
        warnings.warn(f"{path} is damaged ({error}): that run has no curves.", stacklevel=2)
        return None
    return rows


def _columns(rows: Sequence[Mapping[str, str]], x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(float(row[x]), float(row[y])) for row in rows if row.get(x) and row.get(y)]
    points = np.array(pairs, dtype=float).reshape(-1, 2)
    points = points[np.isfinite(points).all(axis=1)]
    return points[:, 0], points[:, 1]
