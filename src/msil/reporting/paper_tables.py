"""The paper's tables with our rows in them, as tables of typed cells. Standard library alone."""

from __future__ import annotations

from typing import Any

from msil.reporting import tables
from msil.reporting.filling import Filled, FilledRow
from msil.reporting.groups import comparable, distinct, net_name
from msil.reporting.tables import Column, Table

TEST_DEV_NOTE = (
    "The paper's numbers are on test-dev, ours on the validation images (val2017 where the data is COCO). To upload: "
    "python run.py mode=test model.weights=runs/RUN/checkpoints/last.ckpt data=coco data.root=/path/to/coco "
    "data.split=test-dev2017 writes detections_test-dev2017_RUN_results.zip."
)
INTERVAL_NOTE = (
    "ours: mean ± standard deviation over the seeds, in percent; Δ: the difference of the means to the row named, with "
    "a 95 % interval from {samples} paired bootstrap resamples of the images (the same images for both rows) and, with "
    "several seeds, of the n seeds of each row, whose part is widened by sqrt(n / (n - 1)). An interval that holds 0 "
    "decides nothing. With one seed in either row it does not hold what another seed would give, and is too narrow; "
    "with few it may be somewhat too narrow (benchmarks/interval_coverage.py measures by how much)."
)
PRICE_NOTE = (
    "parameters, FLOPs: of the whole detector, the forward pass of one {size} image, 2 per multiply-add of "
    "convolutions and matrix products; norms are not counted. images/s: in training, on the machine of the runs; those "
    "of runs beside other work do not compare."
)


def paper_table(filled: Filled) -> Table:
    """The table in the paper's order, one line a row."""
    printed = filled.paper.number is not None
    several = len({row.net for row in filled.rows if row.net}) > 1
    columns = [
        Column("row", "row", str, right=False),
        Column("backbone", "our net" if printed else "net", str, right=False, shown=several or not printed),
        Column("seeds", "seeds", str),
    ]
    whose = " ours" if printed else ""
    for name in filled.paper.metrics:
        ours, title = filled.metric[name], name.replace("_", " ")
        columns += [Column(f"paper_{name}", f"{title} paper", tables.percent)] if printed else []
        columns += [Column(f"ours_{ours}", f"{ours.replace('_', ' ')}{whose}", tables.spread, parts=("", "_std"))]
    metric = filled.paper.metrics[0]
    columns += [Column("paper_difference", f"Δ{metric.replace('_', ' ')} paper", tables.signed)] if printed else []
    columns += [
        Column("difference", f"Δ{filled.metric[metric].replace('_', ' ')}{whose} [95 %]", tables.interval,
               parts=("", "_low", "_high")),
        Column("against", "against", str, right=False),
        Column("parameters", "parameters", tables.amount),
        Column("flops", "FLOPs", tables.amount),
        Column("images_per_second", "images/s", tables.rate),
        *(Column(name, shown=False) for name in ("setting", "runs")),
    ]  # fmt: skip
    rows = tuple(_line(filled, place) for place in range(len(filled.rows)))
    title = f"Table {filled.paper.number}" if printed else "Hosts"
    caption = f"{title}. {filled.paper.caption} Ours: {filled.setting}."
    return Table(caption, tuple(columns), rows, _notes(filled))


def _line(filled: Filled, place: int) -> dict[str, Any]:
    row, table = filled.rows[place], filled.paper
    line: dict[str, Any] = {"row": filled.label(row), "seeds": _seeds(filled, row), "setting": filled.setting}
    if row.net is not None:
        line["backbone"] = net_name(row.net)
    for column, name in enumerate(table.metrics):
        ours, printed = filled.metric[name], row.paper.value(column)
        if printed is not None:
            line[f"paper_{name}"] = round(printed / 100, 6)  # a fraction, as ours; without the noise of the division
        line[f"ours_{ours}"] = () if row.quoted else row.value(ours)
    for name in ("parameters", "flops", "images_per_second"):
        line[name], _ = row.value(name) or (None, None)
    if row.variant:
        line["against"] = table.label(row.paper)
    elif row.paper.against:
        against = table.rows[row.index + row.paper.against]
        printed, other = row.paper.value(0), against.value(0)
        if printed is not None and other is not None:
            line["paper_difference"] = round((printed - other) / 100, 6)
        line["against"] = table.label(against)
    if place in filled.differences:
        line["difference"] = filled.differences[place]
    if not row.quoted:
        line["runs"] = " ".join(str(run["run_name"]) for run in row.runs)
    return line


def _seeds(filled: Filled, row: FilledRow) -> str:
    """How many of the seeds that any row has."""
    if row.quoted or not row.runs:
        return "quoted" if row.quoted else "missing"
    count, all_seeds = len(row.runs), len({run["seed"] for run in filled.runs})
    return str(count) if count == all_seeds else f"{count} of {all_seeds}"


def _notes(filled: Filled) -> tuple[str, ...]:
    table = filled.paper
    lines = list(table.notes)
    if table.recipe.val == "test-dev2017":
        lines.append(TEST_DEV_NOTE)
    stand_ins = distinct(
        f"{net_name(row.net)} for {net_name(str(row.paper.backbone))}"
        for row in filled.rows
        if row.net is not None and row.paper.detector is None and row.net != row.paper.backbone
    )
    if stand_ins and table.number is not None:
        lines.append(f"Stand-ins in our rows: {stand_ins}.")
    if filled.runs and table.number is not None:
        lines.append(comparable(filled.runs, table))
    if filled.differences:
        lines.append(INTERVAL_NOTE.format(samples=filled.samples))
    if filled.runs:
        sizes = {tuple(run["flops_image_size"]) for run in filled.runs}
        lines.append(PRICE_NOTE.format(size="{}x{}".format(*min(sizes)) if len(sizes) == 1 else "padded"))
    if filled.command is not None:
        lines.append(f"Missing rows: {filled.command}")
    return tuple(lines)
