"""Figure 5: where the centres of a class's objects lie, as a picture and as a table.

The paper cuts the image into upper left, lower left, upper right and lower right, and counts the object centres of
COCO's training set in each. A centre is the middle of the box: boxes, not masks, are what its detectors learn from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from msil.errors import ConfigError, listed
from msil.metrics.centers import QUADRANTS, object_centers, quadrant_shares, shown_classes
from msil.metrics.record import AnnotatedSplit
from msil.reporting.figures.pictures import plain, png
from msil.reporting.tables import Column, Table, percent, to_csv
from msil.runs import check_own, write_bytes

COLUMNS = 3
DOTS = 1000  # of a class
_SHARES = ListedColormap(colormaps["RdBu_r"](np.linspace(0.2, 0.8, 256)))  # light enough for dots to be seen
_SCALE = Normalize(0, 0.5)  # white is a quarter, as centres without a preferred place would have it


def draw_centers(centers: Mapping[str, np.ndarray], names: Sequence[str]) -> bytes:
    """Figure 5 as a PNG: for each name the image cut in four, each part coloured by its share of the class's object
    centres with that share on it, and the centres as dots (of more than 1000 every so many-th).

    Raises ConfigError for a name that is not among the classes, or without names.
    """
    if not names:
        raise ConfigError("the data has no object, so there are no centres to draw: name another split.")
    unknown = [name for name in names if name not in centers]
    if unknown:
        known = listed(list(centers), 10)
        raise ConfigError(f"the data has no class {unknown[0]!r}; its classes are {known}: name some of those.")
    rows, columns = -(-len(names) // COLUMNS), min(COLUMNS, len(names))
    figure = Figure(figsize=(2.75 * columns + 1.3, max(2.4 * rows, 2.8)), dpi=110, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    for axes, name in zip(panels, names, strict=False):
        _draw_class(axes, name, centers[name])
    bar = figure.colorbar(ScalarMappable(_SCALE, _SHARES), ax=panels.tolist(), shrink=0.8, aspect=20)
    bar.set_ticks([0, 0.25, 0.5], labels=["0 %", "25 %", "50 % or more"])
    bar.set_label("share of a class's centres")
    return png(figure)


def centers_table(centers: Mapping[str, np.ndarray]) -> Table:
    """Every class: its name, number of objects, and their shares by quadrant as fractions, empty without objects."""
    columns = [Column("class", "class", str, right=False), Column("objects", "objects", "{:,}".format)]
    columns += [Column(name.replace(" ", "_"), name, percent) for name in QUADRANTS]
    rows = [
        {"class": name, "objects": len(points)}
        | {place.replace(" ", "_"): float(one) for place, one in zip(QUADRANTS, quadrant_shares(points), strict=True)}
        for name, points in centers.items()
    ]
    return Table("Where the centres of each class's objects lie, percent.", tuple(columns), tuple(rows))


def write_centers(truth: AnnotatedSplit, out: str | Path, names: Sequence[str] | None = None) -> list[str]:
    """Write Figure 5 and, beside it with the ending .csv, the table of all classes; returns what to print.

    truth: a split's annotations. out: a .png. names: of the classes to draw; None: see `shown_classes`.
    Raises ConfigError for an unknown class, another ending, no object, a place that cannot be written to,
    or files of others there.
    """
    out = Path(out)
    if out.suffix.lower() != ".png":
        raise ConfigError(f"the picture is a PNG, but {out} does not end in .png: name it so.")
    check_own(out, out.with_suffix(".csv"))
    centers = object_centers(truth)
    shown = shown_classes(centers) if names is None else tuple(names)
    picture = draw_centers(centers, shown)
    try:
        write_bytes(out, picture)
        write_bytes(out.with_suffix(".csv"), to_csv(centers_table(centers)).encode())
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror or error}): choose another place.") from error
    objects, images = sum(map(len, centers.values())), len(truth.image_ids)
    return [
        f"{out}: classes {', '.join(shown)}",
        f"{out.with_suffix('.csv')}: of all classes, {len(centers)}; {objects:,} objects, {images:,} images",
    ]


def _draw_class(axes: Axes, name: str, points: np.ndarray) -> None:
    count = len(points)
    axes.set_title(f"{plain(name)}  ({count:,})", fontsize=10)
    axes.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[], aspect=0.75)
    if not count:
        axes.text(0.5, 0.5, "no objects", ha="center", va="center", color="gray")
        return
    dots = points[:: -(-count // DOTS)]
    axes.scatter(dots[:, 0], dots[:, 1], s=5, color="black", alpha=0.35 if len(dots) > 200 else 0.6, linewidths=0)
    for left, top, share in zip(
        (0, 0.5, 0, 0.5), (0, 0, 0.5, 0.5), quadrant_shares(points), strict=True
    ):  # as QUADRANTS
        axes.add_patch(Rectangle((left, top), 0.5, 0.5, facecolor=_SHARES(_SCALE(share)), edgecolor="black", zorder=0))
        axes.text(
            left + 0.25, top + 0.25, f"{percent(share)} %", ha="center", va="center", fontsize=10, fontweight="bold",
            bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
        )  # fmt: skip
