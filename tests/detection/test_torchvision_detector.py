"""torchvision's detectors behind our interface: the same numbers, our labels, sizes, modes and errors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import MobileNet_V3_Large_Weights, detection, get_model, mobilenet_v3_large
from torchvision.ops import FrozenBatchNorm2d

from msil.detection.structures import Target
from msil.detection.torchvision_detector import NAMES, TorchvisionDetector

from .cases import random_targets

FASTER, FCOS, RETINA, LITE = (
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fcos_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "ssdlite320_mobilenet_v3_large",
)
# Of torchvision's own call. Low scores pass, so that nets with random weights find something
SETTINGS: dict[str, dict[str, Any]] = {
    FASTER: {"box_score_thresh": 0.1, "box_nms_thresh": 0.3, "box_detections_per_img": 30},
    FCOS: {"score_thresh": 0.01, "nms_thresh": 0.3, "detections_per_img": 30},
    RETINA: {"score_thresh": 0.001, "nms_thresh": 0.3, "detections_per_img": 30},
    LITE: {"score_thresh": 0.1, "nms_thresh": 0.3, "detections_per_img": 30},
}
FAMILIES = list(SETTINGS)
HEIGHT, WIDTH = 64, 96


def images(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (3, HEIGHT, WIDTH), generator=generator, dtype=torch.uint8) for _ in range(count)]


def targets(counts: list[int]) -> list[Target]:
    return random_targets(counts, HEIGHT, WIDTH, 3)


@pytest.fixture(scope="module")
def built() -> dict[str, TorchvisionDetector]:
    return {}


@pytest.fixture
def ours(request: pytest.FixtureRequest, built: dict[str, TorchvisionDetector]) -> TorchvisionDetector:
    """Of the family asked for, with three classes; built once and copied, for a ResNet-50 costs half a second."""
    name = request.param
    if name not in built:
        torch.manual_seed(0)
        given = {key.removeprefix("box_"): value for key, value in SETTINGS[name].items()}
        built[name] = TorchvisionDetector(name, 3, min_size=48, max_size=90, limits=given)
    return copy.deepcopy(built[name]).train()


def theirs(name: str, state: dict[str, Tensor], **settings: Any) -> Any:
    """torchvision's own net of three classes and the background, with the weights under `model.`."""
    net = get_model(name, weights=None, weights_backbone=None, num_classes=4, **settings)
    net.load_state_dict({key.removeprefix("model."): value for key, value in state.items()})
    return net


@pytest.mark.parametrize(("ours", "name"), [(name, name) for name in FAMILIES], indirect=["ours"])
def test_losses_are_torchvisions_on_images_that_are_not_resized_again(ours: TorchvisionDetector, name: str) -> None:
    """torchvision's resize to a min_size and max_size of the images' own keeps every pixel; ours are 48 and 90."""
    sizes = {} if name == LITE else {"min_size": HEIGHT, "max_size": WIDTH}
    net = theirs(name, ours.state_dict(), **sizes)
    batch, boxes = images(), targets([2, 0])
    torch.manual_seed(1)
    expected = net([x / 255 for x in batch], [{"boxes": t.boxes, "labels": t.labels + 1} for t in boxes])
    torch.manual_seed(1)
    if name != LITE:
        torch.rand(len(batch))  # torchvision draws one of its min_sizes for each image that it resizes
    losses = ours.loss(batch, boxes)
    assert losses.keys() == expected.keys()
    for key, loss in losses.items():
        assert loss.shape == () and torch.equal(loss, expected[key]), key
    _assert_all_get_a_gradient(ours, [0, 0])  # DDP waits for each


@pytest.mark.parametrize(("ours", "name"), [(name, name) for name in FAMILIES], indirect=["ours"])
def test_predictions_are_torchvisions(ours: TorchvisionDetector, name: str) -> None:
    sizes = {} if name == LITE else {"min_size": 48, "max_size": 90}
    net = theirs(name, ours.state_dict(), **sizes, **SETTINGS[name]).eval()
    batch = images()
    with torch.no_grad():
        expected = net([x / 255 for x in batch])
    for found, full in zip(ours.predict(batch), expected, strict=True):
        real = full["labels"] > 0  # a class like any other for the focal loss, though none is trained
        assert real.sum() > 5
        assert torch.equal(found.boxes, full["boxes"][real]) and torch.equal(found.scores, full["scores"][real])
        assert torch.equal(found.labels, full["labels"][real] - 1)
        assert (found.scores.diff() <= 0).all()


# Targets stay on the host until the loss needs them (msil.data.module).
@pytest.mark.parametrize("ours", [FCOS], indirect=True)
def test_targets_follow_the_images(ours: TorchvisionDetector, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Tensor]] = []
    monkeypatch.setattr(ours.model, "forward", lambda images, targets: seen.extend(targets) or {})
    ours.loss([image.to("meta") for image in images()], targets([2, 0]))
    assert {value.device.type for one in seen for value in one.values()} == {"meta"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(NAMES) - set(FAMILIES)))
def test_every_name_trains_and_predicts(name: str) -> None:
    detector = TorchvisionDetector(name, 3, min_size=HEIGHT, max_size=WIDTH).train()
    for counts in ([2, 1], [0, 0]):
        _assert_all_get_a_gradient(detector, counts)
    assert len(detector.predict(images())) == 2


def _assert_all_get_a_gradient(detector: TorchvisionDetector, counts: list[int]) -> None:
    detector.zero_grad()
    torch.stack(list(detector.loss(images(), targets(counts)).values())).sum().backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("ours", [FASTER, LITE], indirect=True)
def test_sizes_that_reach_the_backbone(ours: TorchvisionDetector) -> None:
    """SSDlite's are 320 x 320 always. Else 64 x 96 stays so in training, and becomes 48 x 72 in predict, both filled up
    to multiples of 32."""
    seen = []
    ours.model.backbone.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[2:])))
    ours.loss(images(), targets([1, 1]))
    ours.predict(images())
    fixed = ours.model.transform.fixed_size is not None
    assert seen == ([(320, 320)] * 2 if fixed else [(64, 96), (64, 96)])


@pytest.mark.parametrize("ours", [FASTER], indirect=True)
def test_predict_leaves_every_mode_and_takes_an_empty_list(ours: TorchvisionDetector) -> None:
    ours.model.backbone.body.eval()
    before = [module.training for module in ours.modules()]
    assert ours.predict([]) == []
    ours.predict(images())
    with pytest.raises(ValueError, match="3d tensors"):
        ours.predict([torch.zeros(64, 96)])
    assert [module.training for module in ours.modules()] == before
    assert len(set(before)) == 2
    assert ours.score_thresh == SETTINGS[FASTER]["box_score_thresh"]
    ours.score_thresh = 1.0
    assert [len(found.scores) for found in ours.predict(images())] == [0, 0]


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("fasterrcnn_resnet50_fpn", detection.FasterRCNN_ResNet50_FPN_Weights),
        ("fcos_resnet50_fpn", detection.FCOS_ResNet50_FPN_Weights),
        ("ssdlite320_mobilenet_v3_large", detection.SSDLite320_MobileNet_V3_Large_Weights),
    ],
)
def test_operations_are_those_that_torchvision_states(name: str, weights: Any) -> None:
    """In 10^9 multiply-adds, for COCO's 91 classes and an image of 800 x 800."""
    with torch.device("meta"):
        detector = TorchvisionDetector(name, 90).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        detector.net(torch.empty(1, 3, 800, 800, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(weights.COCO_V1.meta["_ops"], abs=5e-4)


@pytest.mark.parametrize("ours", [FASTER], indirect=True)
def test_only_the_backbone_is_compiled_and_a_copy_has_its_own(
    ours: TorchvisionDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, expected = list(ours.state_dict()), ours.predict(images())
    calls: list[Any] = []
    monkeypatch.setattr(
        torch, "compile", lambda function, mode: lambda part, x: calls.append(part) or function(part, x)
    )
    ours.compile_parts()
    copied = copy.deepcopy(ours)
    assert torch.equal(copied.predict(images())[0].boxes, expected[0].boxes)
    ours.predict(images())
    assert [id(call) for call in calls] == [id(copied.model.backbone), id(ours.model.backbone)]
    assert list(ours.state_dict()) == keys


def test_imagenet_weights_are_loaded_and_their_first_layers_frozen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    classifier = mobilenet_v3_large().state_dict()
    torch.save(classifier, tmp_path / "checkpoints" / Path(MobileNet_V3_Large_Weights.IMAGENET1K_V1.url).name)
    detector = TorchvisionDetector(FASTER, 3, backbone_weights="imagenet")
    first = detector.model.backbone.body["0"][0]
    assert torch.equal(first.weight, classifier["features.0.0.weight"]) and not first.weight.requires_grad
    assert isinstance(detector.model.backbone.body["0"][1], FrozenBatchNorm2d)


FULL = {"align": True, "separate": True, "apply": "both", "kernel_size": 3, "reduction": 16}


def test_msil_adds_its_block_which_learns_from_the_losses() -> None:
    detector = TorchvisionDetector(RETINA, 3, msil=FULL).train()
    added = {key for key in detector.state_dict() if ".msil." in key}
    assert added and all(key.startswith("model.head.msil.") for key in added)
    _assert_all_get_a_gradient(detector, [2, 1])
