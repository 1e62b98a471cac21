"""The detections behind the tables: each run's read and judged once, and its rows compared by pairs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from msil.errors import DataError
from msil.metrics.bootstrap import SAMPLES, Interval, Resampled, difference_of, resample
from msil.metrics.coco import MAX_DETS
from msil.metrics.matching import Matches, match_coco, match_voc
from msil.metrics.precision import per_class, scores
from msil.metrics.record import RECORD_FILE, EvaluationRecord, read_record
from msil.reporting.filling import Filled
from msil.reporting.groups import Result, lookup


def max_dets(run: Result) -> int:
    """Detections an image and class that the run's AP counts."""
    return lookup(run, "data", "max_dets") or MAX_DETS


class Evidence:
    """Reads evaluation.npz of runs (results with "folder", see read_results) as they are asked for, and keeps it."""

    def __init__(self, samples: int = SAMPLES, progress: Callable[[], object] = lambda: None) -> None:
        """samples: of the bootstrap. progress: called after those of each run and metric, which take seconds."""
        self.samples, self.progress = samples, progress
        self._records: dict[str, EvaluationRecord | None] = {}
        self._matches: dict[tuple[str, bool], Matches] = {}
        self._drawn: dict[tuple[str, str], Resampled] = {}

    def record(self, run: Result) -> EvaluationRecord | None:
        """None where the run has no such file (as of images without boxes), and, with a warning, where it is damaged or
        is not of this run."""
        folder = run["folder"]
        if folder not in self._records:
            self._records[folder] = None
            if (Path(folder) / RECORD_FILE).exists():
                try:
                    self._records[folder] = self._read(run)
                except DataError as error:
                    warnings.warn(f"{error} Without it that run has no interval and no charts.", stacklevel=2)
        return self._records[folder]

    def matches(self, run: Result, metric: str) -> Matches:
        """The detections of a run with a record, judged by the rule of `metric`: VOC's for VOC_AP, else COCO's."""
        key = run["folder"], metric == "VOC_AP"
        if key not in self._matches:
            record = self.record(run)
            assert record is not None
            self._matches[key] = match_voc(record) if metric == "VOC_AP" else match_coco(record, max_dets(run))
        return self._matches[key]

    def by_class(self, run: Result, metric: str) -> dict[str, float] | None:
        """AP or VOC_AP of each class by its name, nan without objects; None of a run without a record."""
        if (record := self.record(run)) is None:
            return None
        return dict(zip(record.classes.tolist(), per_class(self.matches(run, metric), metric).tolist(), strict=True))

    def difference(self, ours: Sequence[Result], others: Sequence[Result], metric: str) -> Interval | None:
        """Mean of `ours` minus that of `others`, runs of one row each, with its interval; None where a run's
        detections are missing, or the two were not evaluated on the same boxes."""
        records = [self.record(run) for run in (*ours, *others)]
        questions = {record.question() for record in records if record is not None}
        if not ours or not others or None in records or len(questions) != 1:
            return None
        return difference_of(*([self._resampled(run, metric) for run in runs] for runs in (ours, others)))

    def compare(self, filled: Filled) -> Filled:
        """The table with the difference of each row to the row it is compared with, in the table's first metric."""
        metric = filled.metric[filled.paper.metrics[0]]
        found = {}
        for place, row in enumerate(filled.rows):
            other = filled.compared(row)
            if other is not None and (one := self.difference(row.runs, other.runs, metric)) is not None:
                found[place] = one
        return replace(filled, differences=found, samples=self.samples)

    def _resampled(self, run: Result, metric: str) -> Resampled:
        key = run["folder"], metric
        if key not in self._drawn:
            self._drawn[key] = resample(self.matches(run, metric), metric, samples=self.samples)
            self.progress()
        return self._drawn[key]

    def _read(self, run: Result) -> EvaluationRecord:
        """Raises DataError for a record that does not give the very AP that result.json reports."""
        record = read_record(run["folder"])
        matches = match_coco(record, max_dets(run))
        found, reported = scores(matches, metrics=("AP",))["AP"], run["metrics"].get("AP")
        reported = math.nan if reported is None else reported
        if not np.isclose(found, reported, rtol=0, atol=1e-6, equal_nan=True):
            raise DataError(
                f"{run['folder']}/{RECORD_FILE} gives AP {found:.4f}, but result.json beside it says {reported:.4f}: "
                "they are not of one run; delete that folder and run it again."
            )
        self._matches[run["folder"], False] = matches
        return record
