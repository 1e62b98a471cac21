"""Finished runs -> the paper's tables, row by row, over seeds. Standard library alone.

Runs that differ only in detector, switches and seed form one setting: their rows may stand in one table. The paper's
own settings are one of them; a quick schedule on shapes is another, with smaller nets standing in for the paper's.
"""

from __future__ import annotations

import copy
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import Any

from msil.reporting import captions
from msil.reporting.formats import setting
from msil.reporting.paper import PaperRow, PaperTable

Result = Mapping[str, Any]

# What changes where or how fast a run happens, not what it computes (of the trainer, precision does); and what tells a
# table's rows apart.
WHERE = ("trainer", "logger", "resume", "table", "runs_dir", "run_name", "data.workers", "data.eval_batch_size",
         "data.device_transforms", "model.weights")  # fmt: skip
# A head brings its NMS threshold and, in results of 0.1, its warm-up's start; a backbone its mean and std.
ROW = ("model.head", "model.backbone", "model.msil", "model.detector", "model.detector_weights", "model.nms_thresh",
       "model.image_mean", "model.image_std", "schedule.warmup_factor")  # fmt: skip

# Where a net of the paper is not in a setting, this one of ours takes its row.
STAND_INS = {"resnet50": "resnet10", "resnet101": "resnet18"}
# How the paper is read where it is silent; other values make rows of their own.
USUAL = {"kernel_size": 3, "reduction": 16, "norm_on_bbox": True}
RECIPES = ("1x", "2x", "ms-2x")  # the paper's schedules
# What is typed for one row or one machine, by the beginnings of its keys.
_OF_A_ROW = ("experiment", "model/", "model.msil", "model.head", "model.backbone", "seed", "table", "run_name", "hydra",
             "trainer", "logger", "-")  # fmt: skip
TEST_DEV_NOTE = (
    "The paper's numbers are on test-dev, ours on the validation images (val2017 where the data is COCO). To upload: "
    "python run.py mode=test model.weights=runs/RUN/checkpoints/last.ckpt data=coco data.root=/path/to/coco "
    "data.split=test-dev2017 writes detections_test-dev2017_RUN_results.zip."
)


@dataclass(frozen=True)
class Value:
    """A number over seeds, in the unit of the results: mean, sample standard deviation (None with one), count."""

    mean: float
    std: float | None
    count: int


@dataclass(frozen=True)
class FilledRow:
    """One line of a regenerated table.

    paper: the printed row. index: its place in the table. runs: the finished runs behind it, one a seed, by seed.
    extra: settings that tell it from the usual line of the same printed row ("kernel_size=1"), else "".
    net: the backbone that ran, or None without runs.
    """

    paper: PaperRow
    index: int
    runs: tuple[Result, ...]
    extra: str = ""
    net: str | None = None

    @property
    def quoted(self) -> bool:
        """Whether the paper quotes this row from another one, so that no run of ours belongs to it."""
        return self.paper.head is None and self.paper.detector is None

    def value(self, name: str) -> Value | None:
        """Over seeds: a metric ("AP"), or a number of result.json ("parameters", "flops", "images_per_second")."""
        found = [run["metrics"][name] if name in run["metrics"] else run.get(name) for run in self.runs]
        numbers = [float(one) for one in found if one is not None]
        if not numbers:
            return None
        return Value(fmean(numbers), stdev(numbers) if len(numbers) > 1 else None, len(numbers))

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run["seed"] for run in self.runs)


@dataclass(frozen=True)
class Filled:
    """A table of the paper with our rows in it.

    setting: what all its runs share, in words. metric: the name of our number beside each of the paper's columns.
    command: what fills the missing rows, or None.
    """

    paper: PaperTable
    setting: str
    rows: tuple[FilledRow, ...]
    metric: Mapping[str, str]
    command: str | None
    notes: tuple[str, ...] = field(default=())

    @property
    def runs(self) -> list[Result]:
        return [run for row in self.rows for run in row.runs]

    @property
    def seeds(self) -> tuple[int, ...]:
        """All that any row has."""
        return tuple(sorted({seed for row in self.rows for seed in row.seeds}))

    def label(self, row: FilledRow) -> str:
        """How the paper names the row, then the settings that tell it from the usual line; a block of the user's own
        in the place of MSIL."""
        name = self.paper.label(row.paper)
        if row.runs and _has_own_block(row.runs[0]) and "MSIL" in name:
            return name.replace("MSIL", row.extra)
        return ", ".join(part for part in (name, row.extra) if part)

    def compared(self, row: FilledRow) -> FilledRow | None:
        """The row that `row` is measured against, with the same extra settings where there is one."""
        other = self.paper.compared.get(row.index)
        candidates = [one for one in self.rows if one.index == other]
        same = [one for one in candidates if one.extra == row.extra and one.net == row.net]
        return (same or candidates or [None])[0]


def settings(results: Iterable[Result]) -> list[list[Result]]:
    """The training runs of `results`, those of one setting together, the setting with most runs first."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        if captions.lookup(result, "mode") in (None, "train"):
            groups.setdefault(_key(result["config"], (*WHERE, *ROW, "seed")), []).append(result)
    return sorted(groups.values(), key=lambda group: -len(group))


def fill(table: PaperTable, group: Sequence[Result]) -> Filled:
    """`table` with the runs of one setting (see `settings`), every printed row in its place; a row with a block of the
    user's own below it, without the paper's numbers."""
    other = [run for run in group if _has_own_block(run)]
    usual = [run for run in group if not _has_own_block(run)]
    rows: list[FilledRow] = []
    for index, printed in enumerate(table.rows):
        rows += _rows(index, printed, usual) + _rows(index, replace(printed, values=()), other)
    seeds = {seed for row in rows for seed in row.seeds}
    missing = any(not (row.quoted or row.paper.ours or (row.runs and seeds <= set(row.seeds))) for row in rows)
    filled = Filled(
        table,
        setting_name(group),
        tuple(rows),
        {name: _our_metric(name, rows) for name in table.metrics},
        fill_command(table, group) if missing else None,
    )
    return replace(filled, notes=tuple(_notes(filled)))


def setting_name(group: Sequence[Result]) -> str:
    """`shapes, 385 training and 100 validation images of 128 px, schedule quick (12 epochs), 64 channels`."""
    return captions.setting_name(group) if group else "no runs yet"


def setting_title(group: Sequence[Result]) -> str:
    """`shapes, schedule quick`."""
    return captions.setting_title(group) if group else "No runs yet"


def fill_command(table: PaperTable, group: Sequence[Result]) -> str:
    """What trains the missing rows in the setting of `group`; finished runs are skipped by it.

    By the paper's recipe the experiment's file brings data and schedule; else what was typed for a run of the group.
    """
    words = ["python", "run.py", f"experiment=table{table.number}"]
    if group:
        typed = {_key_of(word): word for word in _words(group[0]["command"])[2:]}
        kept = {key: word for key, word in typed.items() if not key.startswith(_OF_A_ROW)}
        chosen = {key: str(captions.lookup(group[0], key, "name")) for key in ("data", "schedule")}
        if chosen["schedule"] in RECIPES:
            same_data = chosen["data"] == table.recipe.data
            kept = {key: word for key, word in kept.items() if key.startswith("data.") and same_data}
        else:
            kept = {key: f"{key}={name}" for key, name in chosen.items()} | kept
        seeds = sorted({run["seed"] for run in group})
        words += [*kept.values(), *([] if seeds == [0] else ["seed=" + ",".join(map(str, seeds))])]
    return shlex.join(words)


def _rows(index: int, printed: PaperRow, group: Sequence[Result]) -> list[FilledRow]:
    fitting = [run for run in group if _is(run, printed)]
    net = _net(printed, group)
    lines: dict[str, list[Result]] = {}
    for run in (run for run in fitting if _net_of(run) == net):
        unused = ("model.msil",) if printed.apply == "none" else ()  # there is no block that they could describe
        lines.setdefault(_key(run["config"], (*WHERE, "seed", *unused)), []).append(run)
    if not lines:
        return [] if printed.ours else [FilledRow(printed, index, ())]
    rows = [FilledRow(printed, index, one_a_seed(runs), _extra(runs[0]), net) for runs in lines.values()]
    rows.sort(key=lambda row: (row.extra != "", row.extra, str(row.runs[0]["run_name"])))
    return [
        replace(row, extra=f"as {row.runs[0]['run_name']}") if row.extra in [one.extra for one in rows[:i]] else row
        for i, row in enumerate(rows)
    ]


def _is(run: Result, printed: PaperRow) -> bool:
    """Whether the run has the row's head and switches, whatever its backbone."""
    block = captions.lookup(run, "model", "msil")
    own = (captions.lookup(run, "model", "head", "name"), captions.lookup(run, "model", "detector"), block["apply"])
    if own != (printed.head, printed.detector, printed.apply):
        return False
    return printed.apply == "none" or (block["align"], block["separate"]) == (printed.align, printed.separate)


def _net(printed: PaperRow, group: Sequence[Result]) -> str | None:
    """The backbone that takes the row's place in this setting."""
    if printed.detector is not None:
        return printed.detector
    there = {_net_of(run) for run in group}
    name = printed.backbone
    return name if name is None or name in there else STAND_INS.get(name, name)


def _net_of(run: Result) -> str | None:
    return captions.lookup(run, "model", "detector") or captions.lookup(run, "model", "backbone", "name")


def _has_own_block(run: Result) -> bool:
    block = captions.lookup(run, "model", "msil")
    return block["apply"] != "none" and bool(block.get("block"))


def own_block(msil: Mapping[str, Any]) -> str:
    """MyBlock, or MyBlock depth=2, of a block of the user's own."""
    options = [f"{name}={setting(value)}" for name, value in (msil.get("options") or {}).items()]
    return " ".join([msil["block"].rpartition(".")[2], *options])


def _extra(run: Result) -> str:
    """Settings of block and head beyond the usual ones, as typed."""
    model = run["config"]["model"]
    block = {} if model["msil"]["apply"] == "none" else model["msil"]
    found = {**model["head"], **block}
    words = [own_block(block)] if _has_own_block(run) else []
    words += [f"{key}={setting(found[key])}" for key, usual in USUAL.items() if found.get(key) not in (None, usual)]
    return ", ".join(words)


def one_a_seed(runs: Sequence[Result]) -> tuple[Result, ...]:
    """The runs by seed; of several with one seed the first by name."""
    by_seed: dict[int, Result] = {}
    for run in sorted(runs, key=lambda run: str(run["run_name"])):
        by_seed.setdefault(run["seed"], run)
    return tuple(by_seed[seed] for seed in sorted(by_seed))


def _our_metric(name: str, rows: Sequence[FilledRow]) -> str:
    """VOC AP where the data is VOC's; COCO's AP50 has the same IoU and takes its place elsewhere."""
    if name == "VOC_AP" and not any(name in run["metrics"] for row in rows for run in row.runs):
        return "AP50"
    return name


def _notes(filled: Filled) -> list[str]:
    table = filled.paper
    lines = list(table.notes) + [row.note for row in table.rows if row.note]
    if any(row.ours for row in table.rows):
        lines.append("Rows marked ours or torchvision's are not in the paper: they stand here once a run fills them.")
    if any(row.quoted for row in filled.rows):
        lines.append("Rows marked quoted are other papers' numbers, as this paper quotes them.")
    if table.recipe.val == "test-dev2017":
        lines.append(TEST_DEV_NOTE)
    stand_ins = dict.fromkeys(
        f"{captions.net_name(row.net)} stands in for {captions.net_name(str(row.paper.backbone))}"
        for row in filled.rows
        if row.net is not None and row.paper.detector is None and row.net != row.paper.backbone
    )
    if stand_ins:
        lines.append(f"In our rows {' and '.join(stand_ins)}.")
    if filled.runs:
        lines.append(captions.comparable(filled.runs, table))
    replaced = [f"{ours} stands beside the paper's {name}" for name, ours in filled.metric.items() if name != ours]
    if replaced and filled.runs:
        lines.append(f"The data is not VOC's, so COCO's {' and '.join(replaced)}.".replace("_", " "))
    return lines


def _key(config: Mapping[str, Any], without: Sequence[str]) -> str:
    kept = {**copy.deepcopy(dict(config)), "precision": (config.get("trainer") or {}).get("precision")}
    for path in without:
        *parents, leaf = path.split(".")
        node: Any = kept
        for parent in parents:
            node = node.get(parent) or {}
        node.pop(leaf, None)
    return json.dumps(_without_nulls(kept), sort_keys=True)


def _without_nulls(values: Any) -> Any:
    """A setting that is null counts as one that does not exist, as in a run's hash: older runs lack the newer ones."""
    if not isinstance(values, dict):
        return values
    return {key: _without_nulls(value) for key, value in values.items() if value is not None}


def _key_of(word: str) -> str:
    return word.partition("=")[0].lstrip("+")


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:  # an unclosed quote: not what a run wrote
        return command.split()
