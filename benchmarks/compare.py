"""What every benchmark does: several ways to the same result, in turn in one process, and one line about each."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

REPEATS = 7
MANY = 21  # of what takes a fraction of a second: other work on the machine moves short times most


@dataclass(frozen=True)
class Row:
    """One measured goal, or with `met` None a measurement that has none.

    ours, anchor: as they are to be read, with their unit; anchor is empty where there is nothing to compare with.
    ratio: how many times better ours is (of P10: how many times as long it takes), or None for counts.
    goal: in words, e.g. ">= 60x". agreement: what was asserted about the results of both sides, in this very run.
    """

    name: str
    ours: str
    anchor: str
    ratio: float | None
    goal: str
    met: bool | None
    agreement: str

    def line(self) -> str:
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}x"
        verdict = {True: "met", False: "MISSED", None: ""}[self.met]
        return (
            f"{self.name:44} {self.ours:>14} {self.anchor:>14} {ratio:>8}  {self.goal:12} {verdict:6}  {self.agreement}"
        )


class NotRun(Exception):
    """This machine lacks what the benchmark needs; the text says what."""


def interleaved(
    ways: Mapping[str, Callable[[], object]], *, repeats: int = REPEATS, calls: int = 1, warmup: int = 1
) -> dict[str, float]:
    """Median CPU seconds of one call of each way, over `repeats` rounds in which each has its turn.

    calls: of each way a turn, for what is too short for the clock. warmup: rounds before, not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(-warmup, repeats):
        for name, way in ways.items():
            started = time.process_time()
            for _ in range(calls):
                way()
            taken = (time.process_time() - started) / calls
            if round_ >= 0:
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}


def faster(name: str, ours: float, anchor: float, at_least: float | None, agreement: str) -> Row:
    """A row about two times in seconds. at_least: the ratio asked for, or None."""
    ratio = anchor / ours
    goal = "" if at_least is None else f">= {at_least:g}x"
    met = None if at_least is None else ratio >= at_least
    return Row(name, seconds_said(ours), seconds_said(anchor), ratio, goal, met, agreement)


def counted(name: str, ours: int, anchor: int | str, at_most: int | None, agreement: str) -> Row:
    """A row about a number that is to be small. at_most: what is asked for, or None."""
    goal, met = ("", None) if at_most is None else (f"<= {at_most}", ours <= at_most)
    return Row(name, f"{ours}", f"{anchor}", None, goal, met, agreement)


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, relative to the largest value of `theirs`."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))


def seconds_said(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.2f} ms"


def run(measure: Callable[[], Iterator[Row]], doc: str | None) -> None:
    """The command line of one benchmark: prints its rows as they come."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the rows to as well")
    path = parser.parse_args().json
    torch.set_num_threads(1)
    rows: list[Row] = []
    try:
        for row in measure():
            print(row.line(), flush=True)
            rows.append(row)
    except NotRun as reason:
        print(f"not run: {reason}", flush=True)
        if path is not None:
            path.write_text(json.dumps({"not_run": str(reason)}))
        return
    if path is not None:
        path.write_text(json.dumps({"rows": [asdict(row) for row in rows]}))
