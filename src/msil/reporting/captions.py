"""What a table says about its own numbers: on what data, at what cost, and what they may be compared with.

Standard library alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from msil.reporting.formats import setting
from msil.reporting.paper import TABLES, TITLES, PaperTable, Recipe

Row = Mapping[str, Any]

PAPER_CHANNELS = 256  # of FPN and head, in every published recipe


def lookup(row: Row, *path: str) -> Any:
    """row["config"][path[0]][path[1]]..., or None where a part is missing."""
    node: Any = row.get("config")
    for part in path:
        if not isinstance(node, Mapping) or part not in node:
            return None
        node = node[part]
    return node


def caption(rows: Sequence[Row], table: str | None) -> str:
    """One sentence or two: data set, image counts, schedule, detector, seed, and the unit of AP."""
    paper = TABLES.get(table) if table else None
    head = f"Our runs of the paper's Table {paper.number}" if paper else "Sweep"
    parts = [
        _distinct(_data_name(row) for row in rows),
        _images(rows),
        _distinct(detector_name(row) or None for row in rows),
        _distinct(_schedule_name(row) for row in rows),
        "seed " + (_distinct(lookup(row, "seed") for row in rows) or "unknown"),
    ]
    return f"{head}: {', '.join(part for part in parts if part)}. AP in percent on the validation images."


def setting_name(rows: Sequence[Row]) -> str:
    """What the rows share whatever their detector: `shapes, 385 training and 100 validation images, 128-pixel images,
    schedule quick (12 epochs), 64 channels`."""
    sizes = [(lookup(row, "data", "min_size"), lookup(row, "data", "max_size")) for row in rows]
    parts = [
        _distinct(_data_name(row) for row in rows),
        _images(rows),
        _distinct(_pixels(*size) for size in sizes if None not in size),
        _distinct(_schedule_name(row) for row in rows),
        _distinct(f"{channels} channels" for row in rows if (channels := lookup(row, "model", "channels")) is not None),
    ]
    return ", ".join(part for part in parts if part)


def setting_title(rows: Sequence[Row]) -> str:
    """The data and the schedule alone: `shapes, schedule quick`."""
    schedules = (f"schedule {name}" for row in rows if (name := lookup(row, "schedule", "name")) is not None)
    return ", ".join(part for part in (_distinct(_data_name(row) for row in rows), _distinct(schedules)) if part)


def detector_name(row: Row) -> str:
    """`VFNet ResNet-10`; FCOS as it was first published is marked; torchvision's by their names. Empty where the row
    has no settings."""
    detector = lookup(row, "model", "detector")
    if detector is not None:
        return f"torchvision {detector}"
    head, net = lookup(row, "model", "head", "name"), lookup(row, "model", "backbone", "name")
    if head is None or net is None:
        return ""
    title = row.get("head_title") or TITLES.get(head, head.rpartition(".")[2])
    form = " (original form)" if lookup(row, "model", "head", "norm_on_bbox") is False else ""
    return f"{title}{form} {net_name(net)}"


def net_name(name: str) -> str:
    """resnet50 -> ResNet-50; a net of timm or of the user's own as it is called."""
    return re.sub(r"^resnet(\d+)$", r"ResNet-\1", name)


def notes(rows: Sequence[Row], table: str | None, printed: Sequence[Mapping[str, float]]) -> tuple[str, ...]:
    """What stands below a table. printed: for each row, what the paper prints for its settings, or nothing."""
    lines = [_states(rows), _costs(rows)]
    paper = TABLES.get(table) if table else None
    if paper:
        lines += [comparable(rows, paper), *paper.notes]
        lines += [row.note for row in paper.rows if row.note]
        if not all(printed):
            lines.append(_printed_rows(paper, printed))
    return tuple(line for line in lines if line)


def state(row: Row) -> str:
    """ok, skipped (finished before), failed (exit 1), failed (signal 9), preempted (exit 75), or the row's own word."""
    status = str(row.get("status"))
    if status == "finished":
        return "skipped" if row.get("skipped") else "ok"
    code = row.get("exit_code")
    if status != "failed" or code is None:
        return status
    if code == 75:
        return "preempted (exit 75)"
    return f"failed (signal {-code})" if code < 0 else f"failed (exit {code})"


def _states(rows: Sequence[Row]) -> str:
    counts = Counter(state(row).split(" ")[0] for row in rows)
    meaning = {"skipped": "skipped (finished before, numbers of that run)"}
    what = ", ".join(f"{count} {meaning.get(word, word)}" for word, count in counts.items())
    return f"{len(rows)} {'run' if len(rows) == 1 else 'runs'}: {what}." if rows else "No runs."


def _costs(rows: Sequence[Row]) -> str:
    sizes = _distinct(_size_name(row.get("flops_image_size")) for row in rows)
    where = f"one {sizes} image (height x width)" if sizes and "," not in sizes else "one image at each run's own size"
    return f"FLOPs: the forward pass of {where}, 2 per multiply-add. Time: wall clock of the whole run."


def comparable(rows: Sequence[Row], paper: PaperTable) -> str:
    """How the printed numbers were made, and in what our runs differ from that."""
    recipe = paper.recipe
    differences = _distinct_list(difference for row in rows for difference in departures(row, recipe))
    printed = (
        f"The paper's numbers: trained on {recipe.train} for {recipe.epochs} epochs, images {recipe.min_size} on the "
        f"short side and at most {recipe.max_size} on the long one, ImageNet weights, scored on {recipe.val}."
    )
    if all(_data_name(row) is None for row in rows):
        return printed  # jobs that left no settings behind: nothing is known
    if not differences:
        return f"{printed} Our runs do not differ in that."
    return f"{printed} NOT comparable with ours: {', '.join(differences)}."


def departures(row: Row, recipe: Recipe) -> list[str]:
    """How a run's data, schedule and image size differ from those of a table of the paper; empty: they do not.

    Counts are looked at only in finished runs.
    """
    found = []
    data = lookup(row, "data", "name")
    if data is not None and data != recipe.data:
        found.append(f"{data} data")
    train_images = row.get("train_images")
    if train_images is not None and train_images < recipe.train_images:
        found.append(f"{train_images} training images")
    val_images = row.get("val_images")
    if recipe.val == "test-dev2017":
        found.append("no test-dev score (a server gives it)")
    elif val_images is not None and val_images < recipe.val_images:
        found.append(f"{val_images} validation images")
    if lookup(row, "data", "classes") is not None:
        found.append("a choice of classes")
    channels = lookup(row, "model", "channels")
    if channels is not None and channels != PAPER_CHANNELS:
        found.append(f"{channels} channels")
    epochs = row.get("epochs", lookup(row, "schedule", "epochs"))
    if epochs is not None and epochs != recipe.epochs:
        found.append(f"{epochs} epoch{'' if epochs == 1 else 's'}")
    sizes = (lookup(row, "data", "min_size"), lookup(row, "data", "max_size"))
    if None not in sizes and sizes != (recipe.min_size, recipe.max_size):
        found.append(_pixels(*sizes))
    weights = lookup(row, "model", "backbone", "weights") or lookup(row, "model", "detector_weights")
    if lookup(row, "model", "backbone") is not None and weights is None:
        found.append("no ImageNet weights")
    return found


def _printed_rows(paper: PaperTable, shown: Sequence[Mapping[str, float]]) -> str:
    """The printed numbers that stand beside no run."""
    texts = []
    for row in paper.rows:
        if row.head is None or row.ours or dict(zip(paper.metrics, row.values, strict=True)) in shown:
            continue
        name = [str(row.head), str(row.backbone), f"apply={row.apply}"]
        name += [] if row.align else ["align=false"]
        name += [] if row.separate else ["separate=false"]
        texts.append(f"{' '.join(name)}: {' '.join(str(value) for value in row.values)}")
    if not texts:
        return ""
    names = " ".join(paper.metrics)
    return f"Not every run has a printed row. Printed in Table {paper.number} ({names}): {'; '.join(texts)}."


def _data_name(row: Row) -> str | None:
    name, root = lookup(row, "data", "name"), lookup(row, "data", "root")
    if name is None or root is None or name == "shapes":
        return name
    folder = " ".join(
        PurePath(str(root)).name.split()
    )  # the folder alone: a table may be published, a machine's paths should not
    return name if folder in ("", name) else f"{name} ({folder})"


def _schedule_name(row: Row) -> str | None:
    name, epochs = lookup(row, "schedule", "name"), row.get("epochs", lookup(row, "schedule", "epochs"))
    if name is None:
        return None
    if epochs == 0:  # mode=test
        return "no training"
    return f"schedule {name}" if epochs is None else f"schedule {name} ({epochs} epoch{'' if epochs == 1 else 's'})"


def _images(rows: Iterable[Row]) -> str | None:
    counts = [(row.get("train_images"), row.get("val_images")) for row in rows]
    return _distinct(
        f"{train} training and {val} validation images"
        for train, val in counts
        if train is not None and val is not None
    )


def _pixels(short: int, long: int) -> str:
    return f"images of {short} to {long} pixels" if short != long else f"{short}-pixel images"


def _size_name(size: Sequence[int] | None) -> str | None:
    return None if size is None else f"{size[0]}x{size[1]}"


def _distinct(values: Iterable[Any]) -> str:
    return ", ".join(_distinct_list(setting(value) for value in values if value is not None))


def _distinct_list(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
