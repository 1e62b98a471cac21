"""timm's nets as backbones."""

from __future__ import annotations

import difflib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from msil.detection.backbone import PartlyFrozen, TimmOptions, default_stages
from msil.detection.folding import fold
from msil.detection.weights import FROM_SCRATCH, differences, load_state_dict_file
from msil.errors import ConfigError, WeightsError, install

# Options by which nets with position embeddings or windows take images of any size; a class has one of them or none.
_SIZE_OPTIONS: tuple[dict[str, bool], ...] = ({}, {"strict_img_size": False}, {"dynamic_img_size": True})


class TimmBackbone(PartlyFrozen):
    """Images -> C3, C4, C5: the last maps of strides 8, 16, 32 of timm.create_model(name, features_only=True).

    name: of timm, with or without a tag ("convnext_tiny", "convnext_tiny.in12k").
    weights: None; "imagenet" (timm's own for that name and tag, downloaded once); or the path of a file with the state
        dict of timm's classifier of that name, of any number of classes.
    norm: of BatchNorm layers: "bn", trained; "eval_bn", fixed statistics, trainable scale and shift; "frozen_bn", all
        of it fixed, computed inside the convolution before it where that has no other use. Default: "frozen_bn" with
        weights, "bn" without. Only None for a net without BatchNorm.
    frozen_stages: 0, none; 1, every parameter that the map of stride 4 depends on (the stem included); 2, also those
        of stride 8; 3, of stride 16; 4, everything. In HRNet, with its parallel branches, the map of stride 4 depends
        on almost all of the net. Default: 1 with weights, 0 without.

    Parameters that none of the three maps depends on require no gradient.

    out_channels: channels of C3, C4, C5. image_mean, image_std: RGB, 0..255 units, from the net's pretrained_cfg.
    Raises ConfigError if timm is missing, for an unknown name, for a net without maps at strides 8, 16 and 32 or of one
    image size only, and for a norm without BatchNorm; WeightsError for weights that are missing or do not fit;
    ValueError for an unknown norm or number of stages.
    """

    def __init__(
        self,
        name: str,
        *,
        weights: str | Path | None = None,
        norm: str | None = None,
        frozen_stages: int | None = None,
    ) -> None:
        super().__init__()
        TimmOptions(name, None, frozen_stages, norm)  # checks them
        timm = import_timm()
        layout = _layout(timm, name, default_stages(frozen_stages, weights))
        arguments = dict(features_only=True, **layout.arguments)
        if weights is None:
            self.net = timm.create_model(name, **arguments)
        else:
            load = _with_imagenet if weights == "imagenet" else partial(_with_file, weights)
            self.net = load(timm, name, arguments)
        self.nhwc = layout.nhwc
        self.out_channels = layout.channels
        config: Any = self.net.pretrained_cfg
        self.image_mean = tuple(round(255 * value, 4) for value in config["mean"])
        self.image_std = tuple(round(255 * value, 4) for value in config["std"])

        norms = [module for module in self.net.modules() if isinstance(module, _BatchNorm)]
        if norm is not None and not norms:
            raise ConfigError(
                f"model.backbone.norm={norm} is for nets with BatchNorm, and {name} has none: set it to null."
            )
        norm = norm if norm is not None else "bn" if weights is None else "frozen_bn"
        for key, parameter in self.net.named_parameters():
            if key in layout.frozen or key not in layout.used:
                parameter.requires_grad_(False)
        if norm == "frozen_bn":
            for module in norms:
                module.requires_grad_(False)
            _fold(timm, self.net, layout.pairs)
        fixed_norms = [] if norm == "bn" else norms
        self.keep_in_eval([*fixed_norms, *filter(_is_frozen, self.net.modules())])

    def forward(self, images: Tensor) -> list[Tensor]:
        """As ResNet.forward."""
        maps = self.net(images)
        return [level.permute(0, 3, 1, 2) for level in maps] if self.nhwc else list(maps)


def import_timm() -> Any:
    """The package. Raises ConfigError if it is missing."""
    try:
        import timm

        return timm
    except ImportError as error:
        raise ConfigError(f"model/backbone=timm needs timm ({error}): run {install('timm')}.") from error


class _Layout(NamedTuple):
    arguments: dict[str, Any]  # of timm.create_model, beside the name
    channels: list[int]  # of C3, C4, C5
    nhwc: bool
    used: frozenset[str]  # parameters that C3, C4 or C5 depends on
    frozen: frozenset[str]  # parameters of the frozen stages
    pairs: list[tuple[str, str]]  # a convolution, and the BatchNorm that alone takes its output


def _layout(timm: Any, name: str, frozen_stages: int) -> _Layout:
    """How to build the net `name` and what its maps are, from a copy without memory (meta tensors)."""
    check_name(timm, name)
    failure: Exception | None = None
    for options in _SIZE_OPTIONS:
        try:
            return _layout_with(timm, name, frozen_stages, options)
        except ConfigError:
            raise
        except Exception as error:  # timm's nets raise all kinds for a size or an option that they do not take
            failure = failure or error
    reason = " ".join(str(failure).split()) or type(failure).__name__
    raise ConfigError(
        f"model.backbone.name={name} gives no feature maps for images of any size ({reason}): choose another net of "
        "timm."
    ) from failure


def _layout_with(timm: Any, name: str, frozen_stages: int, options: dict[str, bool]) -> _Layout:
    height, width = 96, 160  # odd multiples of 32 that differ: no net's own size, and NCHW is not NHWC
    with torch.device("meta"), torch.enable_grad():
        net = timm.create_model(name, features_only=True, **options)
        strides = [entry["reduction"] for entry in net.feature_info.info]  # in ascending order
        if not {8, 16, 32} <= set(strides):
            found = ", ".join(map(str, sorted(set(strides))))
            raise ConfigError(
                f"model.backbone.name={name} has maps of stride {found}, and a detector needs 8, 16 and 32: choose "
                "another net of timm."
            )
        # Stride 4 for the frozen stages; a net without it freezes its first map's part.
        indices = [max((i for i, own in enumerate(strides) if own <= stride), default=0) for stride in (4, 8, 16, 32)]
        net = timm.create_model(name, features_only=True, out_indices=tuple(sorted(set(indices))), **options).eval()
        calls = _watch(net)
        maps = dict(zip(sorted(set(indices)), net(torch.zeros(1, 3, height, width)), strict=True))
        levels = [maps[index] for index in indices]

        channels = [net.feature_info.info[index]["num_chs"] for index in indices[1:]]
        sizes = [(height // stride, width // stride) for stride in (8, 16, 32)]
        shapes = [tuple(level.shape[1:]) for level in levels[1:]]
        nhwc = shapes == [(*size, count) for size, count in zip(sizes, channels, strict=True)]
        if not nhwc and shapes != [(count, *size) for size, count in zip(sizes, channels, strict=True)]:
            raise ConfigError(
                f"model.backbone.name={name} gives maps of {shapes} for an image of {height} x {width} pixels, and a "
                f"detector needs {sizes}: choose another net of timm."
            )
        every = frozenset(key for key, _ in net.named_parameters())
        frozen = every if frozen_stages == 4 else _sources(net, levels[:frozen_stages])
        used = _sources(net, levels[1:])
    arguments = {**options, "out_indices": tuple(indices[1:])}
    return _Layout(arguments, channels, nhwc, used, frozen, _pairs(calls, [*maps.values()]))


def _watch(net: nn.Module) -> list[tuple[str, nn.Module, Any]]:
    """Fills, in the next forward pass, with each convolution and the node of the graph that its output is of, and each
    BatchNorm and the node that its input is of."""
    calls: list[tuple[str, nn.Module, Any]] = []

    def note(key: str, module: nn.Module, inputs: tuple[Tensor], output: Tensor | None = None) -> None:
        calls.append((key, module, (inputs[0] if output is None else output).grad_fn))

    for key, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(partial(note, key))
        elif isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(partial(note, key))
    return calls


def _pairs(calls: list[tuple[str, nn.Module, Any]], maps: list[Tensor]) -> list[tuple[str, str]]:
    """Of `calls`, each convolution with the BatchNorm that alone takes its output on the way to the maps."""
    takers: Counter[Any] = Counter(level.grad_fn for level in maps)
    waiting, seen = list(takers), set(takers)
    while waiting:
        for node, _ in waiting.pop().next_functions:
            takers[node] += 1
            if node is not None and node not in seen:
                seen.add(node)
                waiting.append(node)
    times = Counter(key for key, _, _ in calls)  # a module that is called twice is no pair
    convs = {node: key for key, module, node in calls if isinstance(module, nn.Conv2d) and times[key] == 1}
    norms = [(node, key) for key, module, node in calls if isinstance(module, nn.BatchNorm2d) and times[key] == 1]
    return [(convs[node], key) for node, key in norms if node in convs and takers[node] == 1]


def _fold(timm: Any, net: nn.Module, pairs: list[tuple[str, str]]) -> None:
    """Fold the norms of `pairs` into their convolutions, of those classes whose forward pass is known."""
    for conv_key, norm_key in pairs:
        conv: Any = net.get_submodule(conv_key)
        norm: Any = net.get_submodule(norm_key)
        known = type(conv) in (nn.Conv2d, timm.layers.Conv2dSame) and conv.bias is None
        if known and type(norm) in (nn.BatchNorm2d, timm.layers.BatchNormAct2d) and norm.affine:
            if isinstance(conv, timm.layers.Conv2dSame):
                conv.pad = partial(
                    timm.layers.pad_same,
                    kernel_size=conv.kernel_size,
                    stride=conv.stride,
                    dilation=conv.dilation,
                )
            fold(conv, norm)


def _sources(net: nn.Module, maps: list[Tensor]) -> frozenset[str]:
    """Names of the parameters that any of the maps depends on."""
    if not maps:
        return frozenset()
    keys, parameters = zip(*net.named_parameters(), strict=True)
    total = torch.stack([level.sum() for level in maps]).sum()
    gradients = torch.autograd.grad(total, parameters, allow_unused=True, retain_graph=True)
    return frozenset(key for key, gradient in zip(keys, gradients, strict=True) if gradient is not None)


def check_name(timm: Any, name: str) -> None:
    """Raises ConfigError for a name, or its tag, that is not timm's."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        known = timm.list_models()
    elif tag and name not in timm.list_pretrained(f"{architecture}.*"):
        known = timm.list_pretrained(f"{architecture}.*") or [architecture]
    else:
        return
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"the nearest: {', '.join(nearest)}" if nearest else "timm.list_models() names them"
    raise ConfigError(f"model.backbone.name={name} is not a net of timm {timm.__version__}; {hint}.")


def _with_imagenet(timm: Any, name: str, arguments: dict[str, Any]) -> nn.Module:
    source = timm.get_pretrained_cfg(name).hf_hub_id
    file = f"model.safetensors of https://huggingface.co/{source}" if source else "the file of that net"
    remedy = f"set model.backbone.weights=<path> to {file}, or {FROM_SCRATCH}."
    if not timm.is_model_pretrained(name):
        raise WeightsError(f"timm has no ImageNet weights for {name}: {remedy}")
    try:
        return timm.create_model(name, pretrained=True, **arguments)
    except Exception as error:  # of huggingface_hub or torch.hub: no network, a full disk, a wrong hash
        reason = " ".join(str(error).split())
        raise WeightsError(f"the ImageNet weights of timm's {name} cannot be loaded ({reason}): {remedy}") from error


def _with_file(weights: str | Path, timm: Any, name: str, arguments: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        classifier = timm.create_model(name)
    last = classifier.pretrained_cfg.get("classifier")
    last = (last,) if isinstance(last, str) else tuple(last or ())
    state = load_state_dict_file(weights)
    state = {key: value for key, value in state.items() if key.rpartition(".")[0] not in last}
    own = {key: value for key, value in classifier.state_dict().items() if key.rpartition(".")[0] not in last}
    # Checked here, as timm passes over missing and unknown keys. Older files hold buffers that it computes today.
    computed = dict(classifier.named_buffers()).keys() - own.keys()
    if found := differences(own, {key: value for key, value in state.items() if key not in computed}):
        raise WeightsError(
            f"{weights} does not fit timm's {name}: it {found}; give the file of timm's {name} as "
            "model.backbone.weights."
        )
    net = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"state_dict": state}, **arguments)
    net.pretrained_cfg.pop("state_dict")  # a second copy
    return net


def _is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
