"""Which runs belong together, and what a run, a detector and a setting are called. Standard library alone."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from msil.config import MSILConfig, computed, leaves
from msil.errors import counted
from msil.reporting.paper import TITLES, PaperTable, Recipe
from msil.reporting.tables import setting
from msil.runs import data_folder, net_alone, weights_name

Result = Mapping[str, Any]
Lines = Mapping[str, tuple[Result, ...]]  # by a name, runs that differ in their seed alone, by seed

GROUPS = ("model.head", "model.backbone", "model.msil")
WEIGHTS = "model.weights_sha256"  # what counts of model.weights
SCHEDULE = ("schedule.name", "schedule.epochs")
# A head brings its NMS threshold and its warm-up's start; a backbone its mean and std.
BROUGHT = ("model.nms_thresh", "model.image_mean", "model.image_std", "schedule.warmup_factor")
# Channels: a wider plain detector is a row beside MSIL of the same cost.
ROW = (*GROUPS, "model.channels", "model.detector", "model.detector_weights", *BROUGHT)
# How the paper is read where it is silent; other values are named.
USUAL_BLOCK = {name: getattr(MSILConfig(), name) for name in ("kernel_size", "reduction", "init_gate")}
PAPER_CHANNELS = 256  # of FPN and head, in every published recipe


@dataclass(frozen=True)
class DetectorLines:
    """All lines of one head on one backbone by the labels of their blocks, plain first, then the whole MSIL.
    name: "VFNet ResNet-10"."""

    name: str
    lines: Lines

    def pair(self) -> tuple[tuple[Result, ...], tuple[Result, ...]] | None:
        """The runs of the plain detector and of the one with the whole MSIL, where both ran."""
        plain, msil = map(self.lines.get, ("plain", "MSIL"))
        return (plain, msil) if plain and msil else None


def lookup(row: Result, *path: str) -> Any:
    """row["config"][path[0]][path[1]]..., or None where a part is missing."""
    node: Any = row.get("config")
    for part in path:
        if not isinstance(node, Mapping) or part not in node:
            return None
        node = node[part]
    return node


def settings(results: Iterable[Result]) -> list[list[Result]]:
    """The training runs of `results`, those of one setting together, the setting with most runs first.

    Runs that differ only in detector, block and seed form one setting: their rows may stand in one table.
    """
    groups: dict[str, list[Result]] = {}
    for result in results:
        if lookup(result, "mode") in (None, "train"):
            groups.setdefault(key(result, *ROW), []).append(result)
    return sorted(groups.values(), key=lambda group: -len(group))


def by_images(results: Iterable[Result]) -> list[tuple[str, list[Result]]]:
    """Runs that were scored on the same images together, behind what these are in words; the images of most runs first,
    then those that were trained on too."""
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for run in results:
        split = lookup(run, "data", "split") or lookup(run, "data", "val_split")
        digests, train = run.get("data") or {}, lookup(run, "data", "train_split")
        digest = (digests.get(split) or {}).get("annotations")
        same = split in digests and (digests.get(train) or {}).get("images") == digests[split].get("images")
        held_out = lookup(run, "data", "val_fraction") is not None and split == lookup(run, "data", "val_split")
        # A test says it itself. The digests are of the whole split that both parts are of.
        seen = run.get("seen", train == split or (same and not held_out))
        classes = ", ".join(sorted(run.get("classes") or ()))
        words = f"{data_name(run)}, {run['val_images']} " + ("held-out images" if held_out else f"images of {split}")
        groups.setdefault((seen, words, split, classes, held_out, digest), []).append(run)
    found = []
    for (seen, words, _, classes, *_), runs in sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1]))):
        words += f", classes {classes}" if lookup(runs[0], "data", "classes") is not None else ""  # where chosen
        words += ", on which these runs were trained: it says nothing of other images" if seen else ""
        found.append((words, runs))
    return found


def line_names(runs: Sequence[Result]) -> list[str]:
    """`FCOS ResNet-10 MSIL`, and of what is called alike the settings that differ, `FCOS ResNet-10 MSIL, lr=0.004`."""
    names = zip(detectors_with_width(runs), runs, strict=True)
    return distinct_names([f"{name} {block_label(run)}" for name, run in names], runs, ())


def usual_width(runs: Sequence[Result]) -> int | None:
    """The channels that most runs have; None of no run."""
    counts = Counter(lookup(run, "model", "channels") for run in runs)
    return max(counts, key=counts.__getitem__, default=None)


def detectors_with_width(runs: Sequence[Result]) -> list[str]:
    """`FCOS ResNet-10`, or `FCOS ResNet-10 96 channels` where most runs have another width."""
    usual, widths = usual_width(runs), [lookup(run, "model", "channels") for run in runs]
    return [detector_name(run) + ("" if width in (None, usual) else f" {width} channels")
            for run, width in zip(runs, widths, strict=True)]  # fmt: skip


def differing_settings(runs: Sequence[Result]) -> list[str]:
    """Full names of the settings, the seed too, that differ between runs; head, backbone and block each as one."""
    values = [dict(leaves(computed(run["config"], BROUGHT))) for run in runs]
    paths = dict.fromkeys(path for one in values for path in one)
    differing = [path for path in paths if len({str(one.get(path)) for one in values}) > 1 and path != WEIGHTS]
    whole = (*GROUPS, "data.classes")
    groups = [next((group for group in whole if path.startswith(f"{group}.")), path) for path in differing]
    return list(dict.fromkeys(groups))


def detectors(group: Sequence[Result]) -> list[DetectorLines]:
    """The runs of one setting by detector and line; the detector with most lines first."""
    found: dict[str, dict[str, list[Result]]] = {}
    for run in group:
        found.setdefault(key(run, "model.msil"), {}).setdefault(block_label(run), []).append(run)
    firsts = [next(iter(lines.values()))[0] for lines in found.values()]
    made = []
    for name, lines in zip(distinct_names(detectors_with_width(firsts), firsts), found.values(), strict=True):
        ordered = sorted(lines.items(), key=lambda item: (item[0] != "plain", item[0] != "MSIL", item[0]))
        made.append(DetectorLines(name, {label: one_a_seed(runs) for label, runs in ordered}))
    return sorted(made, key=lambda detector: (-len(detector.lines), detector.name))


def one_a_seed(runs: Sequence[Result]) -> tuple[Result, ...]:
    """The runs by seed; of several with one seed the first by name."""
    by_seed: dict[int, Result] = {}
    for run in sorted(runs, key=lambda run: str(run["run_name"])):
        by_seed.setdefault(run["seed"], run)
    return tuple(by_seed[seed] for seed in sorted(by_seed))


def key(run: Result, *without: str) -> str:
    """What a run computes, but for its seed and the settings named; a null counts as a setting that is not there."""
    return json.dumps(_computed(run, "seed", *without), sort_keys=True)


def _computed(run: Result, *without: str) -> dict[str, Any]:
    """Also where the training was continued for more epochs: its lr took another way."""
    classes = lookup(run, "data", "classes")  # new names are one setting too
    # The settings of a block that is not there.
    unused = ("model.msil",) if lookup(run, "model", "msil", "apply") == "none" else ()
    found = dict(leaves(computed(run["config"], (*without, *unused, "data.classes"))))
    return found | dict(leaves({"data.classes": classes and setting(classes), "continued": continued(run)}))


def continued(run: Result) -> str:
    """no, or the schedules before its own: `from 6 epochs`."""
    before = [counted(one["epochs"], "epoch") for one in run.get("continued") or ()]
    return f"from {', '.join(before)}" if before else "no"


def block_label(run: Result) -> str:
    """plain, MSIL (the whole block on both branches), MSIL cls, MSIL without alignment, MSIL kernel_size=1 ...; a block
    of the user's own by its class, MyBlock depth=2."""
    block = lookup(run, "model", "msil") or {}
    if block.get("apply") == "none":
        return "plain"
    if has_own_block(run):
        return own_block(block)
    words = ["MSIL", *([block["apply"]] if block["apply"] != "both" else [])]
    words += [] if block["align"] else ["without alignment"]
    words += [] if block["separate"] else ["without separation"]
    return " ".join([*words, *unusual(block)])


def has_own_block(run: Result) -> bool:
    block = lookup(run, "model", "msil")
    return block["apply"] != "none" and bool(block.get("block"))


def own_block(block: Mapping[str, Any]) -> str:
    """MyBlock, or MyBlock depth=2, of a block of the user's own."""
    options = [f"{name}={setting(value)}" for name, value in (block.get("options") or {}).items()]
    return " ".join([block["block"].rpartition(".")[2], *options])


def unusual(block: Mapping[str, Any]) -> list[str]:
    """Settings of MSIL beyond the usual ones, as typed."""
    return [f"{name}={setting(block[name])}" for name, usual in USUAL_BLOCK.items()
            if block.get(name) not in (None, usual)]  # fmt: skip


def distinct_names(names: Sequence[str], runs: Sequence[Result], without: Sequence[str] = ("model.msil",)) -> list[str]:
    """The names of runs; equal ones are followed by the settings, but for those of `without`, that differ between them,
    num_convs=2, as typed. Runs that still share a name differ in those of `without` and in the seed alone."""
    values = [_computed(run, "seed", *without) for run in runs]
    apart = []
    for name, own, run in zip(names, values, runs, strict=True):
        alike = [other for other_name, other in zip(names, values, strict=True) if other_name == name]
        paths = dict.fromkeys(path for other in alike for path in other)
        differing = [path for path in paths if len({str(other.get(path)) for other in alike}) > 1]
        schedules = {other.get("schedule.name") for other in alike}
        differing = [  # but what is one in all runs of a schedule: its name says that
            path for path in differing if path in SCHEDULE or not path.startswith("schedule.")
            or len({(other.get("schedule.name"), str(other.get(path))) for other in alike}) > len(schedules)
        ]  # fmt: skip
        words = [_typed(path, own.get(path), run, runs) for path in differing]
        apart.append(", ".join(part for part in (name, *words) if part))
    return apart


def _typed(path: str, value: Any, run: Result, runs: Sequence[Result]) -> str:
    """num_convs=2; weights=NAME, with the digest where another file of that name is among those of `runs`."""
    if path != WEIGHTS or value is None:
        return f"{path.removesuffix('.name').removesuffix('_sha256').rpartition('.')[2]}={setting(value)}"
    name, *names = [weights_name(lookup(one, "model", "weights")) for one in (run, *runs)]
    files = {lookup(one, *WEIGHTS.split(".")) for other, one in zip(names, runs, strict=True) if other == name}
    return f"weights={name}" + (f" {value[:8]}" if len(files) > 1 else "")


def detector_name(row: Result) -> str:
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
    """resnet50 -> ResNet-50; a net of timm as it is called, one of the user's own by its class."""
    return re.sub(r"^resnet(\d+)$", r"ResNet-\1", net_alone(name))


def setting_name(rows: Sequence[Result]) -> str:
    """What the rows share whatever their detector: `shapes, 385 training and 100 validation images, 128-pixel images,
    schedule quick (12 epochs), 64 channels`."""
    counts = [(row.get("train_images"), row.get("val_images")) for row in rows]
    sizes = [(lookup(row, "data", "min_size"), lookup(row, "data", "max_size")) for row in rows]
    width = usual_width(rows)
    return joined([
        distinct(data_name(row) for row in rows),
        distinct(f"{train} training and {val} validation images" for train, val in counts if train and val),
        distinct(_pixels(*size) for size in sizes if None not in size),
        distinct(schedule_name(row) for row in rows),
        f"{width} channels" if width is not None else "",
    ])  # fmt: skip


def data_name(row: Result) -> str | None:
    """`coco (coco128)`: the folder alone, since a table may be published and a machine's paths should not."""
    name, root = lookup(row, "data", "name"), lookup(row, "data", "root")
    if name is None or root is None or name == "shapes":
        return name
    folder = " ".join(str(lookup(row, "data", "title") or PurePath(data_folder(row["config"]["data"])).name).split())
    return name if folder in ("", name) else f"{name} ({folder})"


def schedule_name(row: Result) -> str | None:
    name, epochs = lookup(row, "schedule", "name"), row.get("epochs", lookup(row, "schedule", "epochs"))
    if name is None:
        return None
    if epochs == 0:  # mode=test
        return "no training"
    steps = lookup(row, "schedule", "max_steps")
    most = None if steps is None else f"at most {counted(steps, 'step')}"
    length = most or (None if epochs is None else counted(epochs, "epoch"))
    return f"schedule {name}" + (f" ({length})" if length else "")


def own_score(metrics: Mapping[str, Any]) -> str:
    """The metric that a data set has of its own: VOC_AP of VOC's, else AP."""
    return "VOC_AP" if "VOC_AP" in metrics else "AP"


def distinct(values: Iterable[Any]) -> str:
    """The values but None, each once."""
    return ", ".join(dict.fromkeys(setting(value) for value in values if value is not None))


def joined(parts: Iterable[str]) -> str:
    return ", ".join(part for part in parts if part)


def comparable(rows: Sequence[Result], paper: PaperTable) -> str:
    """How the printed numbers were made, and in what our runs differ from that."""
    recipe = paper.recipe
    differences = distinct(difference for row in rows for difference in departures(row, recipe))
    ours = f"NOT comparable with ours: {differences}." if differences else "Our runs do not differ in that."
    return (
        f"The paper's numbers: trained on {recipe.train} for {recipe.epochs} epochs, images {recipe.min_size} on the "
        f"short side and at most {recipe.max_size} on the long one, ImageNet weights, scored on {recipe.val}. "
        f"{ours}"
    )


def departures(row: Result, recipe: Recipe) -> list[str]:
    """How a run's data, schedule and image size differ from those of a table of the paper; empty: they do not."""
    data, model = row["config"]["data"], row["config"]["model"]
    test_dev = recipe.val == "test-dev2017"
    size, weights = (data.get("min_size"), data.get("max_size")), lookup(row, "model", "backbone", "weights")
    differs = {
        f"{data.get('name')} data": data.get("name") != recipe.data,
        "no test-dev score (a server gives it)": test_dev,
        f"{row['train_images']} training images": (row["train_images"] or 0) < recipe.train_images,
        f"{row['val_images']} validation images": not test_dev and row["val_images"] < recipe.val_images,
        "a choice of classes": data.get("classes") is not None,
        f"{model.get('channels')} channels": model.get("channels") != PAPER_CHANNELS,
        counted(row["epochs"], "epoch"): row["epochs"] != recipe.epochs,
        _pixels(*size): size != (recipe.min_size, recipe.max_size),
        "no ImageNet weights": not (weights or model.get("detector_weights")),
    }
    return [difference for difference, found in differs.items() if found]


def _pixels(short: int, long: int) -> str:
    return f"images of {short} to {long} pixels" if short != long else f"{short}-pixel images"
