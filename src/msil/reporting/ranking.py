"""The runs of the same images over their seeds, the best first: by how much, by luck or not, and at what price."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from msil.metrics.bootstrap import FEW_IMAGES
from msil.reporting.evidence import Evidence
from msil.reporting.groups import Lines, Result, key, line_names, one_a_seed, own_score
from msil.reporting.tables import Column, Table, amount, duration, interval, over_seeds, percent, spread


def ranked(runs: Sequence[Result]) -> tuple[Lines, str]:
    """Runs that differ in their seed alone as one line, "VFNet ResNet-10 MSIL", the best first: by the mean of their
    own score, whose name is the second: AP, or VOC_AP of VOC's."""
    metric = "VOC_AP" if all(own_score(run["metrics"]) == "VOC_AP" for run in runs) else "AP"
    names: dict[str, str] = {}  # one a key, whatever title the head had in another version
    lines: dict[str, list[Result]] = {}
    for name, run in zip(line_names(runs), runs, strict=True):
        lines.setdefault(names.setdefault(key(run), name), []).append(run)
    found = {name: one_a_seed(own) for name, own in lines.items()}
    means = {name: fmean([run["metrics"].get(metric) or 0.0 for run in own]) for name, own in found.items()}
    return {name: found[name] for name in sorted(found, key=lambda name: -means[name])}, metric


def ranking(lines: Lines, metric: str, evidence: Evidence) -> Table:
    """A row a line: its score, what the best has more, and the price."""
    (first, best), *others = lines.items()
    rows = []
    for name, runs in lines.items():
        row: dict[str, Any] = {"line": name, "seeds": len(runs)}
        row |= {column: over_seeds([run["metrics"].get(column) for run in runs]) for column in (metric, "AP50")}
        row |= {column: fmean([run[column] for run in runs]) for column in ("parameters", "flops", "total_seconds")}
        if name != first:
            row["difference"] = evidence.difference(runs, best, metric)
        rows.append(row)
    words = metric.replace("_", " ")
    columns = (
        Column("line", "detector", str, right=False),
        Column("seeds", "seeds"),
        Column(metric, words, spread),
        Column("difference", "to the best [95 %]", lambda ends: interval(ends) if ends else "-", shown=bool(others)),
        Column("AP50", "AP50", spread),
        Column("parameters", "parameters", amount),
        Column("flops", "FLOPs", amount),
        Column("total_seconds", "time", duration),
    )
    return Table(f"{words} in percent, mean ± deviation over the seeds.", columns, tuple(rows))


def answer(lines: Lines, metric: str, evidence: Evidence) -> str:
    """Which line is best, by how much on the second, and whether that is more than luck."""
    (best, ours), *others = lines.items()
    words = f"{metric.replace('_', ' ')} {percent(fmean([run['metrics'].get(metric) or 0.0 for run in ours]))}"
    if not others:
        return f"{best}: {words}."
    second, theirs = others[0]
    difference = evidence.difference(ours, theirs, metric)
    start = f"Best of {len(lines)}: {best}, {words}"
    if difference is None:
        return f"{start}, before {second}; no interval can be had (other images or classes, or no evaluation.npz)."
    several = min(len(ours), len(theirs)) > 1
    luck = "more than luck" if several else "more than the choice of images gives, but another seed may reverse it"
    luck = luck if difference.low > 0 else "luck may give as much"
    if ours[0]["val_images"] < FEW_IMAGES:
        return f"{start}, {interval(difference)} (95 %) on the second, {second}: {too_few(ours[0]['val_images'])}."
    luck += "" if len(lines) == 2 else f", not corrected for the choice among {len(lines)}"
    return f"{start}, {interval(difference)} (95 %) on the second, {second}: {luck}."


def too_few(images: int) -> str:
    return f"{images} images are too few to tell luck"


def class_table(lines: Lines, evidence: Evidence) -> Table | None:
    """AP of each class by its name, a column a line; None where no run kept its detections."""
    values: dict[str, list[dict[str, float]]] = {}  # of each line one a seed
    for name, runs in lines.items():
        for run in runs:
            if (found := evidence.by_class(run, "AP")) is not None:
                values.setdefault(name, []).append(found)
    if not values:
        return None
    columns = [Column(f"line{i}", name, spread) for i, name in enumerate(values)]
    rows = []
    for name in dict.fromkeys(name for seeds in values.values() for one in seeds for name in one):
        scores = {f"line{i}": over_seeds([one.get(name) for one in seeds]) for i, seeds in enumerate(values.values())}
        rows.append({"class": name} | scores)
    caption = "COCO's AP in percent, mean ± deviation over the seeds."
    return Table(caption, (Column("class", "class", str, right=False), *columns), tuple(rows))
