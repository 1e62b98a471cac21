"""The validation images of a report's section: where two detectors differ most, and what their towers look at."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from msil.checkpoints.load import load_dense_detector
from msil.detection import Detector
from msil.errors import ConfigError, DataError, WeightsError
from msil.metrics.record import EvaluationRecord, corners
from msil.reporting.comparisons import Line
from msil.reporting.drawing import draw_boxes, jpeg_bytes
from msil.reporting.energy import REGIONS, SplitEnergy, split_energy
from msil.reporting.evidence import Evidence
from msil.reporting.formats import percent, signed
from msil.reporting.gallery import gallery_pictures, image_scores, most_different, read_gallery_image
from msil.reporting.heatmaps import CELL_SIDE, MERGED, TOWERS, HeatmapRow, draw_heatmaps, tower_maps
from msil.reporting.page import Cell, Gallery, GalleryItem, Picture, ReportColumn, ReportRow, ReportTable, Section

IMAGES = 12  # of a gallery
HEATMAPS = 4  # images with heat maps
ENERGY_IMAGES = 200  # the first so many of a split
SIDE = 384


def gallery_section(id: str, plain: Line, msil: Line, evidence: Evidence) -> Section:
    """Ground truth, plain and MSIL side by side, of the first seed that both have; else a sentence why not."""
    title = "Where the two differ most"
    runs = same_seed(plain, msil)
    if runs is None:
        return Section(id, title, ("The two lines have no seed in common, so no gallery.",))
    first, second = (evidence.record(run) for run in runs)
    if first is None or second is None or not first.same_question(second):
        return Section(id, title, ("The two were not evaluated on the same images, so no gallery.",))
    root = data_root(runs[0])
    if not root.is_dir():
        return Section(id, title, (f"No gallery: {_not_here(root)}",))
    scores = [image_scores(record) for record in (first, second)]
    better, worse = (int(np.count_nonzero(sign * (scores[1] - scores[0]) > 0)) for sign in (1, -1))
    items = []
    for index in most_different(first, second, IMAGES).tolist():
        try:
            image = read_gallery_image(root, str(first.file_names[index]), _size(first, index))
        except DataError as error:
            return Section(id, title, (f"No gallery, since an image cannot be read: {error}.",))
        items.append(_item(index, image, first, second, (float(scores[0][index]), float(scores[1][index]))))
    return Section(
        id,
        title,
        (
            f"Seed {runs[0]['seed']}. An image's score is the F1 of its detections of at least 0.3 at IoU 0.5; it also "
            "moves when a detector is only surer of the same boxes, which AP does not see. MSIL is "
            f"better on {better} of {len(first.image_ids)} images and worse on {worse}; shown are the largest "
            "differences, half of them each way, so that the choice flatters neither.",
        ),
        galleries=(Gallery(f"{id}-gallery", "Ground truth, plain and MSIL", tuple(items)),) if items else (),
    )


def heatmap_section(id: str, plain: Line, msil: Line, evidence: Evidence) -> Section:
    """Figures 4 and 6 for the first seed that both have, and the shares of energy that they only suggest."""
    title = "What the towers look at (Figures 4 and 6)"
    runs = same_seed(plain, msil)
    record = None if runs is None else evidence.record(runs[0])
    if runs is None or record is None:
        return Section(id, title, ("The two lines have no seed with detections in common, so no heat maps.",))
    if not data_root(runs[0]).is_dir():
        return Section(id, title, (f"No heat maps: {_not_here(data_root(runs[0]))}",))
    try:
        detectors = {line.label: _detector(run) for line, run in zip((plain, msil), runs, strict=True)}
        samples = [_sample(record, index, data_root(runs[0])) for index in _with_boxes(record)[:ENERGY_IMAGES]]
        shown = [(index, *_sample(record, index, data_root(runs[0]))) for index in _easy_to_read(record)[:HEATMAPS]]
    except (WeightsError, DataError, ConfigError) as error:
        return Section(id, title, (f"No heat maps: {str(error).rstrip('.')}.",))
    if not samples:
        return Section(id, title, ("No image has a box, so no heat maps.",))
    energy = split_energy(detectors, samples)
    rows = [_row(record, detectors, *one) for one in shown]
    return Section(
        id,
        title,
        (
            f"Seed {runs[0]['seed']}: the mean over channels of the feature's absolute value behind the MSIL seam, at "
            "the finest level and with all levels merged. The paper shows such maps; the table says how much of a "
            "map's energy lies inside the boxes and near their border, "
            f"over {len(samples)} images with boxes, with 95 % "
            "intervals over images; another seed may give other signs.",
        ),
        tables=(energy_table(f"{id}-energy", energy),),
        pictures=tuple(_heatmaps(rows, list(detectors), level) for level in _levels(energy)),
    )


def _heatmaps(rows: Sequence[HeatmapRow], names: Sequence[str], level: str) -> Picture:
    picture = draw_heatmaps(rows, names, level)
    height, width = picture.shape[:2]
    what = "all levels merged" if level == MERGED else f"level {level}"
    return Picture(
        f"Heat maps of the two towers of {' and '.join(names)} on {len(rows)} images, {what}",
        jpeg_bytes(picture),
        "jpeg",
        width,
        height,
        f"{what[0].upper()}{what[1:]}. Blue is a map's lowest value, red its highest.",
    )


def _levels(energy: SplitEnergy) -> tuple[str, str]:
    return energy.levels[0], MERGED


def energy_table(id: str, energy: SplitEnergy) -> ReportTable:
    """Shares in percent at the finest level and merged, by region and tower: of each checkpoint, and the differences to
    the first."""
    columns = [ReportColumn("energy"), ReportColumn("tower"), ReportColumn("level")]
    columns.append(ReportColumn("uniform map", numeric=True))
    columns += [ReportColumn(name, numeric=True) for name in energy.names]
    columns += [ReportColumn(f"{name} − {energy.names[0]}", numeric=True) for name in energy.names[1:]]
    rows = []
    for (region, words), tower, level in itertools.product(REGIONS.items(), TOWERS, _levels(energy)):
        uniform = energy.uniform_mean(region)
        cells = [Cell(words), Cell(tower), Cell(level), Cell(percent(uniform), uniform)]
        for i in range(len(energy.names)):
            share = energy.mean(i, tower, level, region)
            detail = f"[{percent(share.low)}, {percent(share.high)}]"
            cells.append(Cell(percent(share.estimate), share.estimate, detail=detail))
        for i in range(1, len(energy.names)):
            share = energy.difference(i, tower, level, region)
            detail = f"[{signed(share.low)}, {signed(share.high)}]"
            cells.append(Cell(signed(share.estimate), share.estimate, detail=detail))
        rows.append(ReportRow(tuple(cells)))
    caption = f"Share of a map's energy, percent, {energy.shares.shape[1]} images, one seed."
    return ReportTable(id, caption, tuple(columns), tuple(rows))


def same_seed(plain: Line, msil: Line) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """The two runs of the lowest seed that both lines have."""
    first, second = ({run["seed"]: run for run in line.runs} for line in (plain, msil))
    common = sorted(set(first) & set(second))
    return (first[common[0]], second[common[0]]) if common else None


def data_root(run: Mapping[str, Any]) -> Path:
    return Path(run["config"]["data"]["root"])


def _not_here(root: Path) -> str:
    where = (
        "" if root.is_absolute() else " from the folder where the runs were started, since the name is relative to it"
    )
    return f"the data folder {root} is not here; make the report{where} once it is."


def _item(
    index: int, image: Tensor, first: EvaluationRecord, second: EvaluationRecord, scores: tuple[float, float]
) -> GalleryItem:
    name = str(first.file_names[index])
    labels = ("ground truth", "plain", "MSIL")
    made = gallery_pictures(index, image, first, second, side=SIDE)
    alts = ("the objects of", "what the plain detector finds on", "what the detector with MSIL finds on")
    height, width = _shown_size(image)
    pictures = tuple(
        (label, Picture(f"{alt} image {name}", data, "jpeg", width, height))
        for label, alt, data in zip(labels, alts, made, strict=True)
    )
    note = f"F1 plain {scores[0]:.2f}, MSIL {scores[1]:.2f}"
    return GalleryItem(name, pictures, note, abs(scores[1] - scores[0]))


def _shown_size(image: Tensor) -> tuple[int, int]:
    height, width = image.shape[-2:]
    scale = SIDE / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _detector(run: Mapping[str, Any]) -> Detector:
    return load_dense_detector(Path(run["folder"]) / "checkpoints" / "last.ckpt")[0]


def _sample(record: EvaluationRecord, index: int, root: Path) -> tuple[Tensor, np.ndarray]:
    """The image and its boxes, x1 y1 x2 y2, ignored ones left out."""
    image = read_gallery_image(root, str(record.file_names[index]), _size(record, index))
    boxes = record.truth_boxes[(record.truth_images == index) & ~record.truth_ignored]
    return image, corners(boxes)


def _size(record: EvaluationRecord, index: int) -> tuple[int, int]:
    height, width = record.sizes[index].tolist()
    return height, width


def _with_boxes(record: EvaluationRecord) -> list[int]:
    return np.unique(record.truth_images[~record.truth_ignored]).tolist()


def _easy_to_read(record: EvaluationRecord) -> list[int]:
    """Images with boxes, first those whose boxes cover about a tenth of them each: there a map has room to be right or
    wrong."""
    images = _with_boxes(record)
    areas = record.truth_boxes[:, 2] * record.truth_boxes[:, 3]
    covered = [
        areas[(record.truth_images == i) & ~record.truth_ignored].mean() / record.sizes[i].prod() for i in images
    ]
    order = np.argsort(np.abs(np.log10(np.maximum(covered, 1e-9)) + 1), kind="stable")
    return [images[i] for i in order]


def _row(
    record: EvaluationRecord, detectors: Mapping[str, Detector], index: int, image: Tensor, boxes: np.ndarray
) -> HeatmapRow:
    mine = (record.truth_images == index) & ~record.truth_ignored
    drawn = draw_boxes(image, boxes, record.truth_labels[mine], record.classes.tolist(), side=CELL_SIDE)
    maps: Sequence[Any] = [tower_maps(detector, image) for detector in detectors.values()]
    return HeatmapRow(image, ("", str(record.file_names[index])), drawn, boxes, maps)
