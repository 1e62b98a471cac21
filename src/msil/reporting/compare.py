"""`msil compare A B`: in what two finished runs differ, and whether one is better."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msil.config import changes
from msil.errors import ConfigError
from msil.metrics.bootstrap import FEW_IMAGES
from msil.reporting import tables
from msil.reporting.evidence import Evidence
from msil.reporting.groups import Result, continued, lookup, own_score
from msil.reporting.ranking import too_few
from msil.reporting.tables import AP_NAMES, Column, Table


def compared(a: Result, b: Result) -> str:
    """Settings, numbers and AP by class of two results with "folder" (see read_run), as A, B and B - A.

    Raises ConfigError where both are one run.
    """
    if Path(a["folder"]).samefile(b["folder"]):
        raise ConfigError(f"A and B are one run, {a['folder']}: name another one.")
    score = own_score(a["metrics"])
    evidence = Evidence()
    records = [evidence.record(run) for run in (a, b)]
    missing = [run["folder"] for run, record in zip((a, b), records, strict=True) if record is None]
    difference = evidence.difference([b], [a], score)
    comparable = difference is not None or bool(missing)
    if difference is not None:
        notes = _luck(difference.low, difference.high, a["val_images"])
    elif missing:
        notes = (f"No interval: {missing[0]} has no readable evaluation.npz.",)
    else:
        notes = ("The two were scored on different images, boxes or classes, so their AP does not compare.",)
    numbers = _numbers(a, b, score, None if difference is None else difference)
    columns = (Column("name", "", str, right=False), *_pair(str), Column("gain", "B - A", str, shown=comparable))
    found = [
        _settings(a, b),
        Table("AP in percent.", columns, tuple(numbers), notes),
        *(_by_class(a, b, score, evidence) if comparable else ()),
    ]
    return f"A  {a['folder']}\nB  {b['folder']}\n\n" + "\n".join(map(tables.to_text, found))


def _settings(a: Result, b: Result) -> Table:
    pairs = changes(a["config"], b["config"])
    if "test" in {lookup(a, "mode"), lookup(b, "mode")}:  # which reads neither
        pairs = {name: pair for name, pair in pairs.items() if not name.startswith(("schedule.", "data.batch_size"))}
    beside = {"continued": (continued(a), continued(b)), "git": (a.get("git"), b.get("git"))}
    pairs |= {name: pair for name, pair in beside.items() if pair[0] != pair[1]}
    rows = [{"name": name, "a": one, "b": other} for name, (one, other) in pairs.items()]
    columns = (Column("name", "setting", str, right=False), *_pair(tables.short))
    return Table("Settings that differ." if rows else "No setting differs.", columns, tuple(rows))


def _luck(low: float, high: float, images: int) -> tuple[str, str]:
    if images < FEW_IMAGES:
        note = f"{too_few(images).capitalize()}."
    elif low <= 0 <= high:
        note = "The interval holds 0: these images do not tell the two apart."
    else:
        note = f"The interval leaves out 0: on such images {'B' if low > 0 else 'A'} is better."
    return note, "It is a 95 % paired bootstrap over images; another seed is not in it, and may reverse a difference."


def _numbers(a: Result, b: Result, score: str, ends: tuple[float, float, float] | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys((score, *AP_NAMES)):
        one, other = a["metrics"].get(name), b["metrics"].get(name)
        if one is not None and other is not None:
            gain = tables.interval(ends) if ends and name == score else tables.signed(other - one)
            rows.append(
                {"name": name.replace("_", " "), "a": tables.percent(one), "b": tables.percent(other), "gain": gain}
            )
    for name, title, form in (
        ("parameters", "parameters", tables.amount),
        ("flops", "FLOPs", tables.amount),
        ("total_seconds", "time", tables.duration),
    ):
        rows.append({"name": title, "a": form(a[name]), "b": form(b[name])})
    return rows


def _by_class(a: Result, b: Result, score: str, evidence: Evidence) -> list[Table]:
    ours, others = (evidence.by_class(run, score) or {} for run in (a, b))
    rows = [
        {"name": name, "a": one, "b": others[name], "gain": others[name] - one}
        for name, one in ours.items()
        if name in others
    ]
    rows.sort(key=lambda row: (tables.is_missing(row["gain"]), -row["gain"]))
    columns = (
        Column("name", "class", str, right=False),
        *_pair(tables.percent),
        Column("gain", "B - A", tables.signed),
    )
    return [Table(f"{score.replace('_', ' ')} by class, B's largest gain first.", columns, tuple(rows))] if rows else []


def _pair(form: Any) -> tuple[Column, Column]:
    return Column("a", "A", form), Column("b", "B", form)
