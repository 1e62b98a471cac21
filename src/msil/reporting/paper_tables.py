"""A regenerated table as rows and columns: the paper's numbers, ours over seeds, the difference, and the price.

Standard library alone: the intervals come from whoever has read the detections (reporting/evidence.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from msil.reporting import captions, formats
from msil.reporting.regenerated import Filled, FilledRow, Value
from msil.reporting.tables import Column, Table

INTERVAL_NOTE = (
    "ours: mean ± standard deviation over the seeds, in percent; Δ: the difference of the means to the row named, with "
    "a 95 % interval from {samples} paired bootstrap resamples of the images (the same images for both rows) and, with "
    "several seeds, of the seeds of each row. An interval that holds 0 decides nothing."
)
ONE_SEED_NOTE = "With one seed an interval knows nothing of what another seed would give: it is too narrow."
FEW_SEEDS_NOTE = (
    "{count} seeds are few: the interval may be somewhat too narrow (benchmarks/interval_coverage.py says how much)."
)
PRICE_NOTE = (
    "parameters, FLOPs: of the whole detector, the forward pass of one {size} image, 2 per multiply-add. images/s: in "
    "training, on the machine of the runs; those of runs beside other work do not compare."
)


@dataclass(frozen=True)
class Difference:
    """Fractions: the mean of a row minus that of the row it is compared with, and the ends of the 95 % interval.
    samples: resamples behind it."""

    estimate: float
    low: float
    high: float
    samples: int


@dataclass(frozen=True)
class Regenerated:
    """A filled table with its differences, by a row's place in filled.rows."""

    filled: Filled
    differences: Mapping[int, Difference]

    @property
    def number(self) -> int:
        return self.filled.paper.number

    @property
    def table(self) -> Table:
        return paper_table(self.filled, self.differences)

    @property
    def reading(self) -> tuple[str, ...]:
        return reading_notes(self.filled, self.differences)


def paper_table(filled: Filled, differences: Mapping[int, Difference]) -> Table:
    """differences: by a row's place in filled.rows; a row without one has no comparison, or no runs for it."""
    columns = [
        Column("row", "row", str, right=False),
        Column("backbone", "our net", str, right=False, shown=len({row.net for row in filled.rows if row.net}) > 1),
        Column("seeds", "seeds", str),
    ]
    for name in filled.paper.metrics:
        ours, title = filled.metric[name], name.replace("_", " ")
        columns += [
            Column(f"paper_{name}", f"{title} paper", formats.percent),
            Column(f"{name}_text", f"{ours.replace('_', ' ')} ours", str, written=False),
            Column(f"ours_{ours}", "", shown=False),
            Column(f"ours_{ours}_std", "", shown=False),
        ]
    metric = filled.paper.metrics[0]
    title = filled.metric[metric].replace("_", " ")
    columns += [
        Column("paper_difference", f"Δ{metric.replace('_', ' ')} paper", formats.signed),
        Column("difference_text", f"Δ{title} ours [95 %]", str, written=False),
        Column("against", "against", str, right=False, shown=len(set(filled.paper.compared.values())) > 1),
        *(Column(name, "", shown=False) for name in ("difference", "difference_low", "difference_high")),
        Column("parameters", "parameters", formats.amount),
        Column("flops", "FLOPs", formats.amount),
        Column("images_per_second", "images/s", formats.rate),
        *(Column(name, "", shown=False) for name in ("setting", "head", "apply", "align", "separate", "runs")),
    ]
    rows = tuple(_line(filled, place, differences.get(place)) for place in range(len(filled.rows)))
    caption = f"{title_of(filled)} Ours: {filled.setting}."
    return Table(caption, tuple(columns), rows, _notes(filled, differences))


def title_of(filled: Filled) -> str:
    """`Table 2. ` and the paper's caption."""
    return f"Table {filled.paper.number}. {filled.paper.caption}"


def _line(filled: Filled, place: int, difference: Difference | None) -> dict[str, Any]:
    row, table = filled.rows[place], filled.paper
    line: dict[str, Any] = {"row": filled.label(row), "seeds": _seeds(filled, row), "setting": filled.setting}
    if row.net is not None:
        line["backbone"] = captions.net_name(row.net)
    for column, name in enumerate(table.metrics):
        ours, printed = filled.metric[name], row.paper.value(column)
        value = row.value(ours)
        if printed is not None:
            line[f"paper_{name}"] = round(printed / 100, 6)  # a fraction, as ours; without the noise of the division
        line[f"{name}_text"] = _text(value, row)
        if value is not None:
            line |= {f"ours_{ours}": value.mean, f"ours_{ours}_std": value.std}
    for name in ("parameters", "flops", "images_per_second"):
        value = row.value(name)
        line[name] = None if value is None else value.mean
    compared = table.compared.get(row.index)
    if compared is not None:
        printed, other = row.paper.value(0), table.rows[compared].value(0)
        if printed is not None and other is not None:
            line["paper_difference"] = round((printed - other) / 100, 6)
        line["against"] = table.label(table.rows[compared])
    if difference is not None:
        line["difference_text"] = difference_text(difference)
        line |= {"difference": difference.estimate, "difference_low": difference.low}
        line["difference_high"] = difference.high
    if not row.quoted:
        line |= {"head": row.paper.head or row.paper.detector, "apply": row.paper.apply}
        line |= {"align": row.paper.align, "separate": row.paper.separate} if row.paper.apply != "none" else {}
        line["runs"] = " ".join(str(run["run_name"]) for run in row.runs)
    return line


def difference_text(difference: Difference) -> str:
    """`+1.2 [-0.3, +2.6]`, in percent."""
    estimate, low, high = (formats.signed(one) for one in (difference.estimate, difference.low, difference.high))
    return f"{estimate} [{low}, {high}]"


def _text(value: Value | None, row: FilledRow) -> str:
    if value is None:
        return "" if row.quoted else formats.MISSING
    mean = formats.percent(value.mean)
    return mean if value.std is None else f"{mean} ± {formats.percent(value.std)}"


def _seeds(filled: Filled, row: FilledRow) -> str:
    """How many of the seeds that any row has."""
    if row.quoted:
        return "quoted"
    if not row.runs:
        return "missing"
    count, all_seeds = len(row.runs), len(filled.seeds)
    return str(count) if count == all_seeds else f"{count} of {all_seeds}"


def reading_notes(filled: Filled, differences: Mapping[int, Difference]) -> tuple[str, ...]:
    """How the numbers of a table with runs are to be read; the same for all tables of like runs."""
    if not filled.runs:
        return ()
    lines = []
    if differences:
        lines.append(INTERVAL_NOTE.format(samples=max(one.samples for one in differences.values())))
        fewest = min(len(row.runs) for row in filled.rows if row.runs)
        lines.append(ONE_SEED_NOTE if fewest == 1 else FEW_SEEDS_NOTE.format(count=fewest))
    sizes = {tuple(run["flops_image_size"]) for run in filled.runs}
    height, width = min(sizes)
    lines.append(PRICE_NOTE.format(size=f"{height}x{width}" if len(sizes) == 1 else "padded"))
    return tuple(lines)


def _notes(filled: Filled, differences: Mapping[int, Difference]) -> tuple[str, ...]:
    missing = () if filled.command is None else (f"Missing rows: {filled.command}",)
    return (*filled.notes, *_against(filled), *reading_notes(filled, differences), *missing)


def _against(filled: Filled) -> tuple[str, ...]:
    """The row that all others are compared with, where there is one such row."""
    table = filled.paper
    others = set(table.compared.values())
    return (f"Δ: against the row {table.label(table.rows[others.pop()])!r}.",) if len(others) == 1 else ()
