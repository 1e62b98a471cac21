"""How the heads behave: MSIL at the seam, images without boxes, bfloat16, options, learning."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from msil.detection import DenseHead, FCOSHead, VFNetHead

from .cases import IMAGE_SIZES, map_sizes_of, random_pyramid, random_targets
from .reference import FORMS, HEADS, build

# Each switch in two of its positions.
SWITCHES: list[dict[str, Any]] = [
    {"align": True, "separate": True, "apply": "both", "kernel_size": 3},
    {"align": False, "separate": True, "apply": "cls", "kernel_size": 1},
    {"align": True, "separate": False, "apply": "reg", "kernel_size": 3},
]
SMALL_MAPS = map_sizes_of(64, 96)
heads = pytest.mark.parametrize("name", HEADS)


def outputs(head: DenseHead, pyramid: list[Tensor]) -> dict[str, Tensor]:
    predictions = head(pyramid)
    found = {name: getattr(predictions, name) for name in ("logits", "box", "quality", "first_box")}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


@heads
@pytest.mark.parametrize("fast_start", [False, True])
def test_the_block_draws_no_random_number_of_the_others_and_apply_none_is_no_block(name: str, fast_start: bool) -> None:
    plain = build(name, fast_start=fast_start).state_dict()
    for switches in SWITCHES:
        state = build(name, switches, fast_start=fast_start).state_dict()
        assert {key for key in state if not key.startswith("msil.")} == plain.keys() != state.keys()
        assert all(torch.equal(state[key], value) for key, value in plain.items()), switches
    none = build(name, {"apply": "none"}, fast_start=fast_start)
    assert none.msil is None and none.state_dict().keys() == plain.keys()
    block = nn.Identity()
    assert build(name, block).msil is block


@heads
def test_a_fast_start_is_by_he_s_rule_where_a_norm_or_a_relu_follows(name: str) -> None:
    """std sqrt(2 / fan in). 5 % of it is seven standard errors of the fewest draws, 32 * 32 * 9."""
    state = build(name, SWITCHES[0], fast_start=True).state_dict()
    he = (*(f"msil.{conv}.0.weight" for conv in ("enc", "enc2", "fusion")), "cls_star.weight", "reg_star.weight")
    layers = {key: value for key, value in state.items() if value.dim() == 4}
    chosen = {key for key in layers if key in he or (key.endswith(".conv.weight") and key != "msil.conv.weight")}
    assert len(chosen) >= 5
    for key in chosen:
        assert layers[key].std().item() == pytest.approx((2 / layers[key][0].numel()) ** 0.5, rel=0.05), key
    gate = state["msil.separate_cls.dec.bias"].sigmoid()
    torch.testing.assert_close(gate, torch.full_like(gate, 0.99))
    conv = nn.Conv2d(32, 32, 3)
    before = conv.weight.clone()
    build(name, nn.Sequential(conv, nn.GroupNorm(8, 32)), fast_start=True)
    assert torch.equal(conv.weight, before)  # a block of the user's own starts as it was made
    predictors = {"cls_logits.weight", "bbox_reg.weight", "msil.conv.weight", "msil.separate_cls.dec.weight"}
    assert all(layers[key].std().item() == pytest.approx(0.01, rel=0.1) for key in predictors)


def test_a_fast_start_of_fcos_has_distances_of_one_stride() -> None:
    head = build("head_fcos_tricks", fast_start=True)
    with torch.no_grad():
        predictions = head([torch.zeros(1, 32, *size) for size in SMALL_MAPS])
    # The towers' norms shift zeros to zeros, so the bias is all that is left.
    assert torch.equal(predictions.box, torch.ones_like(predictions.box))


# What the gate of one branch alone changes. VFNet's star convolution classifies where the regression points to.
CHANGED = {
    "head_fcos": ({"logits", "quality"}, {"box"}),
    "head_fcos_tricks": ({"logits"}, {"box", "quality"}),
    "head_vfnet_s3": ({"logits"}, {"logits", "box", "first_box"}),
    "head_atss": ({"logits"}, {"box", "quality"}),
    "head_gfl": ({"logits"}, {"box"}),
    "head_tood": ({"logits"}, {"box"}),
    "head_retina": ({"logits"}, {"box"}),
}


@heads
def test_a_branch_without_gate_does_not_change(name: str) -> None:
    pyramid = random_pyramid(1, map_sizes=SMALL_MAPS)
    with torch.no_grad():
        plain = outputs(build(name), pyramid)
        for apply, changed in zip(("cls", "reg"), CHANGED[name], strict=True):
            gated = outputs(build(name, {"apply": apply}), pyramid)
            assert {key for key in plain if not torch.equal(gated[key], plain[key])} == changed, apply


@pytest.mark.parametrize(("name", "epoch"), FORMS)
def test_every_parameter_gets_a_gradient(name: str, epoch: str) -> None:
    """DistributedDataParallel needs one for each, in batches without boxes too; the block's own are not zero."""
    pyramid = random_pyramid(2, map_sizes=map_sizes_of(64, 64))
    for switches in SWITCHES:
        head = build(name, {**switches, "reduction": 2}, epoch=epoch)  # an attention wide enough not to be dead
        for counts in ([3, 0], [0, 0]):
            head.zero_grad()
            losses = head.loss(head(pyramid), random_targets(counts, 64, 64, 5), [(64, 64)] * 2)
            torch.stack(list(losses.values())).sum().backward()
            lost = [
                key for key, parameter in head.named_parameters()
                if parameter.grad is None or not parameter.grad.isfinite().all()
                or (counts[0] and key.startswith("msil") and not parameter.grad.any())
            ]  # fmt: skip
            assert not lost, (switches, counts)


def keep(got: list[Tensor], _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    got.append(inputs[0])


@heads
def test_one_image_with_a_level_of_one_cell_and_one_channel_a_group(name: str) -> None:
    """Whose norm has one value a group. In a batch of two, which PyTorch's norm takes, an image comes out the same."""
    kind, options = HEADS[name]
    torch.manual_seed(0)
    head = kind(5, 32, msil=None, **({"num_convs": 1, "norm_groups": 32} | options)).eval()
    pyramid = [torch.randn(2, 32, side, side) for side in (16, 8, 4, 2, 1)]
    with torch.no_grad():
        alone, together = (outputs(head, [level[:count] for level in pyramid]) for count in (1, 2))
    for key, tensor in alone.items():
        torch.testing.assert_close(tensor, together[key][:1], rtol=1e-5, atol=1e-5)


@heads
def test_towers_are_what_the_predictors_get(name: str) -> None:
    head, pyramid = build(name, {}), random_pyramid(1, map_sizes=SMALL_MAPS)
    readers = {"cls_logits": 0, "bbox_reg": 1}
    if name == "head_vfnet_s3":
        readers = {"cls_star": 0, "reg_conv": 1, "reg_star": 1}
    seen: dict[str, list[Tensor]] = {reader: [] for reader in readers}
    for reader, got in seen.items():
        head.get_submodule(reader).register_forward_pre_hook(partial(keep, got))
    with torch.no_grad():
        head(pyramid)
        towers = head.towers(pyramid)
    for reader, branch in readers.items():
        assert [feature.shape for feature in towers[branch]] == [level.shape for level in pyramid]
        assert all(torch.equal(*pair) for pair in zip(seen[reader], towers[branch], strict=True)), reader


@pytest.mark.parametrize("name", ["head_fcos", "head_fcos_tricks", "head_vfnet_s3"])
def test_bfloat16_autocast(name: str) -> None:
    head = build(name, {})
    pyramid, targets = random_pyramid(2), random_targets([4, 3], 256, 320, 5)
    expected = head.loss(head(pyramid), targets, IMAGE_SIZES)
    with torch.autocast("cpu", torch.bfloat16):
        losses = head.loss(head(pyramid), targets, IMAGE_SIZES)
    for key, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[key], rtol=0.02, atol=0)  # bfloat16 has 8 bits
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (FCOSHead, {"strides": (8, 16)}, r"regress_ranges=.* must be as many as strides"),
        (FCOSHead, {"num_convs": 0}, "num_convs=0 must be at least 1"),
        (FCOSHead, {"norm_groups": 5}, "multiple of norm_groups"),
        (FCOSHead, {"msil": {"apply": "bth"}}, "apply must be one of"),
        (VFNetHead, {"strides": (8, 16)}, r"regress_denoms=.* must be as many as strides"),
    ],
)
def test_wrong_settings_are_refused(kind: type[DenseHead], settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kind(5, 32, **{"norm_groups": 8, **settings})
    with pytest.raises(TypeError, match="num_conv"):
        kind(5, 32, num_conv=1)


def test_wrong_inputs_are_refused() -> None:
    head = build("head_atss")
    with pytest.raises(ValueError, match="5 levels, the pyramid 4"):
        head(random_pyramid(2)[:4])
    predictions = head(random_pyramid(2))
    targets = random_targets([2, 1], 256, 320, 5)
    with pytest.raises(ValueError, match="2 images need as many targets and sizes, not 1 and 2"):
        head.loss(predictions, targets[:1], IMAGE_SIZES)
