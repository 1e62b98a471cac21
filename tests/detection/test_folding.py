"""Frozen norms inside convolutions against torchvision's own modules, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops import FrozenBatchNorm2d

from msil.detection.backbone import DEPTHS, ResNet
from msil.detection.folding import FoldedConv2d, FoldedNorm, fold_norms


def reference(name: str) -> resnet.ResNet:
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


@pytest.mark.parametrize("name", ["resnet10", "resnet18", "resnet50"])
def test_outputs_and_gradients_are_those_of_separate_norms(name: str) -> None:
    theirs = reference(name)
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
    theirs = reference("resnet18")
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
