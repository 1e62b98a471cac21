"""The MSIL block in detectors of other projects: torchvision, MMDetection, any head with two towers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from msil.interaction import MSIL

# Where a head has its towers: torchvision's FCOS and RetinaNet, MMDetection's dense heads
LAYOUTS = (("classification_head.conv", "regression_head.conv"), ("cls_convs", "reg_convs"))
# Where a model has its head: torchvision, MMDetection, the head itself
HEADS = ("head.", "bbox_head.", "")
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def attach_msil(
    model: nn.Module,
    *,
    align: bool = True,
    separate: bool = True,
    apply: str = "both",
    kernel_size: int = 3,
    reduction: int = 16,
    init_gate: float | None = None,
    cls_tower: str | None = None,
    reg_tower: str | None = None,
) -> MSIL:
    """Insert an MSIL block between the towers and the predictors of a detection head, in place; returns the block.

    Works with torchvision's FCOS and RetinaNet, with MMDetection's dense heads that run `cls_convs` and `reg_convs` on
    the same feature map (FCOS, ATSS, GFL, RetinaNet, VFNet, PAA, FreeAnchor, FSAF and others), and with any module
    whose towers are named. One block serves all pyramid levels; each tower still runs once per level.

    The block is registered as `msil` on the innermost module that holds both towers: `head.msil.*` in the state dict of
    a torchvision detector, `bbox_head.msil.*` in MMDetection's. No other key changes. Device, dtype and training mode
    follow the towers, channels the `out_channels` of their last convolution.

    Before: load a checkpoint that has no block (or use strict=False), call MMDetection's `init_weights`. After: build
    the optimizer, wrap the model (DistributedDataParallel, torch.compile). deepcopy, pickle, ONNX export and
    torch.compile work; torch.jit.script (a tower calls what stands outside of it) and nn.DataParallel do not.

    model: the detector or its head.
    align, separate, apply, kernel_size, reduction, init_gate: see `MSIL`; reduction is at most the towers'
        channels, an init_gate of 0.99 leaves a trained detector almost as it was. With apply="none" the model is not
        changed, and the block returned has no parameters and is not part of the model.
    cls_tower, reg_tower: dotted paths of the towers in `model`. A tower is called with one feature map (N, C, H, W) or
        is a ModuleList that the head iterates over. Example, detectron2's RetinaNet: "head.cls_subnet" and
        "head.bbox_subnet".

    Raises TypeError if `model` is not an nn.Module or align or separate is not a bool; ValueError if there are no two
    towers of equal width, if they have a block already, or if a setting is invalid. The model is then unchanged.
    The head's forward raises RuntimeError if the towers are given different feature maps or are bypassed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"attach_msil needs an nn.Module, not {type(model).__name__}.")
    paths = _paths(model, cls_tower, reg_tower)
    cls_module, reg_module = towers = [model.get_submodule(path) for path in paths]
    if cls_module in set(reg_module.modules()) or reg_module in set(cls_module.modules()):
        raise ValueError(f"MSIL needs two separate towers; {paths[0]} and {paths[1]} overlap.")
    head = _head(model, paths[0], reg_module)
    if hasattr(head, "msil"):
        has = (
            "already has an MSIL block"
            if isinstance(head.msil, MSIL)
            else "takes its block where it is built (msil=...)"
        )
        raise ValueError(f"{type(head).__name__} {has}.")
    if any("forward" in vars(tower) for tower in towers):
        raise ValueError(f"the forward of a tower of {type(head).__name__} was replaced.")
    channels, reg_channels = (_channels(tower, path) for tower, path in zip(towers, paths, strict=True))
    if channels != reg_channels:
        raise ValueError(
            f"MSIL needs two towers of equal width; {paths[0]} has {channels} channels and {paths[1]} {reg_channels}."
        )
    switches = {"align": align, "separate": separate, "apply": apply}
    block = MSIL(channels, **switches, kernel_size=kernel_size, reduction=reduction, init_gate=init_gate)
    if apply == "none":
        return block
    if reduction > channels:
        raise ValueError(f"MSIL reduction={reduction} must not exceed the {channels} channels of the towers.")
    weight = next(cls_module.parameters())
    head.msil = block.to(weight.device, weight.dtype).train(head.training)
    seam = _Seam(cls_module, reg_module, block)
    for own, tower in enumerate(towers):
        if type(tower).forward is nn.Module.forward:  # a ModuleList without a forward of its own
            tower.__class__ = _Layers
        tower.forward = partial(seam.branch, own)
    head.register_forward_pre_hook(seam.start)
    head.register_forward_hook(seam.end, always_call=True)
    return block


class _Layers(nn.ModuleList):
    """A ModuleList whose only item, for a head that iterates over it, is itself; an index gives one of its layers."""

    def __iter__(self) -> Iterator[nn.Module]:
        yield self

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)


class _Seam:
    """The forward of both towers: the first one called runs both and the block, the second takes what is left.

    torchvision runs one tower over all levels before the other; MMDetection alternates, with a predictor in between.
    Features are kept within one forward of the head; a tower called outside of it runs both each time. This is not a
    Module, so it adds no key, and the towers hold bound methods of it, which deepcopy and pickle bind to the copy.
    """

    def __init__(self, cls_tower: nn.Module, reg_tower: nn.Module, block: MSIL) -> None:
        self.towers = (cls_tower, reg_tower)
        self.block = block
        # By thread: branch, input and gated feature of the calls to come
        self.kept: dict[int, list[tuple[int, Tensor, Tensor]]] = {}
        self.has_run = False

    def start(self, _head: nn.Module, _args: object) -> None:
        self.kept[_thread()] = []

    def end(self, head: nn.Module, _args: object, outputs: object) -> None:
        self.kept.pop(_thread(), None)
        if not self.has_run and outputs is not None:  # None: the forward raised an error of its own
            raise RuntimeError(f"MSIL was bypassed: {type(head).__name__} neither calls nor iterates over its towers.")

    def branch(self, own: int, x: Tensor) -> Tensor:
        kept = self.kept.get(_thread(), [])
        for i, (branch, source, feature) in enumerate(kept):
            if branch == own and source is x:
                del kept[i]
                return feature
        other = 1 - own
        if any(branch == own for branch, _, _ in kept):
            raise RuntimeError("MSIL needs two towers that are given the same feature maps.")
        features = [x, x]
        for branch in (own, other):
            tower = self.towers[branch]
            features[branch] = type(tower).forward(tower, x)
        gated = self.block(*features)
        kept.append((other, x, gated[other]))
        self.has_run = True
        return gated[own]


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()  # the latter would break the graph


def _paths(model: nn.Module, cls_tower: str | None, reg_tower: str | None) -> tuple[str, str]:
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    named = cls_tower is not None or reg_tower is not None
    known = [(head + cls_name, head + reg_name) for head in HEADS for cls_name, reg_name in LAYOUTS]
    if named:
        known = [(str(cls_tower), str(reg_tower))]
    for paths in known:
        if names.issuperset(paths):
            return paths
    if named:
        raise ValueError(f"{type(model).__name__} has no towers {cls_tower} and {reg_tower}: name both of its own.")
    raise ValueError(
        f"{type(model).__name__} has no pair of dense towers as in FCOS and RetinaNet: where it has two under other "
        "names, name both with cls_tower and reg_tower."
    )


def _head(model: nn.Module, cls_path: str, reg_tower: nn.Module) -> nn.Module:
    """The innermost module around both towers. A container is none: the block would become one of its layers."""
    names = cls_path.split(".")
    for depth in reversed(range(len(names))):
        head = model.get_submodule(".".join(names[:depth]))
        if not isinstance(head, CONTAINERS) and reg_tower in set(head.modules()):
            return head
    raise ValueError(f"{type(model).__name__} is a container; attach_msil needs the module that runs the towers.")


def _channels(tower: nn.Module, path: str) -> int:
    if isinstance(tower, nn.ModuleList) and any(isinstance(layer, nn.ModuleList) for layer in tower):
        raise ValueError(f"{path} has one tower per level; MSIL needs one that all levels share.")
    if type(tower).forward is nn.Module.forward and not isinstance(tower, nn.ModuleList):
        raise ValueError(f"{path} is a {type(tower).__name__}; a tower must have a forward or be a ModuleList.")
    found = [getattr(module, "out_channels", None) for module in tower.modules()]
    widths = [width for width in found if isinstance(width, int)]
    if not widths:
        raise ValueError(f"{path} has no convolution whose out_channels would give the width of the block.")
    return widths[-1]
