"""Tells the terminal and sweep.json what a sweep's jobs do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from msil.sweep.processes import Outcome, unwritten
from msil.sweep.record import Record
from msil.sweep.screen import Screen


class LiveWatcher:
    """A msil.sweep.processes.Watcher. A full disk costs the record, and is said, but costs no job."""

    def __init__(self, screen: Screen, record: Record, runs_dir: Path) -> None:
        self._screen = screen
        self._record = record
        self._runs_dir = runs_dir

    def begin(self, outcomes: Sequence[Outcome]) -> None:
        self._write()
        for outcome in outcomes:
            if outcome.state == "skipped":
                self._screen.changed(outcome)

    def changed(self, outcome: Outcome) -> None:
        self._screen.changed(outcome)
        if outcome.state == "running":
            self._record.started(outcome.job)
        self._write()

    def tick(self) -> None:
        self._screen.tick()

    def stopping(self, count: int, grace_seconds: float) -> None:
        self._screen.stopping(count, grace_seconds)

    def trouble(self, sentence: str) -> None:
        self._screen.trouble(sentence)

    def end(self) -> None:
        self._write(ended=True)

    def _write(self, *, ended: bool = False) -> None:
        try:
            self._record.write(ended=ended)
        except OSError as error:
            self._screen.trouble(unwritten(self._runs_dir, error))
