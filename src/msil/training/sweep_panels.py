"""The tables of a sweep as a W&B run of its own, in the group of the sweep's runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from msil.config import LoggerConfig
from msil.reporting.evidence import Evidence, differences
from msil.reporting.paper import TABLES
from msil.reporting.paper_tables import paper_table
from msil.reporting.regenerated import fill, settings
from msil.reporting.tables import Table
from msil.training import wandb_run

JOB_TYPE = "tables"


def show_sweep(
    config: LoggerConfig,
    folder: Path,
    name: str,
    sweep_table: Table,
    results: Sequence[Mapping[str, Any]],
    paper: str | None,
) -> None:
    """Log the run "<name> tables"; what W&B cannot take is said in one line and changes nothing else.

    config: of the sweep's jobs. folder: the sweep's. results: of its finished jobs, each with "folder".
    paper: "table1" to "table5" adds that table with the results in it.
    """
    try:
        group = config.group or name
        run = wandb_run.begin(
            config, folder, f"{name} tables", {"sweep": name}, job_type=JOB_TYPE, group=group, what="the sweep's table"
        )
        run.log({"sweep": as_wandb(sweep_table), **_paper_tables(results, paper)})
    except Exception as error:  # a network, a server, a broken folder: the sweep has its tables all the same
        print(f"W&B: the sweep's tables were not logged ({_one_line(error)})")
    finally:
        _finish()


def as_wandb(table: Table) -> wandb.Table:
    """The columns of the .csv and those that people read, by their keys; numbers as numbers, AP as a fraction."""
    rows = [[_cell(row.get(column.key), column.form) for column in table.columns] for row in table.rows]
    return wandb.Table([column.key for column in table.columns], rows, allow_mixed_types=True)


def _paper_tables(results: Sequence[Mapping[str, Any]], paper: str | None) -> dict[str, wandb.Table]:
    """The paper's table for each setting of the results; usually there is one."""
    if paper not in TABLES:
        return {}
    evidence = Evidence()
    filled = [one for group in settings(results) if (one := fill(TABLES[paper], group)).runs]
    names = [paper if place == 1 else f"{paper} ({place})" for place in range(1, len(filled) + 1)]
    return {
        name: as_wandb(paper_table(one, differences(one, evidence))) for name, one in zip(names, filled, strict=True)
    }


def _cell(value: Any, form: Any) -> Any:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    return form(value)


def _finish() -> None:
    try:
        wandb.finish()
    except Exception as error:
        print(f"W&B: the sweep's run did not end well ({_one_line(error)})")


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
