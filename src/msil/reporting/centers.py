"""Figure 5: where the centres of a class's objects lie, as a picture and as a table.

The paper cuts the image into upper left, lower left, upper right and lower right, and counts the object centres of
COCO's training set in each. A centre is the middle of the box: boxes, not masks, are what its detectors learn from.
"""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from msil.errors import ConfigError
from msil.metrics.centers import QUADRANTS, Centers, object_centers, shown_classes
from msil.metrics.record import GroundTruth
from msil.reporting.canvas import clean
from msil.reporting.formats import csv_text, percent
from msil.runs import write_bytes

COLUMNS = 3
NAME_COLUMNS = 22  # letters of a class's name before it is cut
DOTS = 1000  # drawn of a class; more would hide the colours and say nothing new
_COLORS = ListedColormap(colormaps["RdBu_r"](np.linspace(0.2, 0.8, 256)))  # light enough for dots to be seen
_SCALE = Normalize(0, 0.5)  # white is a quarter, as centres without a preferred place would have it
_LEFT_TOP = ((0, 0), (0.5, 0), (0, 0.5), (0.5, 0.5))  # of QUADRANTS


def draw_centers(centers: Mapping[str, Centers], names: Sequence[str]) -> bytes:
    """A PNG with a small picture for each name, three a row: the image cut in four, each part coloured by its share of
    the class's centres with that share on it, and the centres as dots (of more than 1000 every so many-th).

    Raises ConfigError for a name that is not among the classes, or without names.
    """
    if not names:
        raise ConfigError("the data has no object, so there are no centres to draw: name another split.")
    check_classes(centers, names)
    rows = -(-len(names) // COLUMNS)
    columns = min(COLUMNS, len(names))
    figure = Figure(figsize=(2.75 * columns + 1.3, max(2.4 * rows, 2.8)), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    for axes, name in zip(panels, names, strict=False):
        _draw_class(axes, name, centers[name])
    colors = ScalarMappable(_SCALE, _COLORS)
    bar = figure.colorbar(colors, ax=panels.tolist(), shrink=0.8 if rows < 3 else 0.5, aspect=20)
    bar.set_ticks([0, 0.25, 0.5], labels=["0 %", "25 %", "50 % or more"])
    bar.set_label("share of a class's centres")
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a name is drawn as far as the font goes
        canvas.print_png(content)
    return content.getvalue()


def centers_csv(centers: Mapping[str, Centers]) -> str:
    """Every class: its name, number of objects, and their shares by quadrant as fractions, empty without objects."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", "objects", *(name.replace(" ", "_") for name in QUADRANTS)])
    for name, found in centers.items():
        shares = [f"{share:.4f}" for share in found.shares] if len(found.points) else [""] * len(QUADRANTS)
        writer.writerow([csv_text(name), len(found.points), *shares])
    return text.getvalue()


def write_centers(truth: GroundTruth, out: str | Path, names: Sequence[str] | None = None) -> list[str]:
    """Write the picture and, beside it with the ending .csv, the table of all classes; returns what to print.

    truth: a split's annotations. out: a .png. names: of the classes to draw; None: see `shown_classes`.
    Raises ConfigError for an unknown class, another ending, no object, or a place that cannot be written to.
    """
    out = Path(out)
    if out.suffix.lower() != ".png":
        raise ConfigError(f"the picture is a PNG, but {out} does not end in .png: name it so.")
    centers = object_centers(truth)
    shown = shown_classes(centers) if names is None else tuple(names)
    picture = draw_centers(centers, shown)
    try:
        write_bytes(out, picture)
        write_bytes(out.with_suffix(".csv"), centers_csv(centers).encode())
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror or error}): choose another place.") from error
    objects = sum(len(found.points) for found in centers.values())
    images = len(truth.image_ids)
    return [
        f"{out}: classes {', '.join(shown)}",
        f"{out.with_suffix('.csv')}: of all classes, {len(centers)}; {objects:,} objects, {images:,} images",
    ]


def check_classes(centers: Mapping[str, Centers], names: Sequence[str]) -> None:
    """Raises ConfigError for a name that is not among the classes."""
    for name in names:
        if name not in centers:
            known = ", ".join(list(centers)[:10]) + (f" and {len(centers) - 10} more" if len(centers) > 10 else "")
            raise ConfigError(f"the data has no class {name!r}; its classes are {known}: name some of those.")


def _draw_class(axes: Axes, name: str, found: Centers) -> None:
    count = len(found.points)
    axes.set_title(f"{clean(name, NAME_COLUMNS)}  ({count:,})", fontsize=10, parse_math=False)
    axes.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[], aspect=0.75)
    if not count:
        axes.text(0.5, 0.5, "no objects", ha="center", va="center", color="gray")
        return
    for (left, top), share in zip(_LEFT_TOP, found.shares, strict=True):
        axes.add_patch(Rectangle((left, top), 0.5, 0.5, facecolor=_COLORS(_SCALE(share)), edgecolor="none"))
    dots = found.points[:: -(-count // DOTS)]
    axes.scatter(dots[:, 0], dots[:, 1], s=5, color="black", alpha=0.35 if len(dots) > 200 else 0.6, linewidths=0)
    axes.axvline(0.5, color="black", linewidth=1)
    axes.axhline(0.5, color="black", linewidth=1)
    for (left, top), share in zip(_LEFT_TOP, found.shares, strict=True):
        axes.text(
            left + 0.25, top + 0.25, f"{percent(share)} %", ha="center", va="center", fontsize=10, fontweight="bold",
            bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
        )  # fmt: skip
