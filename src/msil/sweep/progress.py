"""How far a run is, read off the metrics.csv that it writes. Standard library alone."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from msil.reporting.formats import percent
from msil.sweep.estimate import clock


@dataclass(frozen=True)
class Progress:
    """The latest values; None before the first."""

    epoch: int | None = None  # from 1
    loss: float | None = None
    ap: float | None = None  # 0..1

    def text(self) -> str:
        """`epoch 4, loss 1.234, AP 21.0`, or as much of it as is known."""
        words = [
            None if self.epoch is None else f"epoch {self.epoch}",
            None if self.loss is None else f"loss {self.loss:.3f}",
            None if self.ap is None else f"AP {percent(self.ap)}",
        ]
        return ", ".join(word for word in words if word)


def progress(run_dir: Path) -> Progress:
    """Nothing known where there is no metrics.csv or it cannot be read; a half-written last row is no error."""
    try:
        with (run_dir / "metrics.csv").open(newline="", encoding="utf-8", errors="replace") as file:
            latest = {name: value for row in csv.DictReader(file) for name, value in row.items() if value}
    except (OSError, csv.Error):  # not there yet; no table
        return Progress()
    epoch = _number(latest.get("epoch"))
    return Progress(None if epoch is None else int(epoch) + 1, _number(latest.get("loss")), _number(latest.get("AP")))


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def brief_position(states: Sequence[str], seconds_left: float | None) -> str:
    """`job 4 of 6, ETA 01:40 (at 17:35), 1 failed`: what a terminal's one line has room for."""
    begun = len(states) - states.count("waiting")
    eta = [] if seconds_left is None else [f"ETA {clock(seconds_left)}"]
    failed = [f"{states.count('failed')} failed"] if "failed" in states else []
    return ", ".join([f"job {begun} of {len(states)}", *eta, *failed])


def position(states: Sequence[str], seconds_left: float | None, *, live: bool = True) -> str:
    """`job 4 of 6, ETA 01:40 (at 17:35): 2 done, 1 failed, 1 running` from the states of a sweep's jobs.

    seconds_left: None where no finished run tells. live: whether the sweep goes on; else `2 done, 4 not started of 6`.
    """
    number = {
        "done": sum(state in ("ok", "skipped") for state in states),
        "failed": states.count("failed"),
        "stopped": states.count("interrupted"),
        "killed": states.count("killed"),
        "running": states.count("running"),
    }
    if not live:
        number["not started"] = states.count("waiting")
    words = ", ".join(f"{count} {word}" for word, count in number.items() if count or word == "done")
    if not live:
        return f"{words} of {len(states)}"
    return f"{brief_position(['' if state == 'failed' else state for state in states], seconds_left)}: {words}"
