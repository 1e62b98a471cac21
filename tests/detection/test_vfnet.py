"""The VFNet head against MMDetection's numbers, and with MSIL at its seam."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou, deform_conv2d, generalized_box_iou

from msil.detection import Target, VFNetHead
from msil.detection.assign import ATSSAssigner, ground_truth
from msil.detection.losses import box_quality, varifocal_loss
from msil.detection.priors import PriorGenerator
from msil.detection.weights import from_mmdet

from .cases import (
    IMAGE_SIZES,
    MAP_SIZES,
    STRIDES,
    assert_gradient,
    dense,
    map_sizes_of,
    random_pyramid,
    random_targets,
    reference_pyramid,
    reference_targets,
    small_vfnet,
)
from .reference import reference_head

REFERENCE = "head_vfnet_s3"


def test_forward_of_the_reference(golden) -> None:
    head = reference_head(golden, REFERENCE)
    predictions = head(reference_pyramid(golden))
    expected = golden(REFERENCE, "train_out/")
    assert predictions.map_sizes == MAP_SIZES
    assert predictions.quality is None
    torch.testing.assert_close(predictions.logits, dense(expected, "0/"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(predictions.first_box, dense(expected, "1/"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(predictions.box, dense(expected, "2/"), rtol=1e-5, atol=1e-5)
    # what is returned does not depend on the mode
    in_eval = head.eval()(reference_pyramid(golden))
    assert torch.equal(in_eval.logits, predictions.logits)
    assert torch.equal(in_eval.box, predictions.box)
    expected = golden(REFERENCE, "eval_out/")
    torch.testing.assert_close(in_eval.logits, dense(expected, "0/"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(in_eval.box, dense(expected, "1/"), rtol=1e-5, atol=1e-5)


def levels_of(arrays: dict[str, Tensor], name: str, columns: int = 1) -> Tensor:
    """The reference's targets, by level and then by image, as (2, P, columns)."""
    return torch.cat([arrays[f"{name}/{level}"].view(2, -1, columns) for level in range(5)], 1)


@pytest.mark.parametrize("case", ["A", "B"])
def test_targets_and_divisors_of_the_reference(golden, case: str) -> None:
    head = reference_head(golden, REFERENCE)
    predictions = head(reference_pyramid(golden))
    found = head.targets(predictions, reference_targets(golden, case), IMAGE_SIZES)
    labels, positive = found.labels, found.positive
    distances = head.coder.encode(head.priors_of(predictions), found.boxes)
    expected = golden(REFERENCE, f"{case}/")
    assert torch.equal(labels, levels_of(expected, "target/labels").squeeze(-1))
    assert torch.equal(positive, labels < 5)
    torch.testing.assert_close(
        distances[positive], levels_of(expected, "target/bbox_targets", 4)[positive], rtol=0, atol=1e-4
    )
    assert positive.sum() == expected["avg_factor/loss_cls"]
    for name, predicted in (
        ("loss_bbox", predictions.first_box),
        ("loss_bbox_refine", predictions.box),
    ):
        total = box_quality(predicted, distances, positive).sum()
        torch.testing.assert_close(total, expected[f"avg_factor/{name}"][0], rtol=1e-5, atol=0, check_dtype=False)


@pytest.mark.parametrize("case", ["A", "B", "C"])
def test_losses_and_gradients_of_the_reference(golden, case: str) -> None:
    head = reference_head(golden, REFERENCE)
    pyramid = [level.requires_grad_() for level in reference_pyramid(golden)]
    losses = head.loss(head(pyramid), reference_targets(golden, case), IMAGE_SIZES)
    expected = golden(REFERENCE, f"{case}/")
    total = torch.stack(list(losses.values())).sum()
    assert list(losses) == ["loss_cls", "loss_bbox", "loss_bbox_rf"]
    for name, value in {**losses, "total": total}.items():
        torch.testing.assert_close(value, expected[f"loss/{name}"], rtol=1e-5, atol=0)

    total.backward()
    gradients = {name: p.grad for name, p in head.named_parameters() if p.grad is not None}
    assert len(gradients) == len(head.state_dict())
    # B has the gradients of a few parameters, C of none
    gradients_of = {key.removeprefix("grad/"): grad for key, grad in expected.items() if key.startswith("grad/")}
    compared = from_mmdet(gradients_of)
    assert len(compared) == {"A": len(gradients), "B": 8, "C": 0}[case]
    for name, grad in compared.items():
        assert_gradient(gradients[name], grad, name)
    if case == "A":
        for level, feature in enumerate(pyramid):
            assert_gradient(feature.grad, expected[f"grad_feat/{level}"], f"P{level + 3}")
    if case == "C":  # no box: the box terms are 0 and still reach every parameter
        assert losses["loss_bbox"] == 0 and losses["loss_bbox_rf"] == 0
        assert all(grad.isfinite().all() for grad in gradients.values())


def test_points_of_the_padding_are_negatives(golden) -> None:
    """Without them the reference's loss would be another one: they are no candidates, but not left out either."""
    head = reference_head(golden, REFERENCE)
    predictions = head(reference_pyramid(golden))
    losses = head.loss(predictions, reference_targets(golden, "A"), IMAGE_SIZES)
    valid = golden("primitives", "anchors/atss/valid_img1/")
    padding = ~torch.cat([valid[str(level)] for level in range(5)]).bool()
    beyond = predictions.logits[1, padding]
    share = varifocal_loss(beyond, torch.full((len(beyond),), 5), torch.zeros(len(beyond))) / 75
    expected = golden(REFERENCE, "A/loss/")["loss_cls"]
    assert share > 0.01 * expected
    torch.testing.assert_close(losses["loss_cls"], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("init", ["authors", "mmdet"])
def test_weights_at_the_start(golden, init: str) -> None:
    """mmdet: as its file has them. authors: N(0, 0.01) also for the three that are otherwise there."""
    misc = golden.misc()
    torch.manual_seed(0)
    state = VFNetHead(80, 256, init=init).state_dict()
    assert sum(value.numel() for value in state.values()) == misc["num_params"]["vfnet"]
    facts = misc["init_weights"]["vfnet"]
    means = from_mmdet({key: torch.full(fact["shape"], fact["mean"]) for key, fact in facts.items()})
    stds = from_mmdet({key: torch.full(fact["shape"], fact["std"]) for key, fact in facts.items()})
    assert state.keys() == means.keys()
    otherwise = []
    for key, value in state.items():
        assert value.shape == means[key].shape, key
        if value.ndim < 4:  # biases, norms and scales are constants, given to four digits
            assert torch.equal(stds[key], torch.zeros_like(value)), key
            torch.testing.assert_close(value, means[key], rtol=0, atol=5e-5)
            continue
        std = float(stds[key].flatten()[0])
        if std > 0.015:  # Kaiming's sqrt(2 / 9C)
            assert std == pytest.approx(math.sqrt(2 / (9 * 256)), abs=1e-4)
            otherwise.append(key)
        if std < 0.015 or init == "authors":
            std = 0.01
        # five deviations of the estimates, of ours and of theirs
        assert abs(value.mean()) < 5 * std / math.sqrt(value.numel()), key
        assert abs(value.std() / std - 1) < 5 / math.sqrt(2 * value.numel()) + 0.005, key
    assert sorted(otherwise) == ["cls_star.weight", "reg_conv.conv.weight", "reg_star.weight"]


def test_names_of_the_weights() -> None:
    towers = {
        f"{tower}_tower.{i}.{name}"
        for tower in ("cls", "reg")
        for i in range(3)
        for name in ("conv.weight", "norm.weight", "norm.bias")
    }
    others = {
        "reg_conv.conv.weight",
        "reg_conv.norm.weight",
        "reg_conv.norm.bias",
        "bbox_reg.weight",
        "bbox_reg.bias",
        "reg_star.weight",
        "bbox_refine.weight",
        "bbox_refine.bias",
        "cls_star.weight",
        "cls_logits.weight",
        "cls_logits.bias",
        "scales",
        "scales_refine",
    }
    state = VFNetHead(5, 32, norm_groups=8).state_dict()
    assert state.keys() == towers | others
    assert state["scales"].shape == state["scales_refine"].shape == (5,)


def plain_forward(head: VFNetHead, pyramid: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Logits, initial and refined distances (N, P, ...) of each level, by torchvision's deformable convolution."""
    levels = []
    regular = torch.tensor([float(step) for y in (-1, 0, 1) for x in (-1, 0, 1) for step in (y, x)]).view(18, 1, 1)
    for index, (level, stride, denom) in enumerate(zip(pyramid, STRIDES, (64, 128, 256, 512, 1024), strict=True)):
        cls_feat, reg_feat = head.cls_tower(level), head.reg_tower(level)
        initial = torch.exp(head.scales[index] * head.bbox_reg(head.reg_conv(reg_feat))) * denom
        left, top, right, bottom = ((0.9 * initial.detach() + 0.1 * initial) / stride).unbind(1)
        zero = torch.zeros_like(left)
        taps = [(-top, -left), (-top, zero), (-top, right), (zero, -left), (zero, zero), (zero, right),
                (bottom, -left), (bottom, zero), (bottom, right)]  # fmt: skip
        offsets = torch.stack([side for tap in taps for side in tap], 1) - regular
        reg_star = deform_conv2d(reg_feat, offsets, head.reg_star.weight, padding=1).relu()
        cls_star = deform_conv2d(cls_feat, offsets, head.cls_star.weight, padding=1).relu()
        refined = torch.exp(head.scales_refine[index] * head.bbox_refine(reg_star)) * initial.detach()
        maps = (head.cls_logits(cls_star), initial, refined)
        levels.append(tuple(one.flatten(2).transpose(1, 2) for one in maps))
    return levels


def plain_losses(
    head: VFNetHead, pyramid: list[Tensor], targets: list[Target], image_sizes: list[tuple[int, int]]
) -> dict[str, Tensor]:
    """VFNet's loss positive by positive, as the rules say it; the assignment has tests of its own."""
    logits, initial, refined = (torch.cat(parts, 1) for parts in zip(*plain_forward(head, pyramid), strict=True))
    map_sizes = tuple((level.shape[2], level.shape[3]) for level in pyramid)
    priors = PriorGenerator(STRIDES, scales=(8.0,))(map_sizes, torch.device("cpu"))
    matched = ATSSAssigner()(priors, ground_truth(targets, image_sizes, torch.device("cpu"))).index
    quality = torch.zeros_like(logits)
    ious: list[list[Tensor]] = [[], []]
    giou_losses: list[list[Tensor]] = [[], []]
    for image, point in (matched >= 0).nonzero().tolist():
        index = int(matched[image, point])
        box, label = targets[image].boxes[index : index + 1], int(targets[image].labels[index])
        for stage, distances in enumerate((initial, refined)):
            side = distances[image, point]
            corner = priors.centers[point]
            predicted = torch.cat([corner - side[:2], corner + side[2:]])[None]
            ious[stage].append(box_iou(predicted, box).detach().squeeze())
            giou_losses[stage].append(1 - generalized_box_iou(predicted, box).squeeze())
        quality[image, point, label] = ious[1][-1]
    p = logits.sigmoid()
    weight = torch.where(quality > 0, quality, 0.75 * p**2)
    cross_entropy = -quality * p.log() - (1 - quality) * (-logits).sigmoid().log()
    losses = {"loss_cls": (weight * cross_entropy).sum() / max(len(ious[0]), 1)}
    for stage, (name, factor) in enumerate({"loss_bbox": 1.5, "loss_bbox_rf": 2.0}.items()):
        weights = torch.stack(ious[stage])
        losses[name] = factor * (weights * torch.stack(giou_losses[stage])).sum() / weights.sum().clamp(min=1)
    return losses


@pytest.mark.parametrize("seed", range(4))
def test_as_a_plain_implementation(seed: int) -> None:
    """Other weights, boxes and image sizes than the reference's, in every loss and gradient."""
    sizes = [[(96, 160), (70, 140)], [(64, 300), (33, 290)], [(200, 90)], [(32, 32), (128, 64), (90, 90)]][seed]
    height, width = (32 * math.ceil(max(side) / 32) for side in zip(*sizes, strict=True))
    head = small_vfnet()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if parameter.ndim == 4:
                parameter.mul_(4)
            elif "scales" in name:
                parameter.uniform_(0.7, 1.3)
            elif name != "cls_logits.bias":
                parameter.add_(0.1 * torch.randn_like(parameter))
        head.bbox_reg.bias.sub_(1)  # as the boxes are smaller than a level's range
    pyramid = random_pyramid(len(sizes), map_sizes=map_sizes_of(height, width), seed=seed)
    targets = [random_targets([5 - i], h, w, 5, seed)[0] for i, (h, w) in enumerate(sizes)]

    def losses_and_gradients(loss: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        head.zero_grad()
        for level in pyramid:
            level.grad = None
        losses = loss()
        torch.stack(list(losses.values())).sum().backward()
        gradients = {name: p.grad for name, p in head.named_parameters()}
        gradients |= {f"P{index + 3}": level.grad for index, level in enumerate(pyramid)}
        return losses, {name: grad.clone() for name, grad in gradients.items() if grad is not None}

    for level in pyramid:
        level.requires_grad_()
    losses, gradients = losses_and_gradients(lambda: head.loss(head(pyramid), targets, sizes))
    expected, expected_gradients = losses_and_gradients(lambda: plain_losses(head, pyramid, targets, sizes))
    assert losses["loss_bbox"] > 0.1
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=2e-5, atol=0)
    assert gradients.keys() == expected_gradients.keys()
    assert len(gradients) == len(head.state_dict()) + 5
    for name, grad in expected_gradients.items():
        allowed = 2e-5 * grad.abs().max()
        assert (gradients[name] - grad).abs().max() <= allowed, name
