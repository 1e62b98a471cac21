"""Finished runs -> the paper's tables: its numbers, ours over seeds, the difference, and the price.

Standard library alone: the intervals come from whoever has read the detections (reporting/evidence.py).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from msil.config import STAND_INS
from msil.reporting import tables
from msil.reporting.groups import (
    Result,
    block_label,
    comparable,
    distinct,
    distinct_names,
    has_own_block,
    joined,
    key,
    lookup,
    net_name,
    one_a_seed,
    own_block,
    setting_name,
    unusual,
    usual_width,
)
from msil.reporting.paper import PaperRow, PaperTable
from msil.reporting.tables import Column, Table

RECIPES = ("1x", "2x", "ms-2x")  # the paper's schedules
# What is typed for one row or one machine, by the beginnings of its keys.
_OF_A_ROW = ("experiment", "model/", "model.msil", "model.head", "model.backbone", "seed", "table", "run_name", "hydra",
             "trainer", "logger", "-")  # fmt: skip
TEST_DEV_NOTE = (
    "The paper's numbers are on test-dev, ours on the validation images (val2017 where the data is COCO). To upload: "
    "python run.py mode=test model.weights=runs/RUN/checkpoints/last.ckpt data=coco data.root=/path/to/coco "
    "data.split=test-dev2017 writes detections_test-dev2017_RUN_results.zip."
)
INTERVAL_NOTE = (
    "ours: mean ± standard deviation over the seeds, in percent; Δ: the difference of the means to the row named, with "
    "a 95 % interval from {samples} paired bootstrap resamples of the images (the same images for both rows) and, with "
    "several seeds, of the seeds of each row. An interval that holds 0 decides nothing. "
)
ONE_SEED = "With one seed it does not hold what another seed would give: it is too narrow."
FEW_SEEDS = "With {} seeds it may be somewhat too narrow (benchmarks/interval_coverage.py measures by how much)."
PRICE_NOTE = (
    "parameters, FLOPs: of the whole detector, the forward pass of one {size} image, 2 per multiply-add. images/s: in "
    "training, on the machine of the runs; those of runs beside other work do not compare."
)


class Value(NamedTuple):
    """A number over seeds, in the unit of the results: mean and sample standard deviation (None with one)."""

    mean: float
    std: float | None


class Difference(NamedTuple):
    """Fractions: the mean of a row minus that of the row it is compared with, and the ends of the 95 % interval.
    samples: resamples behind it."""

    estimate: float
    low: float
    high: float
    samples: int


@dataclass(frozen=True)
class FilledRow:
    """One line of a regenerated table.

    index: the place of the printed row. runs: the finished ones behind it, one a seed, by seed. extra: settings that
    tell it from the usual line of the same printed row ("kernel_size=1"). net: the backbone that ran.
    variant: a plain detector of other settings than those in which MSIL ran, deeper or wider: what MSIL's price buys
    elsewhere.
    """

    paper: PaperRow
    index: int
    runs: tuple[Result, ...] = ()
    extra: str = ""
    net: str | None = None
    variant: bool = False

    @property
    def quoted(self) -> bool:
        """Whether the paper quotes this row from another one, so that no run of ours belongs to it."""
        return self.paper.head is None and self.paper.detector is None

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run["seed"] for run in self.runs)

    def value(self, name: str) -> Value | None:
        """Over seeds: a metric ("AP"), or a number of result.json ("parameters", "flops", "images_per_second")."""
        found = [run["metrics"][name] if name in run["metrics"] else run.get(name) for run in self.runs]
        value = tables.over_seeds(found)
        return None if value is None else Value(*value)


@dataclass(frozen=True)
class Filled:
    """A table of the paper with our rows in it.

    setting: what all its runs share, in words. metric: the name of our number beside each of the paper's columns.
    command: what fills the missing rows, or None. differences: by a row's place, where there is one.
    """

    paper: PaperTable
    setting: str
    rows: tuple[FilledRow, ...]
    metric: Mapping[str, str]
    command: str | None
    differences: Mapping[int, Difference] = field(default_factory=dict)

    @property
    def runs(self) -> list[Result]:
        return [run for row in self.rows for run in row.runs]

    def label(self, row: FilledRow) -> str:
        """How the paper names the row, then the settings that tell it from the usual line; a block of the user's own
        in the place of MSIL."""
        name = self.paper.label(row.paper)
        if row.runs and has_own_block(row.runs[0]) and "MSIL" in name:
            return name.replace("MSIL", row.extra)
        return ", ".join(part for part in (name, row.extra) if part)

    def compared(self, row: FilledRow) -> FilledRow | None:
        """The row that `row` is measured against, with the same extra settings where there is one; a variant is
        measured against the plain detector that MSIL is."""
        if row.variant:
            return next(one for one in self.rows if one.index == row.index)
        other = row.index + row.paper.against
        candidates = [one for one in self.rows if row.paper.against and one.index == other]
        same = [one for one in candidates if one.extra == row.extra and one.net == row.net]
        return (same or candidates or [None])[0]


def fill(table: PaperTable, group: Sequence[Result]) -> Filled:
    """`table` with the runs of one setting (see groups.settings), every printed row in its place; a row with a block of
    the user's own below it, without the paper's numbers."""
    other = [run for run in group if has_own_block(run)]
    usual = [run for run in group if not has_own_block(run)]
    rows: list[FilledRow] = []
    for index, printed in enumerate(table.rows):
        rows += _rows(index, printed, table, usual) + _rows(index, replace(printed, values=()), table, other)
    seeds = {seed for row in rows for seed in row.seeds}
    missing = any(not (row.quoted or row.paper.ours or (row.runs and seeds <= set(row.seeds))) for row in rows)
    return Filled(
        table,
        setting_name(group) if group else "no runs yet",
        tuple(rows),
        {name: _our_metric(name, rows) for name in table.metrics},
        fill_command(table, group) if missing else None,
    )


def fill_command(table: PaperTable, group: Sequence[Result]) -> str:
    """What trains the missing rows in the setting of `group`; finished runs are skipped by it.

    By the paper's recipe the experiment's file brings data and schedule; else what was typed for a run of the group.
    """
    words = ["python", "run.py", f"experiment={table.name}"]
    if group:
        typed = [_typed(run) for run in group]
        # Of all rows is what every run has, but the choices that the experiment sweeps.
        of_all = ("model.head.", "model.backbone.", *(["model/backbone"] if _own_net(table, group) else []))
        kept = {name: word for name, word in typed[0].items() if not name.startswith(_OF_A_ROW)
                or (name.startswith(of_all) and all(word == other.get(name) for other in typed))}  # fmt: skip
        chosen = {name: str(lookup(group[0], name, "name")) for name in ("data", "schedule")}
        if chosen["schedule"] in RECIPES:
            same_data = chosen["data"] == table.recipe.data
            kept = {name: word for name, word in kept.items() if name.startswith("data.") and same_data}
        else:
            kept = {name: f"{name}={value}" for name, value in chosen.items()} | kept
        seeds = sorted({run["seed"] for run in group})
        words += [*kept.values(), *([] if seeds == [0] else ["seed=" + ",".join(map(str, seeds))])]
    return shlex.join(words)


def _typed(run: Result) -> dict[str, str]:
    """The words of a run's command by their names."""
    try:
        words = shlex.split(run["command"])[2:]
    except ValueError:  # an unclosed quote: not what a run wrote
        words = []
    return {word.partition("=")[0].lstrip("+"): word for word in words}


def paper_table(filled: Filled) -> Table:
    """The table in the paper's order, one line a row."""
    columns = [
        Column("row", "row", str, right=False),
        Column("backbone", "our net", str, right=False, shown=len({row.net for row in filled.rows if row.net}) > 1),
        Column("seeds", "seeds", str),
    ]
    printed = filled.paper.number is not None
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
    caption = (
        f"{filled.paper.name.replace('table', 'table ').capitalize()}. {filled.paper.caption} Ours: {filled.setting}."
    )
    return Table(caption, tuple(columns), rows, _notes(filled))


def _rows(index: int, printed: PaperRow, table: PaperTable, group: Sequence[Result]) -> list[FilledRow]:
    net = _net(printed, table, group)
    lines: dict[str, list[Result]] = {}
    for run in group:
        if printed.fits(run["config"]["model"]) and _net_of(run) == net:
            unused = ("model.msil",) if printed.apply == "none" else ()  # there is no block that they could describe
            lines.setdefault(key(run, *unused), []).append(run)
    if not lines:
        return [] if printed.ours else [FilledRow(printed, index)]
    firsts = [runs[0] for runs in lines.values()]
    enhanced = {key(run, "model.msil") for run in group if lookup(run, "model", "msil", "apply") != "none"}
    with_block = [run for run in firsts if printed.apply == "none" and key(run, "model.msil") in enhanced]
    usual = [run for run in with_block or firsts if lookup(run, "model", "channels") == usual_width(group)]
    rows = [] if usual or printed.ours else [FilledRow(printed, index)]
    for run, runs in zip(firsts, lines.values(), strict=True):
        variant = run not in usual
        paper = replace(printed, values=(), against=0) if variant else printed
        others = usual[:1] if variant else [one for one in usual if one is not run]
        extra = distinct_names(list(map(_extra, (run, *others))), [run, *others])[0]
        if not usual:
            extra = joined([extra, f"channels={lookup(run, 'model', 'channels')}"])
        rows.append(FilledRow(paper, index, one_a_seed(runs), extra, net, variant))
    return sorted(rows, key=lambda row: (row.variant, row.extra != "", row.extra))


def _net(printed: PaperRow, table: PaperTable, group: Sequence[Result]) -> str | None:
    """The backbone that takes the row's place in this setting: the paper's, its stand-in, or where the table has one
    net and the setting one of another kind, that."""
    if printed.detector is not None:
        return printed.detector
    name = printed.backbone
    if name is None or name in map(_net_of, group):
        return name
    return _own_net(table, group) or STAND_INS.get(name, name)


def _own_net(table: PaperTable, group: Sequence[Result]) -> str | None:
    nets = set(map(_net_of, group))
    own = nets.difference(STAND_INS, STAND_INS.values())
    one = len(nets) == len(own) == 1 and len({row.backbone for row in table.rows if row.backbone}) == 1
    return own.pop() if one else None


def _net_of(run: Result) -> str | None:
    return lookup(run, "model", "detector") or lookup(run, "model", "backbone", "name")


def _extra(run: Result) -> str:
    """Settings of block and head beyond the usual ones, as typed."""
    block = lookup(run, "model", "msil")
    words = [own_block(block)] if has_own_block(run) else [] if block_label(run) == "plain" else unusual(block)
    if lookup(run, "model", "head", "norm_on_bbox") is False:
        words.append("norm_on_bbox=false")
    return ", ".join(words)


def _our_metric(name: str, rows: Sequence[FilledRow]) -> str:
    """VOC AP where the data is VOC's; COCO's AP50 has the same IoU and takes its place elsewhere."""
    if name == "VOC_AP" and not any(name in run["metrics"] for row in rows for run in row.runs):
        return "AP50"
    return name


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
        value = row.value(name)
        line[name] = None if value is None else value.mean
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
    if stand_ins:
        lines.append(f"Stand-ins in our rows: {stand_ins}.")
    if filled.runs and table.number is not None:
        lines.append(comparable(filled.runs, table))
    if filled.differences:
        seeds = min(len(row.runs) for row in filled.rows if row.runs)
        samples = next(iter(filled.differences.values())).samples
        lines.append(INTERVAL_NOTE.format(samples=samples) + (ONE_SEED if seeds == 1 else FEW_SEEDS.format(seeds)))
    if filled.runs:
        sizes = {tuple(run["flops_image_size"]) for run in filled.runs}
        lines.append(PRICE_NOTE.format(size="{}x{}".format(*min(sizes)) if len(sizes) == 1 else "padded"))
    if filled.command is not None:
        lines.append(f"Missing rows: {filled.command}")
    return tuple(lines)
