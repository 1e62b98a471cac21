"""The MSIL block in heads of torchvision and MMDetection, against towers, block and predictors run by hand."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from benchmarks import mmdetection
from benchmarks.compare import NotRun
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead

from msil.attach import attach_msil
from msil.interaction import MSIL

C = 32
TORCHVISION: dict[str, Callable[[], nn.Module]] = {
    "fcos": lambda: FCOSHead(C, 1, 3, num_convs=2),
    "retinanet": lambda: RetinaNetHead(C, 2, 3),
    "retinanet_v2": lambda: RetinaNetHead(C, 2, 3, norm_layer=partial(nn.GroupNorm, 8)),
}
SWITCHES: list[dict[str, Any]] = [
    {"align": True, "separate": True, "apply": "both", "kernel_size": 3},
    {"align": False, "separate": True, "apply": "cls", "kernel_size": 1},
    {"align": True, "separate": False, "apply": "reg", "kernel_size": 3},
]


@pytest.fixture(params=TORCHVISION)
def head(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(1)
    return randomize(TORCHVISION[request.param]())


def randomize(module: nn.Module) -> Any:
    """Fresh weights of std 0.01 would hide a wrong path."""
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.normal_(std=1 / math.sqrt(fan_in))
    return module


def pyramid(seed: int = 2, sizes: tuple[int, ...] = (6, 3, 1)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, C, size, size + 1, generator=generator) for size in sizes]


def run(layers: nn.Module, x: Tensor) -> Tensor:
    for layer in layers.children():
        x = layer(x)
    return x


def by_hand(plain: Any, block: nn.Module, features: list[Tensor]) -> dict[str, Tensor]:
    """Outputs of a torchvision head: towers and predictors of `plain`, which has no block, with `block` in between."""
    maps: dict[str, list[Tensor]] = {}
    for x in features:
        cls_feat, reg_feat = block(run(plain.classification_head.conv, x), run(plain.regression_head.conv, x))
        maps.setdefault("cls_logits", []).append(plain.classification_head.cls_logits(cls_feat))
        boxes = plain.regression_head.bbox_reg(reg_feat)
        if isinstance(plain, FCOSHead):
            maps.setdefault("bbox_ctrness", []).append(plain.regression_head.bbox_ctrness(reg_feat))
            boxes = boxes.relu()
        maps.setdefault("bbox_regression", []).append(boxes)
    last = {"cls_logits": 3, "bbox_regression": 4, "bbox_ctrness": 1}
    # channels are (anchor, value): (N, A * K, H, W) -> (N, H * W * A, K)
    return {k: torch.cat([m.permute(0, 2, 3, 1).reshape(2, -1, last[k]) for m in v], 1) for k, v in maps.items()}


def same(outputs: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return outputs.keys() == expected.keys() and all(torch.equal(outputs[k], expected[k]) for k in expected)


class Alternating(nn.Module):
    """A head of MMDetection's form: level by level, lists iterated over, one predictor between the towers."""

    def __init__(self, cls_tower: nn.Module | None = None) -> None:
        super().__init__()
        self.cls_convs: Any = convs(C, C) if cls_tower is None else cls_tower
        self.reg_convs: Any = convs(C, C)
        self.conv_cls, self.conv_reg = nn.Conv2d(C, 3, 1), nn.Conv2d(C, 4, 1)

    def forward(self, features: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        return [self.forward_single(x) for x in features]

    def forward_single(self, x: Tensor) -> tuple[Tensor, Tensor]:
        cls_feat = reg_feat = x
        for layer in self.cls_convs:
            cls_feat = layer(cls_feat)
        scores = self.conv_cls(cls_feat)
        for layer in self.reg_convs:
            reg_feat = layer(reg_feat)
        return scores, self.conv_reg(reg_feat)


def convs(*widths: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Sequential(nn.Conv2d(C, width, 3, padding=1), nn.ReLU()) for width in widths)


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: " ".join(f"{k}={v}" for k, v in s.items()))
def test_torchvision_fcos_with_every_switch(switches: dict[str, Any]) -> None:
    head = randomize(TORCHVISION["fcos"]())
    plain = copy.deepcopy(head)
    block = randomize(attach_msil(head, **switches, reduction=4))
    shapes = {key: value.shape for key, value in MSIL(C, **switches, reduction=4).state_dict().items()}
    assert {key: value.shape for key, value in block.state_dict().items()} == shapes
    features = pyramid()
    assert same(head(features), by_hand(plain, block, features))


def test_apply_none_changes_nothing(head: Any) -> None:
    before = fingerprint(head)
    assert not list(attach_msil(head, apply="none", init_gate=0.99).parameters())
    assert fingerprint(head) == before


def test_torchvision_heads_train_and_eval_twice_in_a_row(head: Any) -> None:
    plain = copy.deepcopy(head.eval())
    block = randomize(attach_msil(head))
    assert not block.training
    for mode, features in ((True, pyramid(2)), (False, pyramid(3)), (False, pyramid(2)), (False, pyramid(2)[:1] * 2)):
        head.train(mode)
        assert block.training == mode
        assert same(head(features), by_hand(plain, block, features))


def test_a_tower_runs_once_per_level() -> None:
    head = RetinaNetHead(C, 2, 3, norm_layer=nn.BatchNorm2d)
    attach_msil(head)
    head(pyramid(sizes=(6, 3)))
    counts = [value.item() for key, value in head.state_dict().items() if key.endswith("num_batches_tracked")]
    assert counts == [2] * 8  # 2 towers of 4 norms, 2 levels


def test_state_dict_keeps_its_keys(head: Any) -> None:
    model: Any = nn.Module()
    model.head = head
    plain = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    block = attach_msil(model)
    after = model.state_dict()
    new = {f"head.msil.{key}" for key in block.state_dict()}
    assert after.keys() == before.keys() | new
    assert all(torch.equal(after[key], value) for key, value in before.items())

    other = copy.deepcopy(plain)
    attach_msil(other)
    assert set(other.load_state_dict(before, strict=False).missing_keys) == new
    randomize(block)
    other.load_state_dict(model.state_dict())
    assert same(other.head(pyramid()), head(pyramid()))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("make", [TORCHVISION["fcos"], Alternating])
def test_a_copy_has_its_own_towers_and_block(make: Callable[[], nn.Module], clone: Callable[[Any], Any]) -> None:
    head = make()
    randomize(attach_msil(head))
    copied, features = clone(head), pyramid()
    before = flat(head(features))
    randomize(head)
    assert all(map(torch.equal, flat(copied(features)), before))
    with pytest.raises(ValueError, match="already has an MSIL block"):
        attach_msil(copied)


def flat(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    return [tensor for part in (outputs.values() if isinstance(outputs, dict) else outputs) for tensor in flat(part)]


def test_an_error_in_the_middle_leaves_nothing_behind(head: Any) -> None:
    plain = copy.deepcopy(head)
    block = randomize(attach_msil(head))
    features = pyramid()

    def fail(*_: Any) -> None:
        raise KeyError

    hook = head.regression_head.bbox_reg.register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        head(features)
    hook.remove()
    randomize(block)  # results of the failed forward would now be wrong
    assert same(head(features), by_hand(plain, block, features))


def test_threads_share_a_head() -> None:
    head = randomize(TORCHVISION["fcos"]())
    randomize(attach_msil(head))
    batches = [pyramid(seed, (4, 2, 2, 1)) for seed in range(8)]
    expected = [head(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(same, pool.map(head, batches * 4), expected * 4))


def test_dtype_and_device_follow_the_towers() -> None:
    half = TORCHVISION["fcos"]().bfloat16()
    assert {p.dtype for p in attach_msil(half).parameters()} == {torch.bfloat16}
    assert half([x.bfloat16() for x in pyramid()])["cls_logits"].dtype == torch.bfloat16
    assert {p.device.type for p in attach_msil(Alternating().to("meta")).parameters()} == {"meta"}


def test_compiles_without_a_graph_break() -> None:
    head = Alternating().eval()
    randomize(attach_msil(head, align=False))
    features = pyramid(sizes=(3,))
    compiled = torch.compile(head, backend="eager", fullgraph=True)
    assert all(map(torch.equal, flat(compiled(features)), flat(head(features))))


@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
def test_onnx(dynamo: bool) -> None:
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason='needs pip install -e ".[export]"')
    onnxruntime = pytest.importorskip("onnxruntime", reason='needs pip install -e ".[export]"')
    head, features, file = randomize(TORCHVISION["fcos"]()).eval(), pyramid(), io.BytesIO()
    randomize(attach_msil(head))
    torch.onnx.export(head, (features,), file, dynamo=dynamo)  # type: ignore[arg-type]
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    outputs = session.run(None, {n: x.numpy() for n, x in zip(names, features, strict=True)})
    for output, expected in zip(outputs, head(features).values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(output), expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("names", [{}, {"cls_tower": "bbox_head.cls_convs", "reg_tower": "bbox_head.reg_convs"}])
def test_lists_that_a_head_iterates_over(names: dict[str, str]) -> None:
    model: Any = nn.Module()
    model.bbox_head = head = randomize(Alternating())
    plain = copy.deepcopy(head)
    block = randomize(attach_msil(model, **names))
    assert {key for key in model.state_dict() if "msil" in key} == {f"bbox_head.msil.{k}" for k in block.state_dict()}
    assert len(head.cls_convs) == 2 and isinstance(head.cls_convs[0][0], nn.Conv2d) and "Conv2d" in repr(head)
    x = pyramid()[0]
    cls_feat, reg_feat = block(run(plain.cls_convs, x), run(plain.reg_convs, x))
    expected = [plain.conv_cls(cls_feat), plain.conv_reg(reg_feat)]
    assert all(map(torch.equal, flat(head([x])), expected))
    assert all(map(torch.equal, flat(head.forward_single(x)), expected))  # MMDetection's name for one level


class Detached(Alternating):
    def forward_single(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv_cls(next(iter(self.cls_convs))(x)), self.conv_reg(next(iter(self.reg_convs))(x.detach()))


class Indexed(Alternating):
    def forward_single(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv_cls(self.cls_convs[0](x)), self.conv_reg(self.reg_convs[0](x))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Detached, "given the same feature maps"),
        (Indexed, "MSIL was bypassed: Indexed neither calls nor iterates over its towers"),
    ],
)
def test_towers_of_different_maps_or_bypassed(kind: type[nn.Module], message: str) -> None:
    head = kind()
    attach_msil(head)
    with pytest.raises(RuntimeError, match=message):
        head(pyramid())


def attached() -> nn.Module:
    head = TORCHVISION["fcos"]()
    attach_msil(head)
    return head


def with_own_place() -> nn.Module:
    head = Alternating()
    head.msil = None
    return head


NAMES = {"cls_tower": "cls_convs", "reg_tower": "reg_convs"}
REFUSED = {
    "attached twice": (attached, {}, "FCOSHead already has an MSIL block\\.$"),
    "built with msil": (with_own_place, {}, r"Alternating takes its block where it is built \(msil=\.\.\.\)\.$"),
    "reduction": (Alternating, {"reduction": C + 1}, f"reduction={C + 1} must not exceed the {C} channels"),
    "no towers": (lambda: RPNHead(C, 2), {}, "RPNHead has no pair of dense towers .*, name both with cls_tower"),
    "unequal channels": (lambda: Alternating(convs(C, 16)), {}, "cls_convs has 16 channels and reg_convs 32"),
    "unknown name": (Alternating, NAMES | {"reg_tower": "reg_conv"}, "no towers cls_convs and reg_conv: name both"),
    "one name": (Alternating, {"cls_tower": "cls_convs"}, "no towers cls_convs and None: name both"),
    "one tower twice": (Alternating, NAMES | {"reg_tower": "cls_convs"}, "cls_convs and cls_convs overlap"),
    "a tower per level": (lambda: Alternating(nn.ModuleList([convs(C)])), {}, "cls_convs has one tower per level"),
    "container": (
        lambda: nn.Sequential(nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 1)),
        {"cls_tower": "0", "reg_tower": "1"},
        "Sequential is a container",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_leave_the_model_untouched(case: str) -> None:
    make, options, message = REFUSED[case]
    model = make()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message) as caught:
        attach_msil(model, **options)
    assert "\n" not in str(caught.value)
    assert fingerprint(model) == before


def fingerprint(model: nn.Module) -> list[Any]:
    state = [(key, value.data_ptr()) for key, value in model.state_dict().items()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in model.modules()]
    return [state, hooks, [type(m) for m in model.modules()]]


STRIDES = [8, 16, 32]
SQUARE = {"type": "AnchorGenerator", "ratios": [1.0], "scales": [8], "strides": STRIDES}
MMDET: dict[str, dict[str, Any]] = {
    "FCOSHead": {"strides": STRIDES, "regress_ranges": ((-1, 64), (64, 128), (128, 1e8)), "norm_on_bbox": True},
    "ATSSHead": {"anchor_generator": SQUARE},
    "RetinaHead": {"anchor_generator": SQUARE},
    "VFNetHead": {"strides": STRIDES, "regress_ranges": ((-1, 64), (64, 128), (128, 1e8))},
}


class Given(nn.Module):
    """A tower whose outputs, level by level, are given."""

    def __init__(self, features: list[Tensor]) -> None:
        super().__init__()
        self.features = iter(features)

    def forward(self, _: Tensor) -> Tensor:
        return next(self.features)


@pytest.fixture(scope="module")
def dense_heads() -> Any:
    try:
        mmdetection.fcos_head(3)  # also puts stand-ins where the compiled operators would be
    except NotRun as reason:
        pytest.skip(str(reason))
    from mmdet.models import dense_heads

    return dense_heads


def mmdet_head(dense_heads: Any, name: str) -> Any:
    from mmengine.config import ConfigDict

    train = ConfigDict(assigner={"type": "ATSSAssigner", "topk": 9}, allowed_border=-1, pos_weight=-1, debug=False)
    settings = {"num_classes": 3, "in_channels": C, "feat_channels": C, "stacked_convs": 2, **MMDET[name]}
    return getattr(dense_heads, name)(train_cfg=train, **settings)


@pytest.mark.parametrize("name", MMDET)
def test_mmdetection_heads(dense_heads: Any, name: str) -> None:
    torch.manual_seed(4)
    head = mmdet_head(dense_heads, name)
    deformed: list[Tensor] = []
    if name == "VFNetHead":
        for conv in (head.vfnet_reg_refine_dconv, head.vfnet_cls_dconv):
            conv.forward = lambda feature, _: deformed.append(feature) or feature
    plain, keys = copy.deepcopy(head), head.state_dict().keys()
    block = randomize(attach_msil(head))
    assert head.state_dict().keys() == keys | {f"msil.{key}" for key in block.state_dict()}
    features = pyramid()
    gated = [block(run(plain.cls_convs, x), run(plain.reg_convs, x)) for x in features]
    plain.cls_convs = nn.ModuleList([Given([cls_feat for cls_feat, _ in gated])])
    plain.reg_convs = nn.ModuleList([Given([reg_feat for _, reg_feat in gated])])
    outputs = flat(head(tuple(features)))
    if deformed:  # both deformable convolutions of a level: regression first
        assert all(map(torch.equal, deformed, [feature for pair in gated for feature in reversed(pair)]))
    expected = flat(plain(tuple(features)))
    assert len(outputs) == len(expected) and all(map(torch.equal, outputs, expected))
