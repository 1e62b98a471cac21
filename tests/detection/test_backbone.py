"""ResNet against MMDetection's and torchvision's."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops import FrozenBatchNorm2d

from msil.detection.backbone import DEPTHS, ResNet, ResNetOptions, TimmOptions, build_backbone
from msil.detection.folding import FoldedConv2d, FoldedNorm, fold_norms, keep_folded
from msil.detection.weights import from_mmdet
from msil.errors import WeightsError


@pytest.fixture(scope="module")
def resnet50_state(golden) -> dict[str, Tensor]:
    """The weights behind resnet50.npz, fc included, as torchvision names them."""
    return golden.fill(torchvision.models.resnet50().state_dict(), 10)


@pytest.fixture(scope="module")
def resnet50_file(resnet50_state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("weights") / "resnet50.pth"
    torch.save(resnet50_state, path)
    yield path
    path.unlink()  # 100 MB


def assert_reference_outputs(net: ResNet, golden, style: str = "pytorch") -> None:
    expected = golden("resnet50", f"{style}/")
    with torch.no_grad():
        out = net(golden.rand(300, 1, 3, 96, 128))
    assert len(out) == 3
    for i, feature in enumerate(out):
        reference = expected[str(i + 1)]
        torch.testing.assert_close(feature, reference, rtol=1e-5, atol=1e-5 * reference.abs().max().item())


def test_frozen_outputs_from_a_file_are_the_references(resnet50_file: Path, golden) -> None:
    net = ResNet("resnet50", weights=str(resnet50_file))
    assert_reference_outputs(net, golden)  # in train mode: frozen BatchNorm knows no other
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == [
        name for name in golden.misc()["resnet50_pytorch"]["frozen"] if "bn" not in name and "downsample.1" not in name
    ]


def test_eval_bn_is_the_references_training_setting(resnet50_state: dict[str, Tensor], golden) -> None:
    net = ResNet("resnet50", norm="eval_bn", frozen_stages=1)
    net.load_state_dict(from_mmdet(resnet50_state), strict=True)
    for mode in (True, False, True):
        net.train(mode)
        assert not any(m.training for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    assert_reference_outputs(net, golden)
    reference = golden.misc()["resnet50_pytorch"]
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == reference["frozen"]
    assert sum(p.requires_grad for p in net.parameters()) == reference["num_trainable"]
    # Trainable scale and shift with fixed statistics: exactly what the reference trains in layer2 to layer4.
    assert dict(net.named_parameters())["layer2.0.bn1.weight"].requires_grad


def test_the_caffe_style_is_the_references(resnet50_state: dict[str, Tensor], golden) -> None:
    net = ResNet("resnet50", norm="frozen_bn", style="caffe").eval()
    net.load_state_dict(from_mmdet(resnet50_state), strict=True)  # the same keys and shapes
    assert_reference_outputs(net, golden, "caffe")


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_keys_and_shapes_are_torchvisions_without_fc(name: str) -> None:
    with torch.device("meta"):
        reference = getattr(torchvision.models, name)().state_dict()
        ours = ResNet(name, norm="bn").state_dict()
    expected = {key: value.shape for key, value in reference.items() if not key.startswith("fc.")}
    assert {key: value.shape for key, value in ours.items()} == expected


def test_gn_is_the_default_from_scratch_and_all_of_it_trains() -> None:
    net = ResNet("resnet10")
    groups = [m.num_groups for m in net.modules() if isinstance(m, nn.GroupNorm)]
    assert len(groups) == 1 + 2 * 4 + 3  # stem, two a block, three shortcuts
    assert set(groups) == {32}
    torch.stack([level.square().mean() for level in net(torch.randn(1, 3, 64, 64))]).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("stages", range(5))
def test_frozen_stages_stay_fixed_in_training(stages: int) -> None:
    net = ResNet("resnet10", norm="bn", frozen_stages=stages).eval().train()
    before = copy.deepcopy(net.state_dict())
    out = net(torch.randn(2, 3, 64, 64))
    total = torch.stack([level.square().mean() for level in out]).sum()
    if stages < 4:
        total.backward()
    else:
        assert not total.requires_grad  # nothing is recorded for a net that is fixed as a whole
    for index, names in enumerate((("conv1", "bn1", "layer1"), ("layer2",), ("layer3",), ("layer4",)), start=1):
        for name in names:
            part = net.get_submodule(name)
            frozen = index <= stages
            assert all((p.grad is None) == frozen and p.requires_grad != frozen for p in part.parameters()), name
            # A norm in train mode counts its batches.
            counts = [
                int(value) for key, value in net.state_dict().items() if key.startswith(name + ".") and "num_b" in key
            ]
            assert counts == [0 if frozen else 1] * len(counts), name
    moved = [key for key, value in net.state_dict().items() if not torch.equal(value, before[key])]
    assert (not moved) == (stages == 4)


def test_a_copy_freezes_its_own_norms() -> None:
    net = ResNet("resnet10", norm="eval_bn", frozen_stages=1)
    twin = copy.deepcopy(net).train()
    assert not any(m.training for m in twin.modules() if isinstance(m, nn.BatchNorm2d))


def test_imagenet_without_network_says_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(WeightsError) as caught:
        ResNet("resnet50", weights="imagenet")
    message = str(caught.value)
    assert f"put the file resnet50-0676ba61.pth into {tmp_path / 'hub' / 'checkpoints'}" in message
    assert "Name or service not known" in message and "\n" not in message


def test_imagenet_takes_the_file_put_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    state = torchvision.models.resnet18().state_dict()
    # The published files of some depths are from before the batch counters.
    torch.save({k: v for k, v in state.items() if "num_batches" not in k}, folder / "resnet18-f37072fd.pth")
    for norm in ("frozen_bn", "eval_bn", "bn"):
        net = ResNet("resnet18", weights="imagenet", norm=norm)
        assert torch.equal(net.state_dict()["layer4.1.conv2.weight"], state["layer4.1.conv2.weight"])


def test_a_damaged_imagenet_file_is_to_be_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    file = tmp_path / "checkpoints" / "resnet50-0676ba61.pth"
    file.parent.mkdir()
    file.write_bytes(b"half of a downl")
    with pytest.raises(WeightsError, match=f"{file} cannot be read: delete that file, and it is downloaded again"):
        ResNet("resnet50", weights="imagenet")


def test_nets_without_imagenet_weights() -> None:
    with pytest.raises(WeightsError, match=r"no ImageNet weights for resnet10, only for resnet18.*weights=null"):
        ResNet("resnet10", weights="imagenet")
    with pytest.raises(WeightsError, match=r"norm=gn.*frozen_bn"):
        ResNet("resnet50", weights="imagenet", norm="gn")


def test_weights_of_another_depth_are_named(tmp_path: Path) -> None:
    path = tmp_path / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    with pytest.raises(WeightsError) as caught:
        ResNet("resnet10", weights=path)
    # One more block of 2 convs and 2 norms (4 tensors each, counters aside) a stage: 4 * 10 = 40 unknown keys.
    assert str(caught.value) == (
        f"{path} does not fit resnet10 with norm=frozen_bn: it has the unknown layer1.1.conv1.weight, "
        "layer1.1.bn1.weight and 38 more; give the file of a torchvision resnet10 as model.backbone.weights."
    )


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (ResNetOptions, {"frozen_stages": 7}, r"^frozen_stages=7 must be one of 0, 1, 2, 3, 4\.$"),
        (ResNet, {"name": "resnet51"}, r"^name=resnet51 must be one of resnet10, resnet18, .*\.$"),
        (TimmOptions, {"norm": "gn"}, r"^norm=gn must be one of bn, eval_bn, frozen_bn\.$"),
        (ResNetOptions, {"style": "tensorflow"}, r"^style=tensorflow must be one of pytorch, caffe\.$"),
        (ResNet, {"style": "caffe"}, r"^style=caffe is for .* not for resnet18\.$"),
    ],
)
def test_options_outside_their_limits_are_refused(kind: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**{"name": "resnet18", **values})


class Own(nn.Module):
    """torchvision's MobileNetV3-Small: features 3, 8 and 12 are the last of strides 8, 16 and 32."""

    out_channels: Any = (24, 48, 576)

    def __init__(self) -> None:
        super().__init__()
        self.features = torchvision.models.mobilenet_v3_small(num_classes=1).features
        self.features[0][1].eval()  # pyright: ignore[reportIndexIssue]

    def forward(self, images: Tensor) -> Any:
        maps = []
        for index, block in enumerate(self.features):
            images = block(images)
            if index in (3, 8, 12):
                maps.append(images)
        return maps


def test_a_module_of_ones_own_is_taken_as_it_is() -> None:
    net = Own()
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    assert build_backbone(net) is net
    assert [m.training for m in net.modules()] == modes
    assert set(modes) == {True, False}
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    build_backbone(net.to("meta"))


@pytest.mark.parametrize(
    ("channels", "forward", "message"),
    [
        (576, Own.forward, "Broken is no backbone, which has out_channels, three integers"),
        ((24, 40, 576), Own.forward, r"must give maps of .*\(1, 40, 4, 4\).*, not \[\(1, 24, 8, 8\), \(1, 48, 4, 4\)"),
        ((24, 48, 576), lambda net, x: {"0": x}, "Broken is no backbone"),
        ((24, 48, 576), lambda net, x: Own.forward(net, x.flatten(1)), "Broken is no backbone, .*: Expected 3D"),
    ],
)
def test_a_module_that_is_no_backbone_is_refused(channels: Any, forward: Any, message: str) -> None:
    with torch.device("meta"):
        net = type("Broken", (Own,), {"out_channels": channels, "forward": forward})()
    with pytest.raises(ValueError, match=message) as caught:
        build_backbone(net)
    assert "\n" not in str(caught.value)
    assert net.training


def with_norms(name: str) -> resnet.ResNet:
    """torchvision's net, with statistics that are neither 0 nor 1."""
    torch.manual_seed(0)
    block, layers = DEPTHS[name]
    net = resnet.ResNet(block, layers, num_classes=1, norm_layer=FrozenBatchNorm2d)
    for module in net.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.uniform_(0.5, 1.2)
            module.running_var.uniform_(0.5, 2)
            module.bias.normal_(0, 0.3)
            module.running_mean.normal_(0, 0.3)
    return net.double()


def outputs(net: nn.Module, images: Tensor) -> list[Tensor]:
    """The output and its gradients by all weights."""
    found = net(images)
    return [found.detach(), *torch.autograd.grad(found.square().mean(), list(net.parameters()))]


def test_outputs_and_gradients_are_those_of_separate_norms() -> None:
    theirs = with_norms("resnet50")
    ours = copy.deepcopy(theirs)
    fold_norms(ours)
    folded = [m for m in ours.modules() if isinstance(m, FoldedConv2d)]
    assert len(folded) == sum(isinstance(m, FrozenBatchNorm2d) for m in theirs.modules())
    assert not any(isinstance(m, FrozenBatchNorm2d) and not isinstance(m, FoldedNorm) for m in ours.modules())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for mine, other in zip(outputs(ours, images), outputs(theirs, images), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12 * float(other.abs().max()))


def test_a_backbone_follows_its_weights_wherever_they_go() -> None:
    """Loaded, copied, cast and moved: the norm in force is always the one in the state dict."""
    theirs = with_norms("resnet18")
    state = {key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    ours = ResNet("resnet18", norm="frozen_bn").double()
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    ours(images)  # before the weights come
    ours.load_state_dict(state)
    with torch.no_grad():
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images))))
        expected = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(x))))
        torch.testing.assert_close(ours(images)[-1], expected)
        other = copy.deepcopy(ours)
        for buffer in ours.buffers():
            buffer.zero_()  # the copy has norms of its own
        torch.testing.assert_close(other(images)[-1], expected)
        single = other.float()(images.float())[-1]
        torch.testing.assert_close(single, expected.float(), rtol=1e-4, atol=1e-4)


def test_norms_are_folded_once_until_the_net_is_trained() -> None:
    """Without a trace in the state dict; a copy in another precision has the same."""
    theirs = with_norms("resnet18")
    ours = ResNet("resnet18", norm="frozen_bn", frozen_stages=0).double().eval()
    ours.load_state_dict({key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")})
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = ours(images)[-1]
        keys = list(ours.state_dict())
        keep_folded(ours)
        assert list(ours.state_dict()) == keys
        ours.conv1.weight.zero_()
        torch.testing.assert_close(ours(images)[-1], expected, rtol=0, atol=0)
        single = copy.deepcopy(ours).float()(images.float())[-1]
        torch.testing.assert_close(single, expected.float(), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(ours.train()(images)[-1], expected)
        keep_folded(ours.eval())
        ours.load_state_dict({key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")})
        torch.testing.assert_close(ours(images)[-1], expected, rtol=0, atol=0)
