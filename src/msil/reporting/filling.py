"""Finished runs -> the rows of the paper's tables: which stand where, what each is compared with, and what is missing.

Standard library alone: the intervals come from whoever has read the detections (reporting/evidence.py).
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from msil.config import STAND_INS
from msil.reporting.groups import (
    BROUGHT,
    Result,
    block_label,
    distinct_names,
    has_own_block,
    joined,
    key,
    lookup,
    one_a_seed,
    own_block,
    setting_name,
    unusual,
    usual_width,
)
from msil.reporting.paper import PaperRow, PaperTable
from msil.reporting.tables import over_seeds

RECIPES = ("1x", "2x", "ms-2x")  # the paper's schedules
# What is typed for one row or one machine, by the beginnings of its keys.
_OF_A_ROW = ("experiment", "model/", "model.msil", "model.head", "model.backbone", "seed", "table", "run_name", "hydra",
             "trainer", "logger", "-")  # fmt: skip


@dataclass(frozen=True)
class FilledRow:
    """One line of a regenerated table.

    index: the place of the printed row. runs: the finished ones behind it, one a seed, by seed. extra: settings that
    tell it from the usual line of the same printed row, or from the one it would be compared with ("kernel_size=1").
    net: the backbone that ran. variant: a plain detector of other settings than those in which MSIL ran, deeper or
    wider: what MSIL's price buys elsewhere.
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

    def value(self, name: str) -> tuple[float, float | None] | None:
        """Over seeds: a metric ("AP"), or a number of result.json ("parameters", "flops", "images_per_second")."""
        return over_seeds(run["metrics"][name] if name in run["metrics"] else run.get(name) for run in self.runs)


@dataclass(frozen=True)
class Filled:
    """A table of the paper with our rows in it.

    setting: what all its runs share, in words. metric: the name of our number beside each of the paper's columns.
    command: what fills the missing rows, or None. differences: by a row's place, where there is one: the mean of the
        row minus that of the row it is compared with, and the ends of the 95 % interval. samples: of the bootstrap.
    """

    paper: PaperTable
    setting: str
    rows: tuple[FilledRow, ...]
    metric: Mapping[str, str]
    command: str | None
    differences: Mapping[int, tuple[float, float, float]] = field(default_factory=dict)
    samples: int = 0

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
        """The row that `row` is measured against: of the same detector but for the block, and for what the printed rows
        differ in; of a variant the plain detector that MSIL is in. None where there is no such row."""
        if row.variant:
            return next((one for one in self.rows if one.index == row.index and not one.variant), None)
        others = [one for one in self.rows if row.paper.against and one.index == row.index + row.paper.against]
        return next((one for one in others if not (row.runs and one.runs) or alike(row, one)), None)


def alike(row: FilledRow, other: FilledRow) -> bool:
    """Whether two rows with runs differ in their blocks, and in the backbones where the printed ones do, alone."""
    net = () if row.paper.backbone == other.paper.backbone else ("model.backbone", *BROUGHT)
    return key(row.runs[0], "model.msil", *net) == key(other.runs[0], "model.msil", *net)


def fill(table: PaperTable, group: Sequence[Result]) -> Filled:
    """`table` with the runs of one setting (see groups.settings), every printed row in its place; a row with a block of
    the user's own below it, without the paper's numbers."""
    rows: list[FilledRow] = []
    for index, printed in enumerate(table.rows):
        for own in (False, True):
            rows += _rows(index, replace(printed, values=()) if own else printed, table, group, own)
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
        own_net = _own_net(table, {*map(_net_of, group)})
        of_all = ("model.head.", "model.backbone.", *(["model/backbone"] if own_net else []))
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


def _rows(index: int, printed: PaperRow, table: PaperTable, group: Sequence[Result], own: bool) -> list[FilledRow]:
    """own: of blocks of the user's own alone."""
    net = _net(printed, table, group)
    lines: dict[str, list[Result]] = {}
    for run in group:
        if printed.fits(run["config"]["model"]) and _net_of(run) == net and has_own_block(run) == own:
            lines.setdefault(key(run), []).append(run)
    if not lines:
        return [] if printed.ours else [FilledRow(printed, index)]
    firsts = [runs[0] for runs in lines.values()]
    width = usual_width(group)
    enhanced = {key(run, "model.msil") for run in group if lookup(run, "model", "msil", "apply") != "none"}
    with_block = [run for run in firsts if printed.apply == "none" and key(run, "model.msil") in enhanced]
    usual = [run for run in with_block or firsts if lookup(run, "model", "channels") == width]
    rows = [] if usual or printed.ours else [FilledRow(printed, index)]
    for run, runs in zip(firsts, lines.values(), strict=True):
        other = run not in usual
        variant = other and printed.apply == "none"
        paper = replace(printed, values=(), against=0 if variant else printed.against) if other else printed
        others = usual[:1] if other else [one for one in usual if one is not run]
        extra = distinct_names(list(map(_extra, (run, *others))), [run, *others])[0]
        if lookup(run, "model", "channels") != width and not others:
            extra = joined([extra, f"channels={lookup(run, 'model', 'channels')}"])
        unlike = _unlike(run, printed, table.rows[index + printed.against], group)
        extra = extra if unlike in extra else joined([extra, unlike])
        rows.append(FilledRow(paper, index, one_a_seed(runs), extra, net, variant))
    return sorted(rows, key=lambda row: (row.variant, row.extra != "", row.extra))


def _unlike(run: Result, printed: PaperRow, other: PaperRow, group: Sequence[Result]) -> str:
    """The settings beside the block by which `run` differs from every run, as wide as it is, of the printed row that it
    belongs beside."""
    if not printed.against or printed.backbone != other.backbone:
        return ""
    own = (_net_of(run), lookup(run, "model", "channels"))
    fitting = [one for one in group if other.fits(one["config"]["model"])]
    found = [one for one in fitting if (_net_of(one), lookup(one, "model", "channels")) == own]
    if not found or key(run, "model.msil") in {key(one, "model.msil") for one in found}:
        return ""
    return distinct_names(["", ""], [run, found[0]])[0]


def _net(printed: PaperRow, table: PaperTable, group: Sequence[Result]) -> str | None:
    """The backbone that takes the row's place in this setting: the paper's, its stand-in, or where the table has one
    net and the row's head ran on one of another kind, that."""
    if printed.detector is not None:
        return printed.detector
    name = printed.backbone
    nets = {_net_of(run) for run in group if lookup(run, "model", "head", "name") == printed.head}
    stand_in = STAND_INS.get(name, name) if name else None
    if name is None or name in nets:
        return name
    return stand_in if stand_in in nets else _own_net(table, nets) or stand_in


def _own_net(table: PaperTable, nets: Collection[str | None]) -> str | None:
    """The one of `nets` in a table of one net, where it is of another kind than the paper's; of ours, of any."""
    others = set(nets).difference(() if table.number is None else (*STAND_INS, *STAND_INS.values()))
    one = len(nets) == len(others) == 1 == len({row.backbone for row in table.rows if row.backbone})
    return others.pop() if one else None


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
