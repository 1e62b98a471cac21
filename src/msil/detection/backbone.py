"""ResNet feature extractors, built of torchvision's blocks and with torchvision's state-dict keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops import FrozenBatchNorm2d

from msil.detection.folding import fold_norms
from msil.detection.weights import differences, imagenet_state_dict, load_state_dict_file
from msil.errors import WeightsError

DEPTHS: dict[str, tuple[type[resnet.BasicBlock] | type[resnet.Bottleneck], list[int]]] = {
    "resnet10": (resnet.BasicBlock, [1, 1, 1, 1]),
    "resnet18": (resnet.BasicBlock, [2, 2, 2, 2]),
    "resnet34": (resnet.BasicBlock, [3, 4, 6, 3]),
    "resnet50": (resnet.Bottleneck, [3, 4, 6, 3]),
    "resnet101": (resnet.Bottleneck, [3, 4, 23, 3]),
}
NORMS: dict[str, Callable[..., nn.Module]] = {
    "bn": nn.BatchNorm2d,
    "gn": partial(nn.GroupNorm, 32),
    "eval_bn": nn.BatchNorm2d,
    "frozen_bn": FrozenBatchNorm2d,
}


class ResNet(nn.Module):
    """Images -> C3, C4, C5. torchvision's ResNet without its average pool and fc.

    name: resnet10 (one basic block a stage), resnet18, resnet34, resnet50 or resnet101.
    weights: None; "imagenet" (torchvision's IMAGENET1K_V1, downloaded once); or the path of a file with the state dict
        of a torchvision ResNet of the same depth.
    style: "pytorch", stride on the bottleneck's 3x3 convolution (torchvision's weights), or "caffe", on its first 1x1
        (Detectron's). The keys and shapes are the same, so weights of the other style load and give another net.
        resnet50 and resnet101 alone have bottlenecks.
    norm: "bn", trainable BatchNorm; "gn", GroupNorm with 32 groups; "eval_bn", BatchNorm with fixed statistics and
        trainable scale and shift, always in eval mode (MMDetection's norm_eval); "frozen_bn", BatchNorm with all of it
        fixed, computed inside the convolution before it. Default: "frozen_bn" with weights, "gn" without. The last two
        of the four normalise nothing unless statistics are loaded.
    frozen_stages: 0, none; 1, the stem and layer1; ... 4, everything. Frozen parameters require no gradient, and
        frozen norms stay in eval mode whatever `train` says. Default: 1 with weights, 0 without.

    out_channels: channels of C3, C4, C5.
    Raises ValueError for an unknown name, norm or number of stages, WeightsError for weights that are missing or do
    not fit.
    """

    def __init__(
        self,
        name: str,
        *,
        weights: str | Path | None = None,
        norm: str | None = None,
        frozen_stages: int | None = None,
        style: str = "pytorch",
    ) -> None:
        super().__init__()
        if name not in DEPTHS:
            raise ValueError(f"unknown backbone {name!r}; known: {', '.join(DEPTHS)}.")
        norm = norm if norm is not None else "gn" if weights is None else "frozen_bn"
        if norm not in NORMS:
            raise ValueError(f"unknown norm {norm!r}; known: {', '.join(NORMS)}.")
        frozen_stages = frozen_stages if frozen_stages is not None else 0 if weights is None else 1
        if frozen_stages not in range(5):
            raise ValueError(f"frozen_stages must be 0 to 4, not {frozen_stages}.")

        block, layers = DEPTHS[name]
        if style not in ("pytorch", "caffe") or (style == "caffe" and block is resnet.BasicBlock):
            raise ValueError(
                f"style must be pytorch, or caffe for a ResNet with bottlenecks, not {style!r} for {name}."
            )
        # One class: the fc layer is thrown away, so it is not worth its usual size.
        net = resnet.ResNet(block, layers, num_classes=1, norm_layer=NORMS[norm])
        if norm == "frozen_bn":
            fold_norms(net)
        self.conv1, self.bn1, self.relu, self.maxpool = net.conv1, net.bn1, net.relu, net.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        if style == "caffe":
            for stage in (self.layer2, self.layer3, self.layer4):
                _stride_first(stage[0])
        self.out_channels = [channels * block.expansion for channels in (128, 256, 512)]
        if weights is not None:
            self._load(name, weights, norm)

        stages = [[self.conv1, self.bn1, self.layer1], [self.layer2], [self.layer3], [self.layer4]]
        frozen = [module for stage in stages[:frozen_stages] for module in stage]
        for module in frozen:
            module.requires_grad_(False)
        fixed_norms = [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)] if norm == "eval_bn" else []
        self._always_eval = (*frozen, *fixed_norms)  # a tuple, so that nothing is registered a second time
        self.train()

    def train(self, mode: bool = True) -> ResNet:
        """As nn.Module.train, but what is frozen stays in eval mode."""
        super().train(mode)
        for module in self._always_eval:
            module.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images (N, 3, H, W) -> [C3, C4, C5], (N, out_channels[i], H / s, W / s) for s = 8, 16, 32."""
        c2 = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(images)))))
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return [c3, c4, self.layer4(c4)]

    def _load(self, name: str, weights: str | Path, norm: str) -> None:
        if weights == "imagenet":
            if norm == "gn":
                raise WeightsError(
                    "ImageNet weights come with BatchNorm and do not fit norm=gn: set model.backbone.norm to "
                    "frozen_bn, eval_bn or bn, or model.backbone.weights=null to train from scratch."
                )
            state = imagenet_state_dict(name)
        else:
            state = load_state_dict_file(weights)
        state = {key: value for key, value in state.items() if not key.startswith("fc.")}
        found = differences(self.state_dict(), state)
        if found:
            raise WeightsError(
                f"{weights} does not fit {name} with norm={norm}: it {found}; "
                f"give the file of a torchvision {name} as model.backbone.weights."
            )
        self.load_state_dict(state)


def _stride_first(block: nn.Module) -> None:
    """Move a bottleneck's stride from its 3x3 convolution to its first 1x1."""
    assert isinstance(block, resnet.Bottleneck)
    block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
