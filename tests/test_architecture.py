"""The arrows between the rooms, read off the import statements, and the names that others rely on."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import msil
from msil import MSIL, build_detector
from msil.detection import Detections, Detector, Predictions, Target
from msil.detection.heads import HEADS
from msil.detection.weights import from_mmdet

ROOM = Path(msil.__file__).parent
FILES = {path.relative_to(ROOM).as_posix(): path for path in sorted(ROOM.rglob("*.py"))}
SHELLS = ("lightning", "hydra", "omegaconf", "wandb")
# What the files of a room, or one file, never import; the longest prefix counts.
NEVER = {
    "": ("msil.main", "msil.cli"),
    "interaction.py": ("msil", *SHELLS),
    "config.py": ("torch", "msil.detection", "msil.training", "msil.checkpoints"),
    "detection/": (*SHELLS, "msil.data", "msil.metrics", "msil.training", "msil.config", "msil.runs"),
    "data/": ("msil.detection.heads", "msil.detection.detector", "msil.training", "msil.metrics", "msil.config"),
    "metrics/": ("msil.detection.heads", "msil.detection.detector", "msil.training", "msil.data.module", *SHELLS),
    "checkpoints/": ("lightning", "wandb", "msil.training", "msil.reporting", "msil.inference"),
    "training/": ("hydra", "msil.sweep", "msil.launch"),
    "reporting/": ("lightning", "wandb", "msil.training", "msil.sweep", "msil.detection.heads"),
    "inference/": ("lightning", "wandb", "msil.training"),
    "sweep/": ("torch", "lightning", "msil.detection", "msil.data", "msil.training"),
    "launch/": ("lightning", "msil.detection", "msil.data", "msil.training"),
    "main.py": (),
    "cli.py": (),
}


def imports(file: str) -> set[str]:
    """Dotted names of all that is imported, wherever in the file; `from a import b` is a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(FILES[file].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_arrows() -> None:
    wrong = []
    for file in FILES:
        rule = max((prefix for prefix in NEVER if file.startswith(prefix)), key=len)
        wrong += [f"{file}: {n}" for n in imports(file) for never in NEVER[rule] if f"{n}.".startswith(f"{never}.")]
    assert not wrong


def test_the_block_and_the_heads_need_torch_torchvision_numpy_and_safetensors_alone() -> None:
    code = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('lightning', 'hydra', 'omegaconf', 'wandb', 'torchmetrics', 'pycocotools',\n"
        "                                  'yaml', 'matplotlib', 'timm', 'defusedxml', 'filelock'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "import msil\n"
        "assert 'torch' not in sys.modules\n"
        "for name in dir(msil):\n"
        "    assert getattr(msil, name) is not None\n"
        "import msil.checkpoints.load\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    # torch itself may use filelock, late
    assert done.returncode == 0, done.stderr


def test_size_and_style() -> None:
    for file, path in FILES.items():
        source = path.read_text()
        assert len(source.splitlines()) <= 350, file
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                assert ast.unparse(node) != "self.apply", f"{file}: self.apply shadows nn.Module.apply"


def test_a_heads_name_stands_where_it_is_registered_alone() -> None:
    """And as data: in the paper's tables, in the published checkpoints' layouts."""
    for file, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                asked = ast.unparse(node.args[1])
                assert not re.search(r"(?<!Dense)Head\b", asked), f"{file} asks for {asked}"
            if isinstance(node, ast.Constant) and node.value in HEADS:
                places = (f"detection/heads/{node.value}.py", "detection/detector.py", "reporting/paper.py", "cli.py")
                assert file in places or file.startswith("checkpoints/"), f"{file} names the head {node.value}"


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
        "*init_gate": None,
    }  # fmt: skip
    build = parameters(build_detector)
    assert list(build.items())[:3] == [("head", "fcos"), ("backbone", "resnet50"), ("num_classes", 80)]
    assert len(build) <= 10 and all(name.startswith("*") for name in list(build)[3:])
    assert list(parameters(Detector.predict)) == ["images"]
    assert list(parameters(Detector.loss)) == ["images", "targets"]
    for head in HEADS.values():
        assert list(parameters(head))[:5] == ["num_classes", "channels", "*num_convs", "*norm_groups", "*msil"]
        assert list(parameters(head.towers)) == list(parameters(head.forward)) == ["pyramid"]
        assert list(parameters(head.loss)) == ["predictions", "targets", "image_sizes"]
        assert list(parameters(head.detect)) == [
            "predictions", "image_sizes", "*score_thresh", "*nms_thresh", "*topk_candidates", "*detections_per_img",
        ]  # fmt: skip
    assert list(parameters(from_mmdet)) == ["state_dict"]
    assert [f.name for f in fields(Target)] == ["boxes", "labels", "image_id", "size"]
    assert [f.name for f in fields(Detections)] == ["boxes", "scores", "labels"]
    assert [f.name for f in fields(Predictions)] == ["logits", "box", "map_sizes", "quality", "first_box"]
    assert dir(msil) == sorted(msil.__all__) and (ROOM / "py.typed").is_file()
