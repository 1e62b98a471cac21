"""metrics.csv: one row a logged step or evaluation, which a kill, a full disk or a resume may not cost."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from msil.runs import write_bytes

FILE_NAME = "metrics.csv"
FIRST = ("epoch", "step")
FLUSH_EVERY = 50  # rows


class MetricsFile(Logger):
    """Writes run_dir/metrics.csv: the columns epoch and step, then the metrics by name; empty where a row has none.

    resume_step: where the training goes on. Rows of earlier steps stay, later ones are trained, and written, again;
    None: from the beginning. The file is replaced as a whole where its columns or old rows change, else added to.
    (Lightning's CSVLogger deletes it at each start and rewrites it in place.) Raises OSError, as for a full disk.
    """

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        super().__init__()
        self.path = run_dir / FILE_NAME
        self._columns: list[str] = list(FIRST)
        self._new: list[dict[str, Any]] = []
        before = [] if resume_step is None else read_rows(self.path)
        rows = [row for row in before if int(row["step"]) < (resume_step or 0)]
        if rank_zero_only.rank == 0:
            if rows:
                self._columns = _ordered({key for row in rows for key in row})
                write_bytes(self.path, _text(rows, self._columns, header=True))
            else:
                self.path.unlink(missing_ok=True)

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The run's config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        values = {key: value.item() if isinstance(value, torch.Tensor) else value for key, value in metrics.items()}
        self._new.append({**values, "step": step})
        if len(self._new) >= FLUSH_EVERY:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        if not self._new:
            return
        columns = _ordered({*self._columns, *(key for row in self._new for key in row)})
        if columns == self._columns and self.path.exists():
            with self.path.open("ab") as file:
                file.write(_text(self._new, columns, header=False))
        else:
            write_bytes(self.path, _text([*read_rows(self.path), *self._new], columns, header=True))
        self._columns, self._new = columns, []

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows, without their empty cells; a last one that a kill cut short is left out, and any without a step."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    rows = []
    for row in csv.DictReader(io.StringIO(whole)):
        values = {key: text for key, text in row.items() if isinstance(text, str) and text}
        if values.get("step", "").isdecimal():
            rows.append(values)
    return rows


def _ordered(columns: set[str]) -> list[str]:
    return [*FIRST, *sorted(columns - set(FIRST))]


def _text(rows: list[dict[str, Any]], columns: list[str], *, header: bool) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
