"""All benchmarks one after the other; results into benchmarks/results.json and the table of docs/performance.md.

    python -m benchmarks                 # all; those that need a GPU or a package that is not there say so
    python -m benchmarks star_convolution loading
    python -m benchmarks --gpu gpu/results.json     # what `python -m benchmarks.gpu` left, on whatever machine

Each runs in a process of its own on one thread. What did not run keeps the results that it had, with their date and
machine. Exits with 1 if one of them failed: results that do not agree are an error, a goal that is missed is a result.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results.json"
DOCUMENT = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- python -m benchmarks writes from here -->", "<!-- to here -->"

# In the order of their goals, P1 to P19 and G1 to G5.
BENCHMARKS = (
    "fcos_assignment", "fcos_loss", "vfnet_loss", "host_syncs", "kernels", "star_convolution", "training_step",
    "evaluation_forward", "postprocessing", "msil_cost", "coco_evaluation", "loading", "start_up",
    "dense_losses", "fused_optimizer", "folded_norms", "evaluation_order",
    "gpu",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--gpu", type=Path, metavar="FILE", help="results.json of benchmarks.gpu: its rows go in")
    options = parser.parse_args()
    names = options.names or (BENCHMARKS if options.gpu is None else ())
    unknown = sorted(set(names) - set(BENCHMARKS))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(BENCHMARKS)}")
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if options.gpu is not None:
        found = json.loads(options.gpu.read_text())
        if "not_run" in found:
            parser.error(f"{options.gpu} has no rows: {found['not_run']}")
        results["gpu"] = with_rows(results.get("gpu", {}), found)
    failed = []
    started = time.monotonic()
    for name in names:
        outcome = measured(name)
        if outcome is None:
            failed.append(name)
        elif "rows" in outcome:
            results[name] = {**outcome, **machine(name)}
        else:
            results.setdefault(name, outcome)
    kept = {name: results[name] for name in BENCHMARKS if name in results}
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    write_table(DOCUMENT, kept)
    print(f"{time.monotonic() - started:.0f} s; written: {RESULTS.relative_to(ROOT)}, {DOCUMENT.relative_to(ROOT)}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def with_rows(before: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The rows of a call of benchmarks.gpu in place of those of their names; of another machine or other versions in
    place of all."""
    place = ("machine", "versions")
    same = all(before.get(key) == found[key] for key in place)
    rows = {row["name"]: row for row in [*(before["rows"] if same else ()), *found["rows"]]}
    dates = sorted({*(before["date"].split(" and ") if same else ()), found["date"]})
    kept = {key: found[key] for key in ("seconds", *place)}
    return {"rows": list(rows.values()), "date": " and ".join(dates), **kept}


def measured(name: str) -> dict[str, Any] | None:
    """What a benchmark's process leaves: its rows, or why it did not run; None if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{name}", "--json", str(path)]
        began = time.monotonic()
        code = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
        if code != 0 or not path.exists():
            return None
        return {**json.loads(path.read_text()), "seconds": round(time.monotonic() - began)}


def machine(name: str) -> dict[str, str]:
    """Where a benchmark ran, and when."""
    versions = [f"{package} {importlib.metadata.version(package)}" for package in ("torch", "torchvision")]
    device = f"{_processor()}, one thread" if not name.startswith("gpu") else torch.cuda.get_device_name()
    return {
        "date": datetime.date.today().isoformat(),
        "machine": device,
        "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_table(document: Path, results: dict[str, Any]) -> None:
    """Replaces what stands between the marks of `document`."""
    text = document.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        sys.exit(f"{document} lacks the lines {BEGIN} and {END}; put them where the table is to stand.")
    before, rest = text.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    document.write_text(f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{after}", encoding="utf-8")


def table(results: dict[str, Any]) -> str:
    lines = [
        "| what | ours | anchor | ratio | goal | | agreement of the results |",
        "|---|--:|--:|--:|---|---|---|",
    ]
    for name, outcome in results.items():
        for row in outcome.get("rows", []):
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}x"
            verdict = {True: "met", False: "**missed**", None: ""}[row["met"]]
            cells = [row["name"], row["ours"], row["anchor"], ratio, row["goal"], verdict, row["agreement"]]
            lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
        if "not_run" in outcome:
            lines.append(f"| {name} | | | | | not measured yet | {outcome['not_run']} |")
    machines = dict.fromkeys(
        f"{outcome['date']}, {outcome['machine']}, {outcome['versions']}"
        for outcome in results.values()
        if "machine" in outcome
    )
    return "\n".join(lines) + "\n\nMeasured: " + "; ".join(machines) + "."


if __name__ == "__main__":
    main()
