"""The FCOS head, in both published forms, against MMDetection's numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from msil.detection import FCOSHead, Predictions
from msil.detection.weights import from_mmdet

from .cases import (
    FORMS,
    IMAGE_SIZES,
    MAP_SIZES,
    assert_gradient,
    dense,
    random_pyramid,
    random_targets,
    reference_pyramid,
    reference_targets,
    small_head,
    target,
)
from .reference import reference_head

forms = pytest.mark.parametrize("form", FORMS)


@forms
def test_forward_of_the_reference(golden, form: str) -> None:
    head = reference_head(golden, form)
    predictions = head(reference_pyramid(golden))
    expected = golden(form, "train_out/")
    assert predictions.map_sizes == MAP_SIZES
    torch.testing.assert_close(predictions.logits, dense(expected, "0/"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(predictions.box, dense(expected, "1/"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(predictions.quality[..., None], dense(expected, "2/"), rtol=1e-5, atol=1e-5)
    # what is returned does not depend on the mode
    in_eval = head.eval()(reference_pyramid(golden))
    assert torch.equal(in_eval.box, predictions.box)


@forms
@pytest.mark.parametrize("case", ["A", "B"])
def test_targets_of_the_reference(golden, form: str, case: str) -> None:
    head = reference_head(golden, form)
    predictions = head(reference_pyramid(golden))
    found = head.targets(predictions, reference_targets(golden, case), IMAGE_SIZES)
    labels, positive = found.labels, found.positive
    distances = head.coder.encode(head.priors_of(predictions), found.boxes)
    expected = golden(form, f"{case}/target/")
    expected_labels = torch.cat([expected[f"labels/{level}"].view(2, -1) for level in range(5)], 1)
    assert torch.equal(labels, expected_labels)
    expected_distances = torch.cat([expected[f"bbox_targets/{level}"].view(2, -1, 4) for level in range(5)], 1)
    assert torch.equal(positive, labels < 5) and not found.ignored.any()
    torch.testing.assert_close(distances[positive], expected_distances[positive], rtol=0, atol=1e-4)


@forms
@pytest.mark.parametrize("case", ["A", "B", "C"])
def test_losses_and_gradients_of_the_reference(golden, form: str, case: str) -> None:
    head = reference_head(golden, form)
    pyramid = [level.requires_grad_() for level in reference_pyramid(golden)]
    losses = head.loss(head(pyramid), reference_targets(golden, case), IMAGE_SIZES)
    expected = golden(form, f"{case}/")
    total = torch.stack(list(losses.values())).sum()
    assert list(losses) == ["loss_cls", "loss_bbox", "loss_centerness"]
    for name, value in {**losses, "total": total}.items():
        torch.testing.assert_close(value, expected[f"loss/{name}"], rtol=1e-5, atol=0)

    total.backward()
    gradients = {name: p.grad for name, p in head.named_parameters() if p.grad is not None}
    assert len(gradients) == len(head.state_dict())
    # B has the gradients of a few parameters, C of none
    gradients_of = {key.removeprefix("grad/"): grad for key, grad in expected.items() if key.startswith("grad/")}
    compared = from_mmdet(gradients_of)
    assert len(compared) >= {"A": len(gradients), "B": 8, "C": 0}[case]
    for name, grad in compared.items():
        assert_gradient(gradients[name], grad, name)
    for level, feature in enumerate(pyramid):
        if case == "A":
            assert_gradient(feature.grad, expected[f"grad_feat/{level}"], f"P{level + 3}")
    if case == "C":  # no box: the box terms are 0 and still reach every parameter
        assert losses["loss_bbox"] == 0 and losses["loss_centerness"] == 0
        assert all(grad.isfinite().all() for grad in gradients.values())


@forms
def test_weights_at_the_start_are_those_of_the_reference(golden, form: str) -> None:
    name = form.removeprefix("head_")
    misc = golden.misc()
    torch.manual_seed(0)
    state = FCOSHead(80, 256, **FORMS[form]).state_dict()
    assert sum(value.numel() for value in state.values()) == misc["num_params"][name]
    facts = misc["init_weights"][name]
    means = from_mmdet({key: torch.full(fact["shape"], fact["mean"]) for key, fact in facts.items()})
    stds = from_mmdet({key: torch.full(fact["shape"], fact["std"]) for key, fact in facts.items()})
    assert state.keys() == means.keys()
    for key, value in state.items():
        assert value.shape == means[key].shape, key
        if value.ndim == 4:  # drawn from N(0, 0.01): five deviations of the estimates, of ours and of theirs
            assert abs(value.mean()) < 5 * 0.01 / math.sqrt(value.numel()), key
            assert abs(value.std() / 0.01 - 1) < 5 / math.sqrt(2 * value.numel()), key
            assert abs(stds[key].flatten()[0] / 0.01 - 1) < 5 / math.sqrt(2 * value.numel()) + 0.01, key
        else:  # biases, norms and scales are constants, given to four digits
            assert torch.equal(stds[key], torch.zeros_like(value)), key
            torch.testing.assert_close(value, means[key], rtol=0, atol=5e-5)


def test_a_module_of_ones_own_may_sit_at_the_seam() -> None:
    block = nn.Module()
    assert small_head(msil=block).msil is block


def test_an_image_without_boxes_adds_background_only() -> None:
    head = small_head()
    predictions = head(random_pyramid(2))
    boxes = random_targets([5], 256, 320, 5)[0]
    with_empty = head.loss(predictions, [boxes, target([])], IMAGE_SIZES)
    first = Predictions(predictions.logits[:1], predictions.box[:1], MAP_SIZES, predictions.quality[:1])
    alone = head.loss(first, [boxes], IMAGE_SIZES[:1])
    torch.testing.assert_close(with_empty["loss_bbox"], alone["loss_bbox"])
    torch.testing.assert_close(with_empty["loss_centerness"], alone["loss_centerness"])
    assert with_empty["loss_cls"] > alone["loss_cls"]


@forms
def test_bfloat16_autocast(form: str) -> None:
    head = small_head(**FORMS[form])
    pyramid, targets = random_pyramid(2), random_targets([4, 3], 256, 320, 5)
    expected = head.loss(head(pyramid), targets, IMAGE_SIZES)
    with torch.autocast("cpu", torch.bfloat16):
        losses = head.loss(head(pyramid), targets, IMAGE_SIZES)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name], rtol=0.02, atol=0)  # bfloat16 has 8 bits


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss_bbox": "diou"}, "loss_bbox=diou must be giou or iou"),
        ({"strides": (8, 16)}, r"regress_ranges=.* must be as many as strides"),
        ({"num_convs": 0}, "num_convs=0 must be at least 1"),
        ({"point_offset": 1.0}, "point_offset=1.0 must be at least 0 and below 1"),
        ({"center_sample_radius": 0}, "center_sample_radius=0 must be above 0"),
        ({"norm_groups": 5}, "multiple of norm_groups"),
        ({"msil": {"apply": "bth"}}, "apply must be one of"),
    ],
)
def test_wrong_settings_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FCOSHead(5, 32, **{"norm_groups": 8, **settings})


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="FCOSHead has no option num_conv; it has num_convs, norm_groups"):
        FCOSHead(5, 32, num_conv=1)
