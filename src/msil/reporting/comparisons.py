"""The runs of one setting by what trained them: a line is one detector with its switches, over seeds.

Standard library alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msil.errors import ConfigError
from msil.reporting import captions
from msil.reporting.formats import setting
from msil.reporting.regenerated import USUAL, one_a_seed, own_block, settings
from msil.runs import RESULT, read_result

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """label: of the switches alone, e.g. "plain" or "MSIL cls". runs: one a seed, by seed."""

    label: str
    runs: tuple[Result, ...]

    @property
    def plain(self) -> bool:
        return self.label == "plain"


@dataclass(frozen=True)
class DetectorLines:
    """All lines of one head on one backbone, the plain one first. name: e.g. "VFNet ResNet-10"."""

    name: str
    lines: tuple[Line, ...]

    def pair(self) -> tuple[Line, Line] | None:
        """The plain detector and the one with the whole MSIL, where both ran."""
        found = {line.label: line for line in self.lines}
        return (found["plain"], found["MSIL"]) if {"plain", "MSIL"} <= set(found) else None


def detectors(group: Sequence[Result]) -> list[DetectorLines]:
    """The runs of one setting (see regenerated.settings), by detector and line; most lines first."""
    found: dict[str, dict[str, list[Result]]] = {}
    for run in group:
        model = run["config"]["model"]
        detector = json.dumps([model["head"], model["backbone"], model.get("detector")], sort_keys=True)
        found.setdefault(detector, {}).setdefault(line_label(run), []).append(run)
    made = []
    for lines in found.values():
        ordered = sorted(lines.items(), key=lambda item: (item[0] != "plain", item[0] != "MSIL", item[0]))
        first = ordered[0][1][0]
        made.append(
            DetectorLines(captions.detector_name(first), tuple(Line(name, one_a_seed(runs)) for name, runs in ordered))
        )
    return sorted(made, key=lambda detector: (-len(detector.lines), detector.name))


def newest_pair(runs_dir: str | Path) -> tuple[Path, Path]:
    """The checkpoints of a plain detector and of one with the whole MSIL that were trained alike, with one seed; of
    several such pairs the one that was finished last.

    Raises ConfigError, with the two commands that make such a pair, if runs_dir has none.
    """
    results = [
        {**result, "folder": str(path.parent)}
        for path in sorted(Path(runs_dir).glob(f"*/{RESULT}"))
        if _checkpoint(path.parent).is_file() and (result := read_result(path.parent)) is not None
    ]
    pairs = [pair for group in settings(results) for one in detectors(group) if (pair := one.pair()) is not None]
    alike = [
        (_checkpoint(first["folder"]), _checkpoint(second["folder"]))
        for plain, msil in pairs
        for first in plain.runs
        for second in msil.runs
        if first["seed"] == second["seed"]
    ]
    if not alike:
        raise ConfigError(
            f"{runs_dir} holds no plain detector and one with MSIL that were trained alike and kept their checkpoints: "
            "make them with `python run.py model.msil.apply=none` and `python run.py`."
        )
    return max(alike, key=lambda pair: max(path.stat().st_mtime for path in pair))


def _checkpoint(folder: str | Path) -> Path:
    return Path(folder) / "checkpoints" / "last.ckpt"


def line_label(run: Result) -> str:
    """plain, MSIL (the whole block on both branches), MSIL cls, MSIL without alignment, MSIL kernel_size=1 ...; a block
    of the user's own by its class, MyBlock depth=2."""
    block = captions.lookup(run, "model", "msil")
    if block["apply"] == "none":
        return "plain"
    if block.get("block"):
        return own_block(block)
    words = ["MSIL"] + ([block["apply"]] if block["apply"] != "both" else [])
    words += [] if block["align"] else ["without alignment"]
    words += [] if block["separate"] else ["without separation"]
    words += [f"{key}={setting(block[key])}" for key, usual in USUAL.items() if block.get(key, usual) != usual]
    return " ".join(words)
