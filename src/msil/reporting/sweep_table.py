"""The table of a sweep and the last lines of a single run. Standard library alone.

Parameters and FLOPs stand beside AP, so that a gain is read next to its price.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msil.errors import counted
from msil.reporting import tables
from msil.reporting.groups import Result, detector_name, distinct, joined, lookup, own_score, setting_name
from msil.reporting.tables import AP_NAMES, Column, Table
from msil.runs import data_title, net_alone

# package.module.Class by its last name
FORMS = {
    "model.head.name": lambda name: (name or tables.MISSING).rpartition(".")[2],
    "model.detector": lambda name: name or tables.MISSING,
    "model.backbone.name": lambda name: net_alone(name or tables.MISSING),
    "model.msil.block": lambda name: name.rpartition(".")[2] if name else "MSIL",
}
MOST_CLASSES = 20  # in the last lines of a run: VOC's
LINE = 80  # columns
_CSV_ALONE = (
    "exit_code", "seed", "config_hash", "trainable_parameters", "images_per_second", "train_seconds", "epochs",
    "train_images", "val_images",
)  # fmt: skip


def sweep_table(rows: Sequence[Result], varied: Sequence[str], *, caption: str | None = None) -> Table:
    """The table of a sweep, one line a run, in the order given; with a caption of its own, of runs by their names.

    rows: contents of result.json, with "skipped": True where the run had finished before this sweep; of other jobs
        {"run_name", "status", "exit_code", "config"}.
    varied: what the sweep varied, as typed: model.msil.apply, or a group such as model/msil, which becomes those of
        its settings that differ between the rows.
    """
    keys = _settings(rows, varied)
    titles = _short_names(keys)
    metrics = [row.get("metrics") or {} for row in rows]
    columns = [Column("run_name", "run", str, right=False, shown=caption is not None or not keys)]
    columns += [Column(key, titles[key], FORMS.get(key, tables.setting), right=False) for key in keys]
    names = AP_NAMES + (("VOC_AP",) if any("VOC_AP" in one for one in metrics) else ())
    for name in names:
        seen = name == "AP" or any(not tables.is_missing(one.get(name)) for one in metrics)
        columns.append(Column(name, name.replace("_", " "), tables.percent, shown=seen))
    columns += [
        Column("parameters", "parameters", tables.amount),
        Column("flops", "FLOPs", tables.amount),
        Column("total_seconds", "time", tables.duration),
        Column("state", "state", str, right=False),
        Column("flops_image_size", shown=False, parts=("_height", "_width")),
        *(Column(key, shown=False) for key in _CSV_ALONE if key not in keys),
    ]
    if caption is not None:  # a ranking: what it is by stands first
        columns.insert(1, columns.pop(next(i for i, column in enumerate(columns) if column.key == "AP")))
    lines = []
    for row, ours in zip(rows, metrics, strict=True):
        line = {column.key: row.get(column.key) for column in columns}
        line |= {name: ours.get(name) for name in names} | {key: lookup(row, *key.split(".")) for key in keys}
        lines.append(line | {"state": _state(row)})
    return Table(caption or _caption(rows), tuple(columns), tuple(lines), _notes(rows))


def result_line(result: Result) -> str:
    """What a single run prints at its end: lines with its numbers, their price, and where the files are."""
    metrics = result["metrics"]
    names = [name for name in (*AP_NAMES, "VOC_AP") if name in metrics]
    scores = "  ".join(f"{name.replace('_', ' ')} {tables.percent(metrics[name])}" for name in names)
    score = own_score(metrics)
    by_class = [f"{name} {tables.percent(value)}" for name, value in (result.get("per_class") or {}).items()]
    classes = f"{score.replace('_', ' ')} by class: {joined(by_class)}"
    height, width = result["flops_image_size"]
    config = result["config"]
    folder = Path(str(config.get("runs_dir", "runs"))) / result["run_name"]
    split = result.get("split")
    where = f"{result['val_images']} {'' if split else 'validation '}images of {data_title(config['data'])}"
    where += f", split {split}" if split else ""
    took = (
        f"tested in {tables.duration(result['total_seconds'])}"
        if split
        else f"{counted(result['steps'], 'training step')} in {tables.duration(result['train_seconds'])} "
        f"({tables.duration(result['total_seconds'])} with evaluation)"
    )
    return "\n".join((
        *([scores, f"percent, on {where}"] if names else [f"{where}: no annotations, so no scores"]),
        *(textwrap.wrap(classes, LINE) if 0 < len(by_class) <= MOST_CLASSES else []),
        f"{tables.amount(result['parameters'])} parameters, {tables.amount(result['flops'])} FLOPs for one "
        f"{height}x{width} image",
        took,
        f"files in {folder}",
        *(f"to upload: {name}" for name in result.get("detections", ()) if name.endswith(".zip") and not names),
    ))  # fmt: skip


def _settings(rows: Sequence[Result], varied: Sequence[str]) -> list[str]:
    """Dotted keys of the columns, those that differ; a group becomes those of its settings that do, or its name."""
    keys: list[str] = []
    for typed in varied:
        key = typed.lstrip("+").replace("/", ".")
        values = [lookup(row, *key.split(".")) for row in rows]
        groups = [value for value in values if isinstance(value, Mapping)]
        differing = _differing(groups)
        if any("name" in group for group in groups) and ("name" in differing or not differing):
            # resnet50 against resnet101 says it all, unless two of one name differ in another setting
            names = dict.fromkeys(group.get("name") for group in groups)
            named = [[group for group in groups if group.get("name") == name] for name in names]
            differing = ["name", *dict.fromkeys(leaf for alike in named for leaf in _differing(alike))]
        keys += [f"{key}.{leaf}" for leaf in differing]
        keys += [key] if not groups and len({str(value) for value in values}) > 1 else []
    return list(dict.fromkeys(keys))


def _differing(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    leaves = dict.fromkeys(leaf for group in groups for leaf in group)
    return [leaf for leaf in leaves if len({str(group.get(leaf)) for group in groups}) > 1]


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each key, or the whole one where two end alike; model.backbone.name is called backbone."""
    paths = {key: key.removesuffix(".name") for key in keys}
    ends = Counter(path.rpartition(".")[2] for path in paths.values())
    return {key: end if ends[end := path.rpartition(".")[2]] == 1 else path for key, path in paths.items()}


def _caption(rows: Sequence[Result]) -> str:
    """Data set, image counts, detector, schedule, seed, and the unit of AP."""
    detectors = distinct(detector_name(row) or None for row in rows)
    seeds = "seed " + (distinct(lookup(row, "seed") for row in rows) or "unknown")
    return f"Sweep: {joined([setting_name(rows), detectors, seeds])}. AP in percent on the validation images."


def _notes(rows: Sequence[Result]) -> tuple[str, ...]:
    counts = Counter(_state(row).split(" ")[0] for row in rows)
    meaning = {"skipped": "skipped (finished before, numbers of that run)"}
    states = ", ".join(f"{count} {meaning.get(word, word)}" for word, count in counts.items())
    sizes = {tuple(size) for row in rows if (size := row.get("flops_image_size"))}
    size = "one {}x{} image (height x width)".format(*min(sizes)) if len(sizes) == 1 else "one image at each run's size"
    return (
        f"{counted(len(rows), 'run')}: {states}." if rows else "No runs.",
        f"FLOPs: the forward pass of {size}, 2 per multiply-add. Time: of the whole run but its start.",
    )


def _state(row: Result) -> str:
    """ok, skipped (finished before), failed (exit 1), failed (signal 9), preempted (exit 75), or the row's own word."""
    status, code = str(row.get("status")), row.get("exit_code")
    if status == "finished":
        return "skipped" if row.get("skipped") else "ok"
    if status != "failed" or code is None:
        return status
    if code == 75:
        return "preempted (exit 75)"
    return f"failed (signal {-code})" if code < 0 else f"failed (exit {code})"
