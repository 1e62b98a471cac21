"""`msil runs`: every run in a folder, the best first. Standard library and yaml alone: it takes no second."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msil.finished import stored_settings
from msil.lock import owner
from msil.reporting import tables
from msil.reporting.groups import Result, data_name, lookup, own_score
from msil.reporting.tables import Column, Table
from msil.runs import CONFIG, METRICS, RESULT, read_result, read_results

LONGER_NOTE = "12->24: of 24 epochs the first 12 by a schedule of 12, so no row of runs with 24 from the start."


def runs_tables(runs_dir: Path) -> list[Table]:
    """A table for each set of images that finished runs were scored on, that of most runs first; then those scored on
    the split that they were trained on, and the runs that have not finished.

    Raises ConfigError if runs_dir is no folder or holds no run.
    """
    folders = sorted(path.parent for path in runs_dir.glob(f"*/{CONFIG}"))
    unfinished = [folder for folder in folders if read_result(folder) is None]
    groups: dict[tuple[Any, ...], list[Result]] = {}
    if not unfinished or any(runs_dir.glob(f"*/{RESULT}")):
        for run in read_results(runs_dir):
            split = scored_split(run)
            digest = ((run.get("data") or {}).get(split) or {}).get("annotations")
            seen = lookup(run, "data", "train_split") == split
            groups.setdefault((seen, data_name(run), split, run["val_images"], digest), []).append(run)
    ordered = sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1])))
    found = [_finished(runs, split, seen) for (seen, _, split, *_), runs in ordered]
    return found + ([_unfinished(unfinished)] if unfinished else [])


def scored_split(run: Result) -> str | None:
    return lookup(run, "data", "split") or lookup(run, "data", "val_split")


def _finished(runs: Sequence[Result], split: str | None, seen: bool) -> Table:
    score = own_score(runs[0]["metrics"])
    rows = []
    for run in runs:
        planned = [one["epochs"] for one in run.get("continued") or ()]
        epochs = "->".join(str(one) for one in (*planned, run["epochs"])) if run["epochs"] else None
        rows.append({**run, **run["metrics"], "run": run["run_name"], "epochs": epochs})
    rows.sort(key=lambda row: (tables.is_missing(row.get(score)), -(row.get(score) or 0), row["run"]))
    names = [score, *(name for name in ("AP", "AP50") if name != score)]
    columns = [Column(name, name.replace("_", " "), tables.percent) for name in names] + [
        Column("epochs", "epochs"), Column("seed", "seed"), Column("parameters", "params", tables.amount),
        Column("flops", "FLOPs", tables.amount), Column("total_seconds", "time", tables.duration),
        Column("run", "run", str, right=False),
    ]  # fmt: skip
    held_out = lookup(runs[0], "data", "val_fraction") is not None and split == lookup(runs[0], "data", "val_split")
    images = "held-out images" if held_out else f"images of {split}"
    where = f"{data_name(runs[0])}, {runs[0]['val_images']} {images}"
    caption = f"{where}, on which these runs were trained: it says nothing of other images." if seen else f"{where}."
    longer = (LONGER_NOTE,) if any(run.get("continued") for run in runs) else ()
    return Table(caption, tuple(columns), tuple(rows), longer)


def _unfinished(folders: Sequence[Path]) -> Table:
    rows = []
    for folder in folders:
        settings = stored_settings(folder) or {}
        last = _last_row(folder / METRICS)
        epochs = (settings.get("schedule") or {}).get("epochs", "?")
        rows.append({
            "step": int(last["step"]) + 1 if last else 0,
            "epoch": f"{int(last['epoch']) + 1 if last else 0} of {epochs}",
            "state": "stopped" if (process := owner(folder)) is None else f"running, {process}",
            "run": folder.name,
        })  # fmt: skip
    columns = (
        Column("step", "step"),
        Column("epoch", "epoch", str),
        Column("state", "state", str, right=False),
        Column("run", "run", str, right=False),
    )
    note = "The command that started a run continues it. step: the last that metrics.csv has."
    return Table("Not finished.", columns, tuple(rows), (note,))


def _last_row(path: Path) -> dict[str, str] | None:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["step"].isdecimal() and row["epoch"].isdecimal()]
    except (OSError, ValueError, KeyError, AttributeError):  # missing, or not as a run writes it
        return None
    return rows[-1] if rows else None
