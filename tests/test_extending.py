"""The examples of docs/extending.md, taken out of it and run."""

from __future__ import annotations

import importlib
import logging
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.models import regnet_y_400mf

from msil import MSIL, Target, load_detector
from msil.compose import register
from msil.data.module import build_split
from msil.detection import ATSSHead, Predictions
from msil.runs import read_result

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
COMMANDS = [line for kind, text in BLOCKS if kind == "console" for line in text.splitlines()]
(SNIPPET,) = [text for kind, text in BLOCKS if kind == "python" and not text.startswith("# ")]

TINY = (
    "schedule=smoke", "schedule.max_steps=1", "model.channels=16", "model.head.num_convs=1", "model.head.norm_groups=4",
    "trainer.accelerator=cpu", "trainer.progress_bar=false", "data.workers=0",
)  # fmt: skip
SHAPES = ("data.num_train=8", "data.num_val=4", "data.image_size=64")

# One box for each of two levels, in an image of 256 x 256.
TARGET = Target(torch.tensor([[16.0, 24, 80, 88], [100, 60, 228, 188]]), torch.tensor([2, 0]))
MAP_SIZES = tuple((256 // stride, 256 // stride) for stride in (8, 16, 32, 64, 128))


def command(*words: str) -> list[str]:
    """The document's only command that has these words, without python."""
    (found,) = [line for line in COMMANDS if all(word in line for word in words)]
    python, *rest = shlex.split(found)
    assert python == "python"
    return rest


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The document's files, in a folder that is the working directory and importable."""
    for _, text in BLOCKS:
        if text.startswith("# "):
            path = tmp_path / text.partition("\n")[0].removeprefix("# ")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    root = logging.getLogger()  # which Hydra sets up for the whole process
    handlers, level = root.handlers[:], root.level
    yield tmp_path
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


def run(monkeypatch: pytest.MonkeyPatch, words: list[str], *more: str) -> Path:
    """The command in this process, made small by `more`; returns the folder of the only run."""
    register()
    monkeypatch.setattr(sys, "argv", [*words, *more])
    runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    (folder,) = [path for path in Path("runs").iterdir() if path.name != "sweeps"]
    return folder


def last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


def test_a_block_is_trained_and_saved(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run(monkeypatch, command("SumBlock", "options"), *TINY, *SHAPES)
    assert "_SumBlock_" in folder.name
    state = torch.load(last(folder), weights_only=True)["state_dict"]
    block = {key.partition(".")[2] for key in state if ".msil." in key}
    assert block == {"head.msil.conv.weight", "head.msil.conv.bias"}
    detector: Any = load_detector(last(folder))[0]
    assert (type(detector.head.msil).__name__, detector.head.msil.scale) == ("SumBlock", 0.5)


@pytest.mark.parametrize(
    ("word", "names"),
    [("SumBlock", ["resnet10_msil-both", "resnet10_SumBlock"]), ("RegNet", ["resnet10_msil-both", "RegNet_msil-both"])],
)
def test_a_sweep_lists_ours_and_your_own(
    written: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], word: str, names: list[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, command("-m", word), *TINY, *SHAPES, "hydra.launcher.dry_run=true")
    assert end.value.code == 0
    folders = re.findall(r"^\[\d/2\] .* runs/shapes_fcos_([\w.-]+)_smoke_s0_\w{8}$", capfd.readouterr().out, re.M)
    assert folders == names


def test_a_head_is_trained_and_saved(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run(monkeypatch, command("--config-dir", "qfl"), *TINY, *SHAPES)
    result = read_result(folder)
    assert result is not None and result["head_title"] == "QFL" and "_QFLHead_" in folder.name
    detector: Any = load_detector(last(folder))[0]
    assert (detector.head.options.topk, detector.head.assigner.topk) == (13, 13)


def test_the_heads_losses_reach_all_of_its_parameters(written: Path) -> None:
    torch.manual_seed(0)
    small = {"num_convs": 1, "norm_groups": 4, "msil": {"reduction": 4}}
    head = importlib.import_module("my_package.heads").QFLHead(3, 16, **small)
    predictions = head([torch.randn(1, 16, *size) for size in MAP_SIZES])
    assert (predictions.box > 0).all()  # distances
    losses = head.loss(predictions, [TARGET], [(256, 256)])
    torch.stack(list(losses.values())).sum().backward()
    assert [name for name, p in head.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_the_heads_losses_of_perfect_predictions_are_0_and_their_detections_the_truth(written: Path) -> None:
    head = importlib.import_module("my_package.heads").QFLHead(3, 16, norm_groups=4)
    count = sum(height * width for height, width in MAP_SIZES)
    empty = Predictions(torch.zeros(1, count, 3), torch.ones(1, count, 4), MAP_SIZES)
    truth = head.targets(empty, [TARGET], [(256, 256)])
    is_class = F.one_hot(truth.labels, 4)[..., :3] == 1
    # left, top, right, bottom in strides
    priors = head.priors_of(empty)
    distances = torch.cat([priors.centers - truth.boxes[..., :2], truth.boxes[..., 2:] - priors.centers], -1)
    perfect = Predictions(torch.where(is_class, 20.0, -20.0), distances / priors.strides[:, None], MAP_SIZES)
    losses = head.loss(perfect, [TARGET], [(256, 256)])
    assert {name: round(loss.item(), 5) for name, loss in losses.items()} == {"loss_cls": 0, "loss_bbox": 0}
    (found,) = head.detect(perfect, [(256, 256)])
    order = found.labels.argsort(descending=True)
    torch.testing.assert_close(found.boxes[order], TARGET.boxes)
    assert found.labels[order].tolist() == TARGET.labels.tolist()


def test_a_backbone_is_trained_and_saved(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = command("--config-dir", "regnet")
    assert words.pop() == "model.backbone.weights=DEFAULT"
    folder = run(monkeypatch, words, *TINY, *SHAPES)
    result = read_result(folder)
    assert result is not None and result["command"].count("regnet") == 1 and "_fcos_RegNet_" in folder.name
    detector: Any = load_detector(last(folder))[0]
    theirs = {key for key in regnet_y_400mf(weights=None).state_dict() if not key.startswith("fc.")}
    assert {key.removeprefix("body.") for key in detector.backbone.state_dict()} == theirs


def test_from_python(written: Path) -> None:
    names: dict[str, Any] = {}
    exec(SNIPPET, names)
    assert type(names["with_block"].head.msil).__name__ == "SumBlock"
    assert isinstance(names["with_head"].head.msil, MSIL)
    atss, head = ATSSHead(3), names["head"]
    count = sum(height * width for height, width in MAP_SIZES)
    empty = Predictions(torch.zeros(1, count, 3), torch.ones(1, count, 4), MAP_SIZES)
    theirs, ours = (kind.targets(empty, [TARGET], [(256, 256)]) for kind in (atss, head))
    assert torch.equal(ours.labels, theirs.labels) and theirs.positive.any()

    backbone = names["with_backbone"].backbone.eval()
    images = torch.randn(1, 3, 96, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = backbone(images)
        assert [tuple(level.shape[2:]) for level in maps] == [(12, 20), (6, 10), (3, 5)]  # strides 8, 16, 32
        net = regnet_y_400mf(weights=None).eval()
        assert net.load_state_dict(backbone.body.state_dict(), strict=False).missing_keys == ["fc.weight", "fc.bias"]
        assert torch.equal(maps[2], net.trunk_output(net.stem(images)))


def test_a_data_set(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (written / "boxes.csv").write_text(
        "file,split,label,x1,y1,x2,y2\n"
        "a.jpg,train,dog,12,20,60,58.5\na.jpg,train,cat,40,8,90,62\nb.jpg,train,dog,5,5,50,44\nc.jpg,train,,,,,\n"
        "d.jpg,val,cat,30,10,70,50\n"
    )
    (written / "images").mkdir()
    upright = Image.Exif()
    upright[0x0112] = 6  # to be turned by 90 degrees
    for name in "abcd":
        stored, exif = ((64, 96), upright) if name == "b" else ((96, 64), Image.Exif())
        Image.new("RGB", stored).save(written / "images" / f"{name}.jpg", exif=exif)
    words = command("csv_to_coco.py")
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(words[0], run_name="__main__")

    data = {"name": "coco", "root": "data/mine", "strict": True}
    train, val = (build_split(data, split) for split in ("train", "val"))
    assert train.classes == val.classes == ("cat", "dog")
    targets = [train[i][1] for i in range(3)]
    assert [target.size for target in targets] == [(64, 96)] * 3
    assert [target.labels.tolist() for target in targets] == [[1, 0], [1], []]
    assert targets[0].boxes.tolist() == [[12, 20, 60, 58.5], [40, 8, 90, 62]]
    assert val[0][1].boxes.tolist() == [[30, 10, 70, 50]]

    folder = run(monkeypatch, command("data=coco"), *TINY, "data.min_size=64", "data.max_size=96")
    result = read_result(folder)
    assert result is not None and (result["train_images"], result["val_images"]) == (2, 1)  # c has no box to learn
