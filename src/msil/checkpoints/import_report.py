"""What an import did, and that as lines to read."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

WIDTH = 110  # characters of a line of settings
NUMBER = re.compile(r"\d+")

# Left over by the hundred in some files: shown as a count, each with its reason.
COUNTED = {
    r".*\.num_batches_tracked": "num_batches_tracked, which nothing reads",
    r"ema_.*": "ema_* copies: the averaged or the raw weights beside those in use",
}


@dataclass
class Report:
    """matched: names that stay. renamed: (theirs, ours); "name[2]" is item 2 of a stacked tensor.
    missing: what the checkpoint lacks, with what stands in for it. left_over: what of it is not used.
    settings: what net it was taken for, and why, in words.
    """

    matched: list[str] = field(default_factory=list)
    renamed: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)


def report_lines(report: Report, verbose: bool = False) -> list[str]:
    """The report for a terminal: settings, then the names. Renamed ones are grouped by their pattern, with their
    count; verbose: each by itself."""
    lines = [line for text in report.settings for line in textwrap.wrap(text, WIDTH, subsequent_indent=" " * 13)]
    lines += ["", f"kept      {_count(report.matched)}"]
    if verbose:
        lines += [f"  {name}" for name in report.matched]
    elif report.matched:
        first, last = report.matched[0], report.matched[-1]
        lines.append(f"  {first}" if first == last else f"  {first} ... {last}")
    lines.append(f"renamed   {_count(report.renamed)}")
    lines += _renamed_lines([((a, b), 1) for a, b in report.renamed] if verbose else grouped(report.renamed))
    lines.append(f"missing   {_count(report.missing)}")
    lines += [f"  {name}" for name in report.missing]
    lines.append(f"left over {_count(report.left_over)}")
    lines += [f"  {name}" for name in (report.left_over if verbose else _counted(report.left_over))]
    return lines


def grouped(renamed: Iterable[tuple[str, str]]) -> list[tuple[tuple[str, str], int]]:
    """(theirs, ours) and how many names each stands for: # for any number, * for any last word that stays.

    [("a.0.b", "c.0.b"), ("a.1.d", "c.1.d")] -> [(("a.#.*", "c.#.*"), 2)]
    """
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for theirs, ours in renamed:
        (a, _, end), (b, _, other_end) = theirs.rpartition("."), ours.rpartition(".")
        kept = end == other_end
        pattern = (f"{a}.*" if kept else theirs, f"{b}.*" if kept else ours)
        groups.setdefault((NUMBER.sub("#", pattern[0]), NUMBER.sub("#", pattern[1])), []).append((theirs, ours))
    return [(pairs[0] if len(pairs) == 1 else pattern, len(pairs)) for pattern, pairs in groups.items()]


def _renamed_lines(groups: list[tuple[tuple[str, str], int]]) -> list[str]:
    width = max((len(theirs) for (theirs, _), _ in groups), default=0)
    return [
        f"  {theirs:<{width}} -> {ours}" + (f"  ({count})" if count > 1 else "") for (theirs, ours), count in groups
    ]


def _counted(names: list[str]) -> list[str]:
    reasons = {name: next((why for key, why in COUNTED.items() if re.fullmatch(key, name)), None) for name in names}
    counts = Counter(why for why in reasons.values() if why is not None)
    return [name for name in names if reasons[name] is None] + [f"{n} {why}" for why, n in counts.items()]


def _count(names: list) -> str:
    return f"{len(names)} name" + ("" if len(names) == 1 else "s")
