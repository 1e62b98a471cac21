"""The MSIL block against its equations, written out here with torch.nn.functional from a block's raw weights."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from msil.detection import FCOSHead
from msil.interaction import MSIL, ChannelAttention, Deeper

SWITCHES = [
    pytest.param(*values, id="align={} separate={} apply={} kernel={}".format(*values))
    for values in itertools.product((True, False), (True, False), ("cls", "reg", "both"), (3, 1))
]


def randomize(module: torch.nn.Module) -> dict[str, Tensor]:
    """Every parameter, norms and biases too, to a random value that a wrong formula would show; returns them."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(fan_in))
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def features(channels: int = 32, size: tuple[int, int] = (5, 7), batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    cls_feat, reg_feat = torch.randn((2, batch, channels, *size), generator=generator)
    return cls_feat, reg_feat


def conv_norm_relu(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    kernel = weights[f"{name}.0.weight"]
    groups = math.gcd(32, len(kernel))
    groups = groups if groups < len(kernel) else groups // 2  # no group of one channel
    x = F.conv2d(x, kernel, padding=kernel.shape[-1] // 2)
    return F.group_norm(x, groups, weights[f"{name}.1.weight"], weights[f"{name}.1.bias"]).relu()


def align(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Equation 3, of one branch."""
    encoded = conv_norm_relu(x + conv_norm_relu(x, weights, "enc"), weights, "enc2")
    return F.conv2d(encoded, weights["conv.weight"], weights["conv.bias"])


def attention(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    """Equation 6 with the MLP as two matrices: (N, C, 1, 1)."""
    down, up = weights[f"{name}mlp.0.weight"][:, :, 0, 0], weights[f"{name}mlp.2.weight"][:, :, 0, 0]
    pixels = x.flatten(2)
    logits = (pixels.mean(2) @ down.T).relu() @ up.T + (pixels.max(2).values @ down.T).relu() @ up.T
    return torch.sigmoid(logits)[:, :, None, None]


def separate(fusion: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    """Equation 5's gate of one branch."""
    kernel, bias = weights[f"{name}dec.weight"], weights[f"{name}dec.bias"]
    weighed = attention(fusion, weights, f"{name}cam.") * fusion
    return torch.sigmoid(F.conv2d(weighed, kernel, bias, padding=kernel.shape[-1] // 2))


def test_equation_6_channel_attention_by_hand() -> None:
    attend = ChannelAttention(2, reduction=2)
    down, up = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1), torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    attend.load_state_dict({"mlp.0.weight": down, "mlp.2.weight": up})
    # Channel 0 is 0 1 2 5: average 2, maximum 5. Channel 1 is -8 0 0 0: average -2, maximum 0.
    x = torch.tensor([[[[0.0, 1.0], [2.0, 5.0]], [[-8.0, 0.0], [0.0, 0.0]]]])
    # Hidden unit: average 2 + 2 * -2 = -2 -> 0 behind the ReLU; maximum 5 + 2 * 0 = 5. Sum of the two MLPs: 5, -5.
    expected = torch.tensor([1 / (1 + math.exp(-5)), 1 / (1 + math.exp(5))]).view(1, 2, 1, 1)
    torch.testing.assert_close(attend(x), expected)


@pytest.mark.parametrize("kernel_size", [3, 1])
def test_equation_3_alignment_is_one_set_of_weights_for_both_branches(kernel_size: int) -> None:
    block = MSIL(32, kernel_size=kernel_size)
    weights = randomize(block)
    cls_feat, reg_feat = features()
    cls_align, reg_align = block.aligned(cls_feat, reg_feat)
    torch.testing.assert_close(cls_align, align(cls_feat, weights))
    torch.testing.assert_close(reg_align, align(reg_feat, weights))


@pytest.mark.parametrize("kernel_size", [3, 1])
def test_equation_4_fusion_reads_the_regression_branch_first(kernel_size: int) -> None:
    block = MSIL(32, kernel_size=kernel_size)
    weights = randomize(block)
    cls_feat, reg_feat = features()
    # W conc(reg, cls) = W[:, :C] reg + W[:, C:] cls
    kernel = weights["fusion.0.weight"]
    padding = kernel_size // 2
    mixed = F.conv2d(reg_feat, kernel[:, :32], padding=padding) + F.conv2d(cls_feat, kernel[:, 32:], padding=padding)
    expected = F.group_norm(mixed, 16, weights["fusion.1.weight"], weights["fusion.1.bias"]).relu()
    torch.testing.assert_close(block.fuse(cls_feat, reg_feat), expected, rtol=1e-4, atol=1e-5)


def expected_shapes(c: int, k: int, use_align: bool, use_separate: bool, apply: str) -> dict[str, tuple[int, ...]]:
    """Parameter shapes at reduction 4: what a setting does not use does not exist."""
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str) -> None:
        shapes.update({f"{name}.weight": (c,), f"{name}.bias": (c,)})

    if use_align:
        for name in ("enc", "enc2"):
            shapes[f"{name}.0.weight"] = (c, c, k, k)
            norm(f"{name}.1")
        shapes.update({"conv.weight": (c, c, 1, 1), "conv.bias": (c,)})
    shapes["fusion.0.weight"] = (c, 2 * c, k, k)
    norm("fusion.1")
    for branch in ("cls", "reg"):
        if use_separate and apply in (branch, "both"):
            shapes[f"separate_{branch}.cam.mlp.0.weight"] = (c // 4, c, 1, 1)
            shapes[f"separate_{branch}.cam.mlp.2.weight"] = (c, c // 4, 1, 1)
            shapes.update({f"separate_{branch}.dec.weight": (c, c, k, k), f"separate_{branch}.dec.bias": (c,)})
    return shapes


@pytest.mark.parametrize(("use_align", "use_separate", "apply", "kernel_size"), SWITCHES)
def test_every_switch(use_align: bool, use_separate: bool, apply: str, kernel_size: int) -> None:
    # reduction 4, not 16: of two hidden units both may be dead behind their ReLU, of eight hardly all
    block = MSIL(32, align=use_align, separate=use_separate, apply=apply, kernel_size=kernel_size, reduction=4)
    weights = randomize(block)
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == expected_shapes(
        32, kernel_size, use_align, use_separate, apply
    )
    cls_feat, reg_feat = features()
    before = cls_feat.clone(), reg_feat.clone()
    out_cls, out_reg = block(cls_feat, reg_feat)

    cls_align, reg_align = (align(x, weights) if use_align else x for x in (cls_feat, reg_feat))
    fusion = conv_norm_relu(torch.cat([reg_align, cls_align], 1), weights, "fusion")
    for branch, feat, out in (("cls", cls_feat, out_cls), ("reg", reg_feat, out_reg)):
        if apply in (branch, "both"):
            gate = separate(fusion, weights, f"separate_{branch}.") if use_separate else torch.sigmoid(fusion)
            # the gate multiplies the tower's output, not the aligned feature
            torch.testing.assert_close(out, feat * gate, rtol=1e-4, atol=1e-5)
        else:
            assert out is feat
    assert torch.equal(cls_feat, before[0]) and torch.equal(reg_feat, before[1])

    (out_cls.square().sum() + out_reg.square().sum()).backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, f"{name} has no part in the output"


def test_apply_none_returns_its_inputs_and_has_no_parameter() -> None:
    block = MSIL(32, apply="none")
    cls_feat, reg_feat = features()
    out_cls, out_reg = block(cls_feat, reg_feat)
    assert out_cls is cls_feat and out_reg is reg_feat
    assert not block.state_dict()


# C = 256, hidden width 16, a norm has 512:
#   kernel 3: enc, enc2 256 * 256 * 9 + 512 = 590 336 each; conv 256 * 256 + 256 = 65 792;
#             fusion 512 * 256 * 9 + 512 = 1 180 160; a branch's gate 2 * 256 * 16 + 256 * 256 * 9 + 256 = 598 272
#   kernel 1: enc, enc2 66 048 each; conv 65 792; fusion 131 584; a branch's gate 8 192 + 65 792 = 73 984
@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 2 * 590_336 + 65_792 + 1_180_160 + 2 * 598_272),
        ({"apply": "cls"}, 2 * 590_336 + 65_792 + 1_180_160 + 598_272),
        ({"align": False}, 1_180_160 + 2 * 598_272),
        ({"separate": False}, 2 * 590_336 + 65_792 + 1_180_160),
        ({"align": False, "separate": False}, 1_180_160),
        ({"apply": "none"}, 0),
        ({"kernel_size": 1}, 2 * 66_048 + 65_792 + 131_584 + 2 * 73_984),  # 477 440: the 0.48 M of the costs table
        ({"kernel_size": 1, "reduction": 4}, 2 * 66_048 + 65_792 + 131_584 + 2 * (2 * 256 * 64 + 65_792)),
    ],
)
def test_parameter_count(settings: dict, count: int) -> None:
    assert sum(parameter.numel() for parameter in MSIL(256, **settings).parameters()) == count


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (7, 5)])
@pytest.mark.parametrize("channels", [20, 32, 48, 64])  # GroupNorm: 4, 16, 16 and 32 groups
def test_small_odd_maps_and_any_channels(size: tuple[int, int], channels: int) -> None:
    block = MSIL(channels)
    assert block.fusion[1].num_groups == {20: 4, 32: 16, 48: 16, 64: 32}[channels]
    cls_feat, reg_feat = features(channels, size, batch=1)
    for out in block(cls_feat, reg_feat):
        assert out.shape == cls_feat.shape
        assert out.isfinite().all()


def test_gates_start_near_one_half() -> None:
    torch.manual_seed(0)
    block = MSIL(64)
    cls_feat, reg_feat = (feat.relu() + 0.1 for feat in features(64))
    for out, feat in zip(block(cls_feat, reg_feat), (cls_feat, reg_feat), strict=True):
        # f_dec's output has a deviation below 0.01 * sqrt(9 * 64 * 1/2) = 0.17, the gate a quarter of it around 1/2
        assert (out / feat - 0.5).abs().mean() < 0.17 / 4


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"apply": "bth"}, ValueError, "apply must be one of none, cls, reg, both, not 'bth'"),
        ({"apply": None}, ValueError, "apply"),
        ({"align": "false"}, TypeError, "align must be True or False, not 'false'"),
        ({"separate": 1}, TypeError, "separate must be True or False, not 1"),
        ({"kernel_size": 2}, ValueError, "kernel_size must be 1 or 3, not 2"),
        ({"kernel_size": "3"}, ValueError, "kernel_size"),
        ({"reduction": 0}, ValueError, "positive"),
        ({"channels": 0}, ValueError, "positive"),
        ({"apply": "none", "align": "no"}, TypeError, "align"),  # refused even where it would not matter
    ],
)
def test_wrong_values_are_refused(settings: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        MSIL(**{"channels": 32, **settings})


@pytest.mark.parametrize("apply", ["cls", "both"])
def test_open_gates_are_what_was_asked_for(apply: str) -> None:
    torch.manual_seed(0)
    cls_feat, reg_feat = torch.randn(2, 2, 32, 6, 7).abs() + 0.1
    # Without separation the gate is sigmoid(ReLU(0 * ... + log(0.9 / 0.1))) = 0.9 for any input.
    block = MSIL(32, separate=False, apply=apply)
    block.open_gates(0.9)
    for name, before, after in zip(("cls", "reg"), (cls_feat, reg_feat), block(cls_feat, reg_feat), strict=True):
        torch.testing.assert_close(after, before * (0.9 if apply in (name, "both") else 1))
    # With it f_dec's weights, N(0, 0.01), move the gate's logit by far less than 1: 0.99 +- 0.0099 per unit.
    block = MSIL(32, apply=apply)
    block.open_gates()
    for name, before, after in zip(("cls", "reg"), (cls_feat, reg_feat), block(cls_feat, reg_feat), strict=True):
        gate = after / before
        if apply in (name, "both"):
            assert (gate - 0.99).abs().max() < 0.005 and gate.std() > 0
        else:
            assert torch.equal(before, after)
    for value in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="above 0 and below 1"):
            block.open_gates(value)
    with pytest.raises(ValueError, match=r"above 0\.5"):
        MSIL(32, separate=False, init_gate=0.5)


@pytest.mark.parametrize(("separate", "value"), [(True, 0.2), (True, 0.99), (False, 0.51), (False, 0.99)])
def test_init_gate_is_the_gate_at_the_start(separate: bool, value: float) -> None:
    torch.manual_seed(0)
    block = MSIL(32, separate=separate, init_gate=value)
    for name, parameter in block.named_parameters():
        if ".dec.weight" in name:  # a sigmoid of the bias alone is left
            torch.nn.init.zeros_(parameter)
    cls_feat, reg_feat = torch.randn(2, 2, 32, 6, 7).abs() + 0.1
    for before, after in zip((cls_feat, reg_feat), block(cls_feat, reg_feat), strict=True):
        torch.testing.assert_close(after, value * before)
    if not separate:
        block(cls_feat, reg_feat)[0].sum().backward()
        assert block.fusion[1].bias.grad.abs().min() > 0


def test_deeper_is_a_head_of_more_convolutions_at_the_price_of_msil() -> None:
    torch.manual_seed(0)
    shallow = FCOSHead(3, 64, num_convs=2, conv_bias=False, msil=Deeper(64, convs=1))
    deep = FCOSHead(3, 64, num_convs=3, conv_bias=False)
    state = {key: value for key, value in shallow.state_dict().items() if not key.startswith("msil.")}
    for tower in ("cls", "reg"):
        for own, place in (("conv.weight", "0.weight"), ("norm.weight", "1.weight"), ("norm.bias", "1.bias")):
            state[f"{tower}_tower.2.{own}"] = shallow.state_dict()[f"msil.{tower}.0.{place}"]
        assert float(shallow.state_dict()[f"msil.{tower}.0.0.weight"].std()) == pytest.approx(0.01, rel=0.05)
    deep.load_state_dict(state)
    levels = [torch.randn(1, 64, size, size) for size in (8, 4, 2, 1, 1)]
    ours, theirs = shallow(levels), deep(levels)
    torch.testing.assert_close((ours.logits, ours.box), (theirs.logits, theirs.box))
    prices = []
    for block in (MSIL(64), Deeper(64, convs=4), Deeper(64, convs=1)):
        with FlopCounterMode(display=False) as counter:
            block(*torch.randn(2, 2, 64, 16, 16))
        prices.append(counter.get_total_flops())
    assert prices[1] == pytest.approx(prices[0], rel=0.04) and prices[2] * 4 == prices[1]


def test_init_gate_changes_the_gates_alone() -> None:
    states = []
    for value in (None, 0.5, 0.99):
        torch.manual_seed(0)
        states.append(MSIL(32, init_gate=value).state_dict())
    default, half, opened = states
    assert all(torch.equal(default[key], half[key]) for key in default)
    assert [key for key in default if not torch.equal(default[key], opened[key])] == [
        "separate_cls.dec.bias", "separate_reg.dec.bias",
    ]  # fmt: skip
