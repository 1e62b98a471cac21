"""The exported file against Detector.predict, its form, and the ways in which an export can fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import nms

from msil.detection import Detections, Detector, build_detector
from msil.detection.detector import FULL_MSIL
from msil.detection.heads import head_class
from msil.detection.starconv import StarConv
from msil.inference import export
from msil.inference.export import ExportReport, export_lines, export_onnx
from msil.inference.export_check import ExportError, Mismatch, difference, made_up_image

onnx = pytest.importorskip("onnx", reason='needs pip install "msil[export]"')
pytest.importorskip("onnxscript", reason='needs pip install "msil[export]"')
onnxruntime = pytest.importorskip("onnxruntime", reason='needs pip install "msil[export]"')

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
    assert len(found.scores) == len(found.labels) == len(found.boxes) == len(expected.boxes)
    assert (found.scores[:-1] >= found.scores[1:]).all()
    boxes = (found.boxes - expected.boxes[:, None]).abs().amax(-1)
    scores = (found.scores - expected.scores[:, None]).abs()
    partner = (boxes <= 1e-2) & (scores <= 1e-4) & (found.labels == expected.labels[:, None])
    assert partner.any(0).all()
    assert partner.any(1).all()


@pytest.fixture(scope="module")
def any_size(tmp_path_factory: pytest.TempPathFactory) -> tuple[Detector, ExportReport]:
    """FCOS with a part of MSIL, in BGR, for images of any size."""
    detector = lively_detector("fcos", msil=CLS_ONLY, channel_order="bgr", min_size=64, max_size=96).train()
    path = tmp_path_factory.mktemp("export") / "new folder" / "detector.onnx"
    return detector, export_onnx(detector, path, classes=CLASSES, image_size=(96, 128))


def test_report(any_size: tuple[Detector, ExportReport]) -> None:
    _, report = any_size
    assert report.dynamic
    assert report.file_bytes == report.path.stat().st_size
    # Two sizes at the detector's own threshold, which leaves candidates enough.
    assert [compared.image_size for compared in report.comparisons] == [(96, 128), (85, 73)]
    for compared in report.comparisons:
        assert compared.detections > 10
        assert compared.box_difference <= 1e-2
        assert compared.score_difference <= 1e-4
    assert [file.name for file in report.path.parent.iterdir()] == ["detector.onnx"]


# 33 and 70 need padding; at 32 and 64 the last levels are single points; 200 x 136 has more of them than any before.
@pytest.mark.parametrize("size", [(32, 32), (64, 96), (70, 33), (200, 136)])
def test_file_takes_images_of_any_size(any_size: tuple[Detector, ExportReport], size: tuple[int, int]) -> None:
    detector, report = any_size
    image = made_up_image(size, seed=11)
    detector.min_size = detector.max_size = None
    (expected,) = detector.predict([image])
    detector.min_size, detector.max_size = 64, 96
    assert len(expected.boxes) > 3
    assert_same(run(report.path, image), expected)


def test_file_is_valid_and_describes_itself(any_size: tuple[Detector, ExportReport]) -> None:
    _, report = any_size
    model = onnx.load(report.path)
    onnx.checker.check_model(model, full_check=True)
    assert {entry.key: entry.value for entry in model.metadata_props} == {
        "classes": json.dumps(CLASSES),
        "min_size": "64",
        "max_size": "96",
        "score_thresh": "0.05",
        "nms_thresh": "0.6",
        "detections_per_img": "20",
    }
    assert [(put.name, put.type, put.shape) for put in (*session_inputs(report), *session_outputs(report))] == [
        ("image", "tensor(uint8)", [3, "height", "width"]),
        ("boxes", "tensor(float)", ["detections", 4]),
        ("scores", "tensor(float)", ["detections"]),
        ("labels", "tensor(int64)", ["detections"]),
    ]
    # Nothing of the machine that wrote it.
    assert str(Path(export.__file__).parent).encode() not in report.path.read_bytes()


def session_inputs(report: ExportReport) -> list[Any]:
    return onnxruntime.InferenceSession(report.path).get_inputs()


def session_outputs(report: ExportReport) -> list[Any]:
    return onnxruntime.InferenceSession(report.path).get_outputs()


def test_detector_is_left_as_it_was(any_size: tuple[Detector, ExportReport]) -> None:
    detector, _ = any_size
    assert detector.training
    assert detector.head.training
    assert (detector.min_size, detector.max_size, detector.score_thresh) == (64, 96, 0.05)
    assert all(parameter.requires_grad for parameter in detector.parameters())


def test_several_views_are_left_out_with_a_word(tmp_path: Path) -> None:
    detector = lively_detector("fcos", min_size=64, max_size=96, test_scales=(48, 64), test_flip=True)
    report = export_onnx(detector, tmp_path / "x.onnx", classes=CLASSES, image_size=(64, 96), dynamic=False)
    assert "it looks at an image once: model.test_scales and model.test_flip have no part in it" in export_lines(report)
    assert (detector.test_scales, detector.test_flip) == ((48, 64), True)


def test_vfnet_at_one_size(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    detector = lively_detector("vfnet")
    assert detector.head.msil is not None
    report = export_onnx(detector, tmp_path / "x.onnx", classes=CLASSES, image_size=(90, 130), dynamic=False)
    assert tuple(capfd.readouterr()) == ("", "")  # the exporter's remarks are of no use to anybody
    assert not report.dynamic
    assert {compared.image_size for compared in report.comparisons} == {(90, 130)}
    assert max(compared.detections for compared in report.comparisons) > 10
    assert [put.shape for put in session_inputs(report)] == [[3, 90, 130]]
    assert any(isinstance(module, StarConv) for module in detector.modules())
    image = made_up_image((90, 130), seed=12)
    assert_same(run(report.path, image), detector.predict([image])[0])


@pytest.mark.slow
@pytest.mark.parametrize("msil", [None, CLS_ONLY, {}], ids=["plain", "cls only", "full"])
@pytest.mark.parametrize("head", ["fcos", "vfnet"])
def test_every_detector_at_any_size(head: str, msil: dict[str, Any] | None, tmp_path: Path) -> None:
    original = {"norm_on_bbox": False, "centerness_on_reg": False} if head == "fcos" and msil is None else {}
    detector = lively_detector(head, msil=msil, **original)
    report = export_onnx(detector, tmp_path / "x.onnx", classes=CLASSES, image_size=(96, 128))
    for size in ((32, 32), (100, 70), (200, 136)):
        image = made_up_image(size, seed=13)
        assert_same(run(report.path, image), detector.predict([image])[0])


class _Suppression(nn.Module):
    def forward(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
        return torch.ops.msil.batched_nms(boxes, scores, labels, 0.5)


@pytest.mark.filterwarnings("ignore:.*axis name")
def test_suppression_in_onnx_is_that_of_each_class_alone(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    corners = torch.rand(60, 2, generator=generator) * 30
    boxes = torch.cat([corners, corners + 10 + 20 * torch.rand(60, 2, generator=generator)], 1)
    scores, labels = torch.rand(60, generator=generator), torch.randint(3, (60,), generator=generator) * 2
    count = torch.export.Dim("count")
    program = torch.onnx.export(
        _Suppression().eval(),
        (boxes, scores, labels),
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: count},) * 3,
        custom_translation_table={torch.ops.msil.batched_nms.default: export._batched_nms_to_onnx},
    )
    assert program is not None
    program.save(str(tmp_path / "nms.onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "nms.onnx")
    names = [put.name for put in session.get_inputs()]
    for number in (60, 1, 0):
        inputs = [values[:number] for values in (boxes, scores, labels)]
        (found,) = session.run(None, {name: values.numpy() for name, values in zip(names, inputs, strict=True)})
        kept = []
        for label in (0, 2, 4):
            of_class = (inputs[2] == label).nonzero()[:, 0]
            kept += of_class[nms(inputs[0][of_class], inputs[1][of_class], 0.5)].tolist()
        assert found.tolist() == sorted(kept, key=lambda index: -float(scores[index]))
    assert 3 < len(nms(boxes, scores, 0.5)) < 60


def tamper(report: ExportReport, monkeypatch: pytest.MonkeyPatch, name: str, shift: float) -> None:
    """From now on exports write the report's file, its constant `name` shifted."""
    model = onnx.load(report.path)
    (constant,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    constant.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(constant) + shift, name))
    monkeypatch.setattr(export, "write_graph", lambda detector, path, *rest: onnx.save(model, path))


@pytest.mark.parametrize(
    ("name", "shift", "said"),
    [
        ("detector.head.bbox_ctrness.weight", 1e-3, "place by place, boxes by up to .* px"),
        ("detector.head.cls_logits.bias", -2.0, "[0-9]+ detections instead of 20"),
    ],
)
def test_file_that_differs_is_not_kept(
    any_size: tuple[Detector, ExportReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    shift: float,
    said: str,
) -> None:
    detector, report = any_size
    tamper(report, monkeypatch, name, shift)
    path = tmp_path / "x.onnx"
    path.write_text("an older export")
    with pytest.raises(ExportError, match=said):
        export_onnx(detector, path, classes=CLASSES, image_size=(96, 128))
    assert [file.name for file in tmp_path.iterdir()] == ["x.onnx"]
    assert path.read_text() == "an older export"


def test_file_that_onnxruntime_refuses_is_not_kept(
    any_size: tuple[Detector, ExportReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector, report = any_size
    model = onnx.load(report.path)
    del model.graph.node[5:8]
    monkeypatch.setattr(export, "write_graph", lambda detector, path, *rest: onnx.save(model, path))
    with pytest.raises(ExportError, match=r"onnxruntime .* cannot read"):
        export_onnx(detector, tmp_path / "x.onnx", classes=CLASSES, image_size=(96, 128))
    assert list(tmp_path.iterdir()) == []


def test_exporter_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **settings: Any) -> None:
        raise RuntimeError("no such operator\nand much more")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ExportError, match=r"cannot export this detector \(no such operator\): .*--static"):
        export_onnx(lively_detector("fcos"), tmp_path / "x.onnx", classes=CLASSES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_package(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(ExportError, match=rf'needs {package}: pip install "msil\[export\]"'):
        export_onnx(lively_detector("fcos"), tmp_path / "x.onnx", classes=CLASSES)


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "x.onnx", tmp_path):
        with pytest.raises(ExportError, match=f"{path} cannot be written"):
            export_onnx(lively_detector("fcos"), path, classes=CLASSES)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_size_and_classes_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="31 x 64 pixels"):
        export_onnx(lively_detector("fcos"), tmp_path / "x.onnx", classes=CLASSES, image_size=(31, 64))
    with pytest.raises(ValueError, match="4 classes, not 2"):
        export_onnx(lively_detector("fcos"), tmp_path / "x.onnx", classes=["a", "b"])


def detections(boxes: list[list[float]], scores: list[float], labels: list[int]) -> Detections:
    return Detections(torch.tensor(boxes), torch.tensor(scores), torch.tensor(labels))


def test_difference_allows_ties_in_any_order() -> None:
    first, second = [0.0, 0.0, 10.0, 10.0], [5.0, 5.0, 20.0, 20.0]
    expected = detections([first, second], [0.5, 0.5], [1, 1])
    # The second box is 0.004 px lower, its score 0.00005 higher, which puts it first.
    found = detections([[5.0, 5.004, 20.0, 20.004], first], [0.50005, 0.5], [1, 1])
    assert difference(found, expected) == pytest.approx((0.004, 0.00005), rel=1e-2)
    assert difference(detections([[0.0] * 4] * 0, [], []), detections([[0.0] * 4] * 0, [], [])) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (detections([[0.0, 0.0, 10.0, 10.0]], [0.5], [1]), "1 detections instead of 2"),
        (detections([[0.0, 0.0, 10.0, 10.0]] * 2, [0.5, 0.4], [1, 0]), "boxes by up to 10 px"),
        (detections([[0.0, 0.0, 10.0, 10.0], [5.0, 5.0, 20.0, 20.0]], [0.5, 0.401], [1, 0]), "scores by up to 0.001"),
        (detections([[0.0, 0.0, 10.0, 10.0], [5.0, 5.0, 20.0, 20.0]], [0.5, 0.4], [1, 1]), "1 of 2 labels"),
        (detections([[0.0, 0.0, 10.0, 10.0], [5.0, 5.0, 20.0, torch.nan]], [0.5, 0.4], [1, 0]), "nan"),
    ],
)
def test_difference_says_what_differs(found: Detections, said: str) -> None:
    expected = detections([[0.0, 0.0, 10.0, 10.0], [5.0, 5.0, 20.0, 20.0]], [0.5, 0.4], [1, 0])
    with pytest.raises(Mismatch, match=said):
        difference(found, expected)
