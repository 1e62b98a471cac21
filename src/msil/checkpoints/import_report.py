"""What an import did, and that as lines to read."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

WIDTH = 110  # characters of a line of settings
MANY = 20  # names of which only a prefix changes are one line from here on

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
    """(theirs, ours) and how many names each stands for, the numbers and the last words that vary in braces.

    [("a.0.b", "c.0.b"), ("a.1.b", "c.1.b")] -> [(("a.{0,1}.b", "c.{0,1}.b"), 2)]
    """
    renamed = list(renamed)
    prefixes = Counter(prefix for prefix in (_prefixes(*pair) for pair in renamed) if prefix)
    groups: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for theirs, ours in renamed:
        prefix = _prefixes(theirs, ours)
        groups.setdefault(prefix if prefixes[prefix] > MANY else _pattern(theirs, ours), []).append((theirs, ours))
    return [
        ((f"{key[0]}.*", f"{key[1]}.*") if prefixes[key] > MANY else _braces(pairs), len(pairs))
        for key, pairs in groups.items()
    ]


def _prefixes(theirs: str, ours: str) -> tuple[str, ...]:
    """What remains of both names without the words that they end in alike; empty if that is only one word."""
    a, b = theirs.split("."), ours.split(".")
    alike = 0
    while alike < min(len(a), len(b)) - 1 and a[-1 - alike] == b[-1 - alike]:
        alike += 1
    return (".".join(a[:-alike]), ".".join(b[:-alike])) if alike > 1 else ()


def _pattern(theirs: str, ours: str) -> tuple[str, ...]:
    """Both names without their numbers, and without their last word where that is the same."""
    (a, _, end), (b, _, other_end) = theirs.rpartition("."), ours.rpartition(".")
    words = (a, b) if end == other_end else (a, b, end, other_end)
    return tuple(re.sub(r"\d+", "#", word) for word in words)


def _braces(pairs: list[tuple[str, str]]) -> tuple[str, str]:
    return _joined(theirs for theirs, _ in pairs), _joined(ours for _, ours in pairs)


def _joined(names: Iterable[str]) -> str:
    """One text for names that differ in numbers and in the last word alone."""
    split = [re.split(r"(\d+)", name) for name in names]
    heads = [parts[:-1] for parts in split]
    text = ""
    for i, values in enumerate(zip(*heads, strict=True)):
        text += _choice([int(value) for value in values]) if i % 2 else values[0]
    # Behind the last number: the same but for its last word.
    tails = [parts[-1].rpartition(".") for parts in split]
    words = list(dict.fromkeys(word for _, _, word in tails))
    return text + tails[0][0] + tails[0][1] + (words[0] if len(words) == 1 else "{" + ",".join(words) + "}")


def _choice(numbers: list[int]) -> str:
    values = sorted(set(numbers))
    if len(values) == 1:
        return str(values[0])
    if len(values) > 2 and values == list(range(values[0], values[-1] + 1)):
        return f"{{{values[0]}..{values[-1]}}}"
    return "{" + ",".join(map(str, values)) + "}"


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
