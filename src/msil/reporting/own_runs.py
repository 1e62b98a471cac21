"""`msil runs`: every run in a folder, the best first. Standard library and yaml alone: it takes no second."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from msil.finished import stored_settings
from msil.lock import owner
from msil.reporting import tables
from msil.reporting.groups import Result, block_label, by_images, detector_name, distinct_names, lookup, own_score
from msil.reporting.tables import Column, Table
from msil.runs import CONFIG, METRICS, RESULT, read_result, read_results, weights_name

LONGER_NOTE = "a->b epochs: the first a by a schedule of a epochs, so not the same as b epochs from the start."


def runs_tables(runs_dir: Path) -> list[Table]:
    """A table for each set of images that finished runs were scored on, that of most runs first; then those scored on
    the split that they were trained on, and the runs that have not finished.

    Raises ConfigError if runs_dir is no folder or holds no run.
    """
    folders = sorted(path.parent for path in runs_dir.glob(f"*/{CONFIG}"))
    unfinished = [folder for folder in folders if read_result(folder) is None]
    finished = read_results(runs_dir) if not unfinished or any(runs_dir.glob(f"*/{RESULT}")) else []
    found = [_finished(runs, images) for images, runs in by_images(finished)]
    return found + ([_unfinished(unfinished)] if unfinished else [])


def _finished(runs: Sequence[Result], images: str) -> Table:
    score = own_score(runs[0]["metrics"])
    rows = []
    trained = [run for run in runs if lookup(run, "mode") != "test"]
    names = distinct_names([f"{detector_name(run)} {block_label(run)}" for run in trained], trained, ())
    also = {run["folder"]: name.partition(", ")[2] for run, name in zip(trained, names, strict=True)}
    tests = [run for run in runs if run["folder"] not in also]
    names = [f"test of {weights_name(lookup(run, 'model', 'weights'))}" for run in tests]
    named = distinct_names(names, tests, without=("model", "schedule", "data.batch_size"))
    also |= dict(zip((run["folder"] for run in tests), named, strict=True))
    for run in runs:
        planned = [one["epochs"] for one in run.get("continued") or ()]
        epochs = "->".join(str(one) for one in (*planned, run["epochs"])) if run["epochs"] else None
        rows.append({**run, **run["metrics"], "run": run["run_name"], "epochs": epochs, "also": also[run["folder"]]})
    rows.sort(key=lambda row: (tables.is_missing(row.get(score)), -(row.get(score) or 0), row["run"]))
    names = [score, *(name for name in ("AP", "AP50") if name != score)]
    columns = [Column(name, name.replace("_", " "), tables.percent) for name in names] + [
        Column("epochs", "epochs", lambda count: count or tables.MISSING),
        Column("seed", "seed"),
        Column("parameters", "params", tables.amount),
        Column("flops", "FLOPs", tables.amount),
        Column("total_seconds", "time", tables.duration),
        Column("run", "run", str, right=False, below=True),
        Column("also", "", str, right=False, shown=any(row["also"] for row in rows), below=True),
    ]  # fmt: skip
    notes = (LONGER_NOTE,) if any(run.get("continued") for run in runs) else ()
    notes += ("Luck or better: msil compare A B, and over seeds msil report.",) if len(runs) > 1 else ()
    return Table(f"{images}.", tuple(columns), tuple(rows), notes)


def _unfinished(folders: Sequence[Path]) -> Table:
    rows = []
    for folder in folders:
        settings = stored_settings(folder) or {}
        last = _last_row(folder / METRICS)
        epochs = (settings.get("schedule") or {}).get("epochs", "?")
        rows.append({
            "step": int(last["step"]) + 1 if last else 0,
            "epoch": f"{int(last['epoch']) + 1 if last else 0} of {epochs}",
            "state": _state(folder, last),
            "run": folder.name,
        })  # fmt: skip
    columns = (
        Column("step", "step"),
        Column("epoch", "epoch", str),
        Column("state", "state", str, right=False),
        Column("run", "run", str, right=False, below=True),
    )
    note = f"A run's command, in the second line of its {CONFIG}, continues it. step: the last that {METRICS} has."
    return Table("Not finished.", columns, tuple(rows), (note,))


def _state(folder: Path, last: dict[str, str] | None) -> str:
    """running and where, diverged (it would again), or stopped."""
    if (process := owner(folder)) is not None:
        return f"running, {process}"
    return "diverged" if last and last.get("diverged") else "stopped"


def _last_row(path: Path) -> dict[str, str] | None:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["step"].isdecimal() and row["epoch"].isdecimal()]
    except (OSError, ValueError, KeyError, AttributeError):  # missing, or not as a run writes it
        return None
    return rows[-1] if rows else None
