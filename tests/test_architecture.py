"""The arrows between the rooms, read off the import statements, and the names that others rely on."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from pathlib import Path

import pytest

import msil
from msil import MSIL, build_detector
from msil.detection import (
    ATSSHead,
    Detections,
    Detector,
    FCOSHead,
    GFLHead,
    Predictions,
    RetinaNetHead,
    Target,
    TOODHead,
    VFNetHead,
)
from msil.detection.heads import HEADS
from msil.detection.weights import from_mmdet

SRC = Path(__file__).resolve().parents[1] / "src"
FILES = {path.relative_to(SRC / "msil").as_posix(): path for path in sorted((SRC / "msil").rglob("*.py"))}
OURS = [*(SRC.rglob("*.py")), SRC.parent / "run.py"]

SHELLS = ("lightning", "hydra", "omegaconf", "torchmetrics", "wandb")
READERS = (
    "torch",
    "torchvision",
    "numpy",
    "PIL",
    "defusedxml",
    "pycocotools",
    "msil.data",
    "msil.detection.structures",
    "msil.detection.preprocess",
)
TEXTS = ("paper", "regenerated", "comparisons", "tables", "paper_tables", "captions", "formats")
PURE = ("boxes", "structures", "priors", "coders", "assign", "losses", "postprocess", "host", "nms")


@dataclass
class Rule:
    """What the files of an fnmatch pattern may import; the first rule that matches a file counts.

    only: if given, nothing but these, the standard library and, with `errors`, msil.errors. never: not these. A name
    stands for itself and what is below it.
    """

    files: str
    only: tuple[str, ...] | None = None
    never: tuple[str, ...] = ()
    errors: bool = True


RULES = [
    Rule("interaction.py", only=("torch",), never=("torch.distributed",), errors=False),
    Rule("attach.py", only=("torch", "msil.interaction"), never=("torch.distributed",), errors=False),
    *(
        Rule(
            f"detection/{name}{'/*' if name == 'assign' else ''}.py",
            only=("torch", "torchvision.ops", *(f"msil.detection.{other}" for other in PURE)),
            never=("torch.nn.Module", "torch.nn.Parameter", *(() if name == "losses" else ("torch.distributed",))),
        )
        for name in PURE
    ),
    Rule(
        "detection/weights.py",
        only=("torch", "torchvision", "safetensors", "msil.detection"),
        never=("torch.distributed",),
    ),
    Rule("detection/timm_backbone.py", only=("torch", "timm", "msil.detection"), never=("torch.distributed",)),
    Rule(
        "detection/*",
        only=("torch", "torchvision", "msil.interaction", "msil.attach", "msil.detection"),
        never=("torch.distributed",),
    ),
    Rule("config.py", only=("hydra", "omegaconf")),
    Rule("checkpoints/*", never=("lightning", "hydra", "wandb", "msil.training", "msil.reporting", "msil.inference")),
    Rule("inference/*", never=("lightning", "hydra", "omegaconf", "wandb", "msil.training", "msil.checkpoints")),
    Rule("data/module.py", only=(*READERS, "lightning")),
    Rule("data/*", only=READERS),
    Rule(
        "metrics/*",
        only=("torch", "torchmetrics", "numpy", "pycocotools", "faster_coco_eval", "msil.metrics",
              "msil.detection.structures", "msil.detection.preprocess", "msil.runs"),
    ),
    # results, paper, tables and what they share: a table is redrawn without waiting for an import
    *(
        Rule(f"reporting/{name}.py", only=("msil.runs", *(f"msil.reporting.{other}" for other in TEXTS)))
        for name in TEXTS
    ),
    Rule("reporting/*", never=("msil.training", "msil.sweep", "msil.inference", *SHELLS)),
    Rule("sweep/orphans.py", only=(), errors=False),
    # ranks counts the GPUs of the machine where nobody has said how many
    Rule("sweep/ranks.py", only=("torch.cuda", "torch", "msil.config", "msil.sweep")),
    Rule("sweep/*", never=("torch", "msil.detection", "msil.data", "msil.metrics", "msil.training", *SHELLS)),
    Rule("training/*", never=("hydra", "omegaconf", "msil.overrides", "msil.sweep", "msil.cli")),
    Rule("__init__.py", only=("msil.interaction", "msil.attach", "msil.detection", "msil.checkpoints.load")),
    Rule("errors.py", only=()),
    Rule("runs.py", only=()),
    Rule("lock.py", only=("msil.runs",)),
    Rule("interruption.py", only=(), errors=False),
    Rule("cli.py"),
    Rule("*", never=("torch", "torchvision", "lightning", "wandb", "msil.detection", "msil.training")),
]  # fmt: skip


def imports(source: str, package: str) -> set[str]:
    """Dotted names of all that is imported, wherever in the file; `from a import b` is a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: -node.level + 1 or None] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{start}.{alias.name}" for alias in node.names}
    return names


def within(name: str, roots: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def violations(rule: Rule, names: set[str]) -> list[str]:
    standard = tuple(sys.stdlib_module_names)
    allowed = None if rule.only is None else (*rule.only, *standard, *(("msil.errors",) if rule.errors else ()))
    return sorted(n for n in names if within(n, rule.never) or (allowed is not None and not within(n, allowed)))


def rule_of(file: str) -> Rule:
    return next(rule for rule in RULES if fnmatch(file, rule.files))


@pytest.mark.parametrize("file", FILES)
def test_arrows(file: str) -> None:
    package = ".".join(["msil", *Path(file).parts[:-1]])
    found = imports(FILES[file].read_text(), package)
    assert not violations(rule_of(file), found)


@pytest.mark.parametrize(
    ("file", "source", "wrong"),
    [
        ("interaction.py", "from msil.errors import UserError", "msil.errors.UserError"),
        ("detection/boxes.py", "from torch.nn import Module", "torch.nn.Module"),
        ("detection/assign/atss.py", "import torch.distributed as dist", "torch.distributed"),
        ("config.py", "from msil.checkpoints.settle import settled", "msil.checkpoints.settle.settled"),
        ("attach.py", "from msil.detection import Detector", "msil.detection.Detector"),
        ("detection/losses.py", "from torchvision.models import resnet50", "torchvision.models.resnet50"),
        ("detection/heads/fcos.py", "def f():\n    import lightning", "lightning"),
        ("detection/heads/fcos.py", "from ...training import module", "msil.training.module"),
        ("data/coco.py", "from msil.detection import Detector", "msil.detection.Detector"),
        ("data/coco.py", "import lightning as L", "lightning"),
        ("metrics/voc.py", "from ..detection.heads.fcos import FCOSHead", "msil.detection.heads.fcos.FCOSHead"),
        ("reporting/figures.py", "from msil.training.module import DetectionModule", "msil.training.module"),
        ("reporting/tables.py", "import numpy as np", "numpy"),
        ("reporting/formats.py", "import yaml", "yaml"),
        ("reporting/tables.py", "from msil.reporting import figures", "msil.reporting.figures"),
        ("training/module.py", "from omegaconf import DictConfig", "omegaconf.DictConfig"),
        ("detection/detector.py", "from safetensors.torch import load_file", "safetensors.torch.load_file"),
        ("checkpoints/load.py", "from msil.training.module import DetectionModule", "msil.training.module"),
        ("inference/predict.py", "import lightning", "lightning"),
    ],
)
def test_a_wrong_arrow_is_seen(file: str, source: str, wrong: str) -> None:
    found = violations(rule_of(file), imports(source, ".".join(["msil", *Path(file).parts[:-1]])))
    assert len(found) == 1 and found[0].startswith(wrong)


def test_config_and_tables_do_not_wait_for_torch() -> None:
    code = "import sys, msil, msil.reporting.tables, msil.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_processes_meet_in_one_function_of_the_losses() -> None:
    tree = ast.parse(FILES["detection/losses.py"].read_text())
    meet = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "mean_across_ranks")
    inside = {id(node) for node in ast.walk(meet)}
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "dist"]
    assert uses and all(id(node) in inside for node in uses)
    names = {name for name in imports(FILES["detection/losses.py"].read_text(), "msil.detection") if "dist" in name}
    assert names == {"torch.distributed"}


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith(("detection/", "interaction"))])
def test_the_detector_touches_files_in_weights_alone(file: str) -> None:
    if file == "detection/weights.py":
        return
    calls = [ast.unparse(n.func) for n in ast.walk(ast.parse(FILES[file].read_text())) if isinstance(n, ast.Call)]
    reading = ("open", "torch.load", "torch.save", "Path.open", "Path.read_text", "Path.read_bytes")
    assert not [call for call in calls if call in reading or call.endswith((".read_text", ".read_bytes"))]


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.relative_to(SRC.parent).as_posix())
def test_house_style(path: Path) -> None:
    assert path.name != "utils.py"
    source = path.read_text()
    assert len(source.splitlines()) <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            assert ast.unparse(node) != "self.apply", "self.apply shadows nn.Module.apply"


def parameters(function) -> dict[str, object]:
    """Names with their defaults, keyword-only ones marked by a star, without self."""
    return {
        ("*" if p.kind is p.KEYWORD_ONLY else "") + name: p.default
        for name, p in inspect.signature(function).parameters.items()
        if name != "self"
    }


def test_public_names() -> None:
    none = inspect.Parameter.empty
    assert parameters(MSIL) == {
        "channels": none, "*align": True, "*separate": True, "*apply": "both", "*kernel_size": 3, "*reduction": 16,
    }  # fmt: skip
    assert list(parameters(MSIL.forward)) == ["cls_feat", "reg_feat"]
    build = parameters(build_detector)
    assert list(build.items())[:3] == [("head", "fcos"), ("backbone", "resnet50"), ("num_classes", 80)]
    assert all(name.startswith("*") for name in list(build)[3:])
    assert dict(build["*msil"]) == {"align": True, "separate": True, "apply": "both"}  # type: ignore[call-overload]
    assert build["*weights"] is None
    assert list(parameters(Detector.predict)) == ["images"]
    assert list(parameters(Detector.loss)) == ["images", "targets"]
    head = parameters(FCOSHead)
    assert list(head.items())[:5] == [
        ("num_classes", none), ("channels", 256), ("*num_convs", 4), ("*norm_groups", 32), ("*msil", None),
    ]  # fmt: skip
    assert parameters(VFNetHead)["*num_convs"] == 3
    assert parameters(RetinaNetHead)["*norm_groups"] is None and isinstance(TOODHead(2, 32).warmup, bool)
    for head_class in (FCOSHead, VFNetHead, RetinaNetHead, ATSSHead, GFLHead, TOODHead):
        assert list(parameters(head_class))[:5] == list(head)[:5]
        assert list(parameters(head_class.towers)) == list(parameters(head_class.forward)) == ["pyramid"]
        assert list(parameters(head_class.loss)) == ["predictions", "targets", "image_sizes"]
        assert list(parameters(head_class.detect)) == [
            "predictions", "image_sizes", "*score_thresh", "*nms_thresh", "*topk_candidates", "*detections_per_img",
        ]  # fmt: skip
    assert list(parameters(from_mmdet)) == ["state_dict"]
    assert [f.name for f in fields(Target)] == ["boxes", "labels", "image_id", "size"]
    assert [f.name for f in fields(Detections)] == ["boxes", "scores", "labels"]
    assert [f.name for f in fields(Predictions)] == ["logits", "box", "map_sizes", "quality", "first_box"]
    assert len(build) <= 10
    assert dir(msil) == sorted(
        ["MSIL", "Detections", "Target", "__version__", "attach_msil", "build_detector", "load_detector"]
    )
    assert all(getattr(msil, name) is not None for name in dir(msil))
    assert (SRC / "msil" / "py.typed").is_file()


def test_a_heads_name_stands_where_it_is_registered_alone() -> None:
    """And as data: in the paper's tables, in the published checkpoints' layouts. Nothing asks which head it has."""
    for file, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                asked = ast.unparse(node.args[1])
                assert not re.search(r"(?<!Dense)Head\b", asked), f"{file} asks for {asked}"
            if isinstance(node, ast.Constant) and node.value in HEADS:
                places = (f"detection/heads/{node.value}.py", "detection/detector.py", "reporting/paper.py")
                assert file in places or file.startswith("checkpoints/"), f"{file} names the head {node.value}"
