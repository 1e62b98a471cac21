"""The exported file against Detector.predict, its form, and the ways in which an export can fail."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from msil.detection import Detections, Detector, build_detector
from msil.detection.detector import FULL_MSIL
from msil.detection.heads import head_class
from msil.errors import ConfigError
from msil.inference import export
from msil.inference.export import export_onnx
from msil.inference.export_check import ExportError, difference, made_up_image

onnx = pytest.importorskip("onnx", reason='needs pip install -e ".[export]"')
pytest.importorskip("onnxscript", reason='needs pip install -e ".[export]"')
onnxruntime = pytest.importorskip("onnxruntime", reason='needs pip install -e ".[export]"')

CLASSES = ["a", "b", "c", "ä"]
CLS_ONLY = {"align": False, "separate": False, "apply": "cls"}


def lively_detector(head: str, **settings: Any) -> Detector:
    """A small net whose random weights find dozens of things: more than its limits let through."""
    torch.manual_seed(0)
    limits = {"score_thresh": 0.05, "topk_candidates": 150, "detections_per_img": 20}
    msil = settings.pop("msil", FULL_MSIL)
    options = head_class(head).Options(num_convs=1, norm_groups=8)
    detector = build_detector(options, "resnet10", 4, channels=32, msil=msil)
    for name, value in {**limits, **settings}.items():
        setattr(detector, name, value)
    for name, weight in detector.head.named_parameters():
        if weight.dim() == 4:
            nn.init.kaiming_normal_(weight)
            if head == "vfnet" and name.startswith("bbox_"):
                weight.data *= 0.2  # into an exponential
    nn.init.constant_(detector.head.cls_logits.bias, -3)  # pyright: ignore[reportArgumentType]
    return detector


def run(path: Path, image: Tensor) -> Detections:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return Detections(*(torch.from_numpy(array) for array in session.run(None, {"image": image.numpy()})))


def assert_same(found: Detections, expected: Detections) -> None:
    """Each expected detection has its partner, wherever it stands: equal scores may come in any order."""
    assert len(found.scores) == len(expected.boxes) and (found.scores[:-1] >= found.scores[1:]).all()
    boxes = (found.boxes - expected.boxes[:, None]).abs().amax(-1)
    scores = (found.scores - expected.scores[:, None]).abs()
    partner = (boxes <= 1e-2) & (scores <= 1e-4) & (found.labels == expected.labels[:, None])
    assert partner.any(0).all() and partner.any(1).all()


@pytest.fixture(scope="module")
def any_size(tmp_path_factory: pytest.TempPathFactory) -> tuple[Detector, Path, list[str]]:
    """FCOS with a part of MSIL, in BGR, for images of any size; its file, and what was printed."""
    detector = lively_detector("fcos", msil=CLS_ONLY, channel_order="bgr", min_size=64, max_size=96).train()
    detector.test_scales, detector.test_flip = (48, 64), True
    path = tmp_path_factory.mktemp("export") / "new folder" / "detector.onnx"
    return detector, path, export_onnx(detector, path, classes=CLASSES, image_size=(96, 128))


def test_what_is_printed_and_the_detector_is_left_as_it_was(any_size: tuple[Detector, Path, list[str]]) -> None:
    detector, path, lines = any_size
    assert [file.name for file in path.parent.iterdir()] == ["detector.onnx"]
    assert "test_scales and model.test_flip have no part in it" in lines[1]
    for line, size in zip(lines[2:], ("96 x 128", "85 x 73"), strict=True):
        count, box, score = re.search(r"(\d+) detections agree with PyTorch to (\S+) px and (\S+) in", line).groups()  # pyright: ignore
        assert size in line and int(count) > 10 and float(box) <= 1e-2 and float(score) <= 1e-4
    assert detector.training and detector.head.training
    assert (detector.min_size, detector.max_size, detector.score_thresh) == (64, 96, 0.05)
    assert (detector.test_scales, detector.test_flip) == ((48, 64), True)
    assert all(parameter.requires_grad for parameter in detector.parameters())


# 33 and 70 need padding; at 32 and 64 the last levels are single points; 200 x 136 has more of them than any before.
@pytest.mark.parametrize("size", [(32, 32), (64, 96), (70, 33), (200, 136)])
def test_file_takes_images_of_any_size(any_size: tuple[Detector, Path, list[str]], size: tuple[int, int]) -> None:
    detector, path, _ = any_size
    image = made_up_image(size, seed=11)
    plain = copy.deepcopy(detector)
    plain.min_size = plain.max_size = plain.test_scales = None
    plain.test_flip = False
    (expected,) = plain.predict([image])
    assert len(expected.boxes) > 3
    assert_same(run(path, image), expected)


def test_file_is_valid_and_describes_itself(any_size: tuple[Detector, Path, list[str]]) -> None:
    path = any_size[1]
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {entry.key: entry.value for entry in model.metadata_props} == {
        "classes": json.dumps(CLASSES), "min_size": "64", "max_size": "96", "score_thresh": "0.05", "nms_thresh": "0.6",
        "detections_per_img": "20",
    }  # fmt: skip
    session = onnxruntime.InferenceSession(path)
    assert [(put.name, put.type, put.shape) for put in (*session.get_inputs(), *session.get_outputs())] == [
        ("image", "tensor(uint8)", [3, "height", "width"]),
        ("boxes", "tensor(float)", ["detections", 4]),
        ("scores", "tensor(float)", ["detections"]),
        ("labels", "tensor(int64)", ["detections"]),
    ]
    # Nothing of the machine that wrote it.
    assert str(Path(export.__file__).parent).encode() not in path.read_bytes()


def test_a_file_of_one_size(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    detector, path = lively_detector("fcos"), tmp_path / "x.onnx"
    lines = export_onnx(detector, path, classes=CLASSES, image_size=(90, 130), dynamic=False)
    assert tuple(capfd.readouterr()) == ("", "")  # without the exporter's remarks
    assert "one image of 90 x 130 pixels" in lines[0] and len(lines) == 2
    assert onnxruntime.InferenceSession(path).get_inputs()[0].shape == [3, 90, 130]
    image = made_up_image((90, 130), seed=12)
    assert_same(run(path, image), detector.predict([image])[0])


def test_a_file_for_batches(tmp_path: Path) -> None:
    detector, path, said = lively_detector("fcos", channel_order="bgr", score_thresh=0.07), tmp_path / "x.onnx", []
    lines = export_onnx(
        detector, path, classes=CLASSES, image_size=(64, 90), dynamic=False, batch=3, progress=said.append
    )
    assert "3 images of 64 x 90 pixels" in lines[0] and [line.split()[0] for line in said] == ["exporting", "checking"]
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [(put.name, put.shape) for put in (*session.get_inputs(), *session.get_outputs())] == [
        ("images", [3, 3, 64, 90]), ("boxes", [3, 20, 4]), ("scores", [3, 20]), ("labels", [3, 20]), ("counts", [3]),
    ]  # fmt: skip
    images = torch.stack(
        [made_up_image((64, 90), 11), torch.full((3, 64, 90), 120).byte(), made_up_image((64, 90), 12)]
    )
    boxes, scores, labels, counts = map(torch.from_numpy, session.run(None, {"images": images.numpy()}))
    assert counts.min() < 20 == counts.max()  # some are filled up, and one is not
    for place, (count, expected) in enumerate(zip(counts.tolist(), detector.predict(images), strict=True)):
        assert_same(Detections(boxes[place, :count], scores[place, :count], labels[place, :count]), expected)
        assert (
            not boxes[place, count:].any() and not scores[place, count:].any() and (labels[place, count:] == -1).all()
        )
    with pytest.raises(ExportError, match="a batch must hold 1 image or more, but is to hold 0"):
        export_onnx(detector, path, classes=CLASSES, batch=0)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["vfnet", "retinanet", "tood"])
def test_other_heads_at_any_size(head: str, tmp_path: Path) -> None:
    detector = lively_detector(head)
    export_onnx(detector, tmp_path / "x.onnx", classes=CLASSES, image_size=(96, 128))
    for size in ((32, 32), (200, 136)):
        image = made_up_image(size, seed=13)
        assert_same(run(tmp_path / "x.onnx", image), detector.predict([image])[0])


def shifted(name: str, shift: float) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        (constant,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
        constant.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(constant) + shift, name))

    return change


def broken(model: Any) -> None:
    del model.graph.node[5:8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shifted("detector.head.bbox_ctrness.weight", 1e-3), "place by place, boxes by up to .* px"),
        (shifted("detector.head.cls_logits.bias", -2.0), "[0-9]+ detections instead of 20"),
        (broken, "onnxruntime cannot run the exported file"),
    ],
)
def test_a_file_that_differs_is_not_kept(
    any_size: tuple[Detector, Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change, message: str
) -> None:
    model = onnx.load(any_size[1])
    change(model)
    monkeypatch.setattr(export, "write_graph", lambda detector, path, *rest: onnx.save(model, path))
    path = tmp_path / "x.onnx"
    older = any_size[1].read_bytes()
    path.write_bytes(older)
    with pytest.raises(ExportError, match=message):
        export_onnx(any_size[0], path, classes=CLASSES, image_size=(96, 128))
    assert [file.name for file in tmp_path.iterdir()] == ["x.onnx"] and path.read_bytes() == older


def test_what_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = lively_detector("fcos")
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "x.onnx", tmp_path):
        with pytest.raises(ExportError, match=f"{path} cannot be written"):
            export_onnx(detector, path, classes=CLASSES)
    with pytest.raises(ConfigError, match="file is already there, and not by this command"):
        export_onnx(detector, tmp_path / "file", classes=CLASSES)
    with pytest.raises(ExportError, match="31 x 64 pixels"):
        export_onnx(detector, tmp_path / "x.onnx", classes=CLASSES, image_size=(31, 64))
    failing = Mock(side_effect=RuntimeError("no such operator\nand much more"))
    monkeypatch.setattr(torch.onnx, "export", failing)
    with pytest.raises(ExportError, match=r"cannot export this detector \(no such operator\): .*--static"):
        export_onnx(detector, tmp_path / "x.onnx", classes=CLASSES)
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(ExportError, match=r'needs onnxscript: pip install -e "\.\[export\]"'):
        export_onnx(detector, tmp_path / "x.onnx", classes=CLASSES)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_difference_allows_ties_in_any_order() -> None:
    first, second = [0.0, 0.0, 10.0, 10.0], [5.0, 5.0, 20.0, 20.0]
    labels = torch.tensor([1, 1])
    expected = Detections(torch.tensor([first, second]), torch.tensor([0.5, 0.5]), labels)
    # The second box is 0.004 px lower, its score 0.00005 higher, which puts it first.
    found = Detections(torch.tensor([[5.0, 5.004, 20.0, 20.004], first]), torch.tensor([0.50005, 0.5]), labels)
    assert difference(found, expected) == pytest.approx((0.004, 0.00005), rel=1e-2)
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert difference(nothing, nothing) == (0.0, 0.0)
