"""ATSS, GFL, TOOD and RetinaNet against MMDetection's numbers, and what MSIL changes at the seam of all seven forms."""

from __future__ import annotations

import math
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from msil.detection import DenseHead
from msil.detection.assign import ground_truth
from msil.detection.heads import HEADS as REGISTERED
from msil.detection.weights import from_mmdet

from .cases import (
    IMAGE_SIZES,
    MAP_SIZES,
    assert_gradient,
    map_sizes_of,
    random_pyramid,
    random_targets,
    reference_pyramid,
    reference_targets,
)
from .reference import CASES, HEADS, build, flat, levels, reference_head

FILES = [name for name, epoch in CASES if epoch != "4"]
SWITCHES = [
    {"align": align, "separate": separate, "apply": apply, "kernel_size": size}
    for align, separate, apply, size in product((True, False), (True, False), ("cls", "reg", "both"), (1, 3))
]


@pytest.mark.parametrize("name", FILES)
def test_forward_of_the_reference(golden, name: str) -> None:
    head = reference_head(golden, name)
    predictions = head(reference_pyramid(golden))
    expected, per_cell = golden(name, "train_out/"), head.priors.per_cell
    assert predictions.map_sizes == MAP_SIZES
    # TOOD's reference puts out probabilities
    scores = predictions.logits.sigmoid() if name == "head_tood" else predictions.logits
    torch.testing.assert_close(scores, flat(expected, "0/", per_cell), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(predictions.box, flat(expected, "1/", per_cell), rtol=1e-5, atol=1e-5)
    if name == "head_atss":
        torch.testing.assert_close(predictions.quality, flat(expected, "2/").squeeze(-1), rtol=1e-5, atol=1e-5)
    else:
        assert predictions.quality is None and "2/0" not in expected


@pytest.mark.parametrize(("name", "epoch"), CASES)
@pytest.mark.parametrize("case", ["A", "B"])
def test_targets_and_divisors_of_the_reference(golden, name: str, epoch: str, case: str) -> None:
    head = reference_head(golden, name, epoch)
    predictions, targets = head(reference_pyramid(golden)), reference_targets(golden, case)
    labels, boxes, positive, ignored, metric, _ = head.targets(predictions, targets, IMAGE_SIZES)
    expected = golden(name, f"{case}{epoch}/")
    assert torch.equal(labels, levels(expected, "target/labels/"))
    assert torch.equal(positive, labels < 5) and positive.any()
    assert torch.equal(ignored, levels(expected, "target/label_weights/") == 0) and ignored.any()
    if name == "head_retina":  # their targets are deltas
        boxes = head.coder.encode(head.priors_of(predictions), boxes)
    torch.testing.assert_close(
        boxes[positive],
        levels(expected, "target/bbox_targets/")[positive],
        rtol=0,
        atol=1e-5 if name == "head_retina" else 1e-4,
    )
    assert (metric is not None) == (epoch == "4")
    if metric is not None:
        torch.testing.assert_close(metric, levels(expected, "target/metrics/"), rtol=1e-5, atol=1e-6)
    if name != "head_tood":  # whose losses divide behind their modules, which see 1
        truth = ground_truth(targets, IMAGE_SIZES, torch.device("cpu"))
        terms = head.terms(predictions, head.priors_of(predictions), truth)
        for term in {"loss_cls", "loss_centerness"} & terms.keys():
            assert set(expected[f"avg_factor/{term}"].tolist()) == {terms[term].normalizer.item()}


@pytest.mark.parametrize(("name", "epoch"), CASES)
@pytest.mark.parametrize("case", ["A", "B", "C"])
def test_losses_and_gradients_of_the_reference(golden, name: str, epoch: str, case: str) -> None:
    head = reference_head(golden, name, epoch)
    pyramid = [level.requires_grad_() for level in reference_pyramid(golden)]
    losses = head.loss(head(pyramid), reference_targets(golden, case), IMAGE_SIZES)
    expected = golden(name, f"{case}{epoch}/")
    assert {f"loss/{term}/0" for term in losses} | {"loss/total"} == {
        key for key in expected if key.startswith("loss/") and key.endswith(("/0", "total"))
    }
    for term, value in losses.items():  # theirs are by level
        torch.testing.assert_close(
            value, sum(expected[f"loss/{term}/{level}"] for level in range(5)), rtol=1e-5, atol=0
        )
    total = torch.stack(list(losses.values())).sum()
    torch.testing.assert_close(total, expected["loss/total"], rtol=1e-5, atol=0)

    total.backward()
    gradients = {name: parameter.grad for name, parameter in head.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in gradients.values())
    theirs = from_mmdet({key.removeprefix("grad/"): grad for key, grad in expected.items() if key.startswith("grad/")})
    # B has the gradients of a few parameters, C of none
    assert theirs.keys() == gradients.keys() if case == "A" else bool(theirs) == (case == "B")
    for key, grad in theirs.items():
        assert_gradient(gradients[key], grad, key)
    if case == "A":
        theirs = [expected[f"grad_feat/{level}"] for level in range(5)]
        if name == "head_retina":
            # P7 has no positive anchor and logits round -9: its gradient is of size 1e-11, where the rounding of the
            # reference's float32 focal loss shows. It is 6e-5 away from float64, ours 1e-6.
            assert theirs[4].abs().max() < 1e-10 and pyramid[4].grad is not None
            assert (pyramid[4].grad - theirs[4]).abs().max() <= 1e-4 * theirs[4].abs().max()
            theirs = theirs[:4]
        for level, grad in enumerate(theirs):
            assert_gradient(pyramid[level].grad, grad, f"P{level + 3}")
    if case == "C":
        assert all(loss == 0 for term, loss in losses.items() if term != "loss_cls")


@pytest.mark.parametrize(
    ("run", "settings"),
    [
        ("a", {"score_thresh": 0.05, "nms_thresh": 0.6, "topk_candidates": 1000, "detections_per_img": 100}),
        ("b", {"score_thresh": 0.02, "nms_thresh": 0.5, "topk_candidates": 50, "detections_per_img": 20}),
    ],
)
@pytest.mark.parametrize("name", HEADS)
def test_predictions_of_the_reference(golden, name: str, run: str, settings: dict) -> None:
    head = reference_head(golden, name)
    with torch.no_grad():
        detections = head.detect(head(reference_pyramid(golden)), IMAGE_SIZES, **settings)
    for image, found in enumerate(detections):
        expected = golden(name, f"pred/{run}/{image}/")
        assert len(found.labels) > 0
        assert torch.equal(found.labels, expected["labels"])
        torch.testing.assert_close(found.boxes, expected["boxes"], rtol=0, atol=1e-2)
        torch.testing.assert_close(found.scores, expected["scores"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["atss", "gfl", "tood", "retinanet"])
def test_weights_at_the_start(golden, name: str) -> None:
    misc, key = golden.misc(), name.removesuffix("net")
    torch.manual_seed(0)
    state = REGISTERED[name](80, 256).state_dict()
    assert sum(value.numel() for value in state.values()) == misc["num_params"][key]
    facts = misc["init_weights"][key]
    means = from_mmdet({key: torch.full(fact["shape"], fact["mean"]) for key, fact in facts.items()})
    stds = from_mmdet({key: torch.full(fact["shape"], fact["std"]) for key, fact in facts.items()})
    assert state.keys() == means.keys()
    for key, value in state.items():
        assert value.shape == means[key].shape, key
        if value.ndim < 4:  # biases, norms and scales are constants, given to four digits
            assert torch.equal(stds[key], torch.zeros_like(value)), key
            torch.testing.assert_close(value, means[key], rtol=0, atol=5e-5)
            continue
        std = 0.001 if stds[key].flatten()[0] < 0.003 else 0.01  # those of the published rules
        # five deviations of the estimates
        assert abs(value.mean()) < 5 * std / math.sqrt(value.numel()), key
        assert abs(value.std() / std - 1) < 5 / math.sqrt(2 * value.numel()), key


def outputs(head: DenseHead, pyramid: list[Tensor]) -> dict[str, Tensor]:
    predictions = head(pyramid)
    found = {name: getattr(predictions, name) for name in ("logits", "box", "quality", "first_box")}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


@pytest.mark.parametrize("name", HEADS)
def test_without_msil_and_with_a_block_for_neither_branch(name: str) -> None:
    sizes = map_sizes_of(64, 96)
    targets = random_targets([4, 2], 64, 96, 5)
    plain, none = build(name), build(name, {"apply": "none"})
    assert plain.state_dict().keys() == none.state_dict().keys()
    assert plain.msil is None and none.msil is None
    pyramid = random_pyramid(2, map_sizes=sizes)
    ours, theirs = outputs(plain, pyramid), outputs(none, pyramid)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours) and ours.keys() == theirs.keys()
    for epoch in (0, 4):
        losses = []
        for head in (plain, none):
            head.set_epoch(epoch)
            losses.append(head.loss(head(pyramid), targets, [(64, 96)] * 2))
        assert losses[0] == losses[1]


@pytest.mark.parametrize("name", HEADS)
def test_every_switch_starts_from_the_plain_weights(name: str) -> None:
    plain = build(name).state_dict()
    for switches in SWITCHES:
        state = build(name, switches).state_dict()
        assert {key for key in state if not key.startswith("msil.")} == plain.keys() != state.keys()
        assert all(torch.equal(state[key], value) for key, value in plain.items()), switches


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


@pytest.mark.parametrize("name", HEADS)
def test_a_branch_without_gate_does_not_change(name: str) -> None:
    pyramid = random_pyramid(1, map_sizes=map_sizes_of(64, 96))
    with torch.no_grad():
        plain = outputs(build(name), pyramid)
        for apply, changed in zip(("cls", "reg"), CHANGED[name], strict=True):
            gated = outputs(build(name, {"apply": apply}), pyramid)
            assert {key for key in plain if not torch.equal(gated[key], plain[key])} == changed, apply


@pytest.mark.parametrize("name", HEADS)
def test_every_switch_trains_every_parameter(name: str) -> None:
    """The block's own gradients are not zero either; its attention is wide enough for some of it to be alive."""
    pyramid = random_pyramid(2, map_sizes=map_sizes_of(64, 64))
    for switches in SWITCHES:
        head = build(name, {**switches, "reduction": 2})
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


@pytest.mark.parametrize("name", HEADS)
def test_towers_are_what_the_predictors_get(name: str) -> None:
    head, pyramid = build(name, {}), random_pyramid(1, map_sizes=map_sizes_of(64, 96))
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
