"""How the VFNet head behaves: with MSIL at its seam, in several processes, in bfloat16, when it learns."""

from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torchvision.ops import box_iou

from msil.detection import Detections, Predictions, Target, VFNetHead, build_detector
from msil.detection.heads.base import flatten_levels
from msil.detection.starconv import star_offsets

from .cases import (
    IMAGE_SIZES,
    MAP_SIZES,
    VARIANTS,
    random_pyramid,
    random_targets,
    small_head,
    small_vfnet,
    target,
    variant_name,
)

FULL = {"align": True, "separate": True, "apply": "both"}
SMALL_MAPS = ((8, 12), (4, 6), (2, 3), (1, 2), (1, 1))  # of 64 x 96 pixels


def test_the_seam_is_behind_the_towers_and_before_the_initial_regression() -> None:
    class Swap(nn.Module):
        def forward(self, cls_feat: Tensor, reg_feat: Tensor) -> tuple[Tensor, Tensor]:
            return 2 * reg_feat, 3 * cls_feat

    head = small_vfnet()
    head.msil = Swap()
    with torch.no_grad():
        head.scales[-1], head.scales_refine[-1] = 1.5, 0.5
    pyramid = random_pyramid(2)
    predictions = head(pyramid)
    # The definition, written down for the 2 x 3 points of P7.
    cls_feat, reg_feat = 2 * head.reg_tower(pyramid[-1]), 3 * head.cls_tower(pyramid[-1])
    initial = (1.5 * head.bbox_reg(head.reg_conv(reg_feat))).exp() * 1024
    offsets = star_offsets(initial, 128)
    factor = (0.5 * head.bbox_refine(head.reg_star(reg_feat, offsets).relu())).exp()
    logits = head.cls_logits(head.cls_star(cls_feat, offsets).relu())
    last = slice(-6, None)
    torch.testing.assert_close(predictions.initial_distances[:, last], flatten_levels([initial]))
    torch.testing.assert_close(predictions.distances[:, last], flatten_levels([factor * initial]))
    torch.testing.assert_close(predictions.logits[:, last], flatten_levels([logits]))


def read_by(head: VFNetHead, pyramid: list[Tensor]) -> dict[str, Tensor]:
    """What the star convolutions and the predictors got of the finest level, and the predictions."""
    seen: dict[str, list[Tensor]] = {name: [] for name in ("reg_conv", "reg_star", "cls_star")}
    hooks = [
        getattr(head, name).register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].detach()))
        for name in seen
    ]
    predictions = head(pyramid)
    for hook in hooks:
        hook.remove()
    return {
        **{name: inputs[0] for name, inputs in seen.items()},
        "initial": predictions.initial_distances,
        "refined": predictions.distances,
        "logits": predictions.logits,
    }


def test_both_star_convolutions_see_the_enhanced_features() -> None:
    head = small_vfnet(FULL)
    pyramid = random_pyramid(1, map_sizes=SMALL_MAPS)
    parameters = dict(head.named_parameters())
    before = read_by(head, pyramid)

    def changed_by(gate: str) -> set[str]:
        bias = parameters[f"msil.{gate}.dec.bias"]
        with torch.no_grad():
            bias.fill_(2.0)
            after = read_by(head, pyramid)
            bias.zero_()
        return {name for name, value in after.items() if not torch.equal(value, before[name])}

    # the box decides where the classification looks
    assert changed_by("separate_reg") == {"reg_conv", "reg_star", "initial", "refined", "logits"}
    assert changed_by("separate_cls") == {"cls_star", "logits"}


def test_gradients_flow_as_through_the_reference() -> None:
    """Nothing of the refined box reaches the initial one, except a tenth through where the star looks."""
    head = small_vfnet()
    pyramid = random_pyramid(1, map_sizes=SMALL_MAPS)
    predictions = head(pyramid)
    weight = head.bbox_reg.weight
    (through_star,) = torch.autograd.grad(predictions.distances.sum(), weight, retain_graph=True)
    (full,) = torch.autograd.grad(predictions.initial_distances.sum(), weight)
    assert 0 < through_star.abs().max() < 0.01 * full.abs().max()
    # without the star's dependence there is none at all
    with torch.no_grad():
        head.reg_star.weight.zero_()
    (none,) = torch.autograd.grad(head(pyramid).distances.sum(), weight)
    assert (none == 0).all()


def summed_loss(head: VFNetHead, counts: list[int]) -> Tensor:
    pyramid = random_pyramid(len(counts), map_sizes=SMALL_MAPS)
    losses = head.loss(head(pyramid), random_targets(counts, 64, 96, 5), [(64, 96)] * len(counts))
    return torch.stack(list(losses.values())).sum()


@pytest.mark.parametrize("msil", [None, *VARIANTS, {**FULL, "kernel_size": 1}], ids=variant_name)
def test_every_variant_starts_from_the_plain_weights_and_uses_all_its_own(msil: dict | None) -> None:
    head = small_vfnet(msil)
    state, plain = head.state_dict(), small_vfnet().state_dict()
    assert {key for key in state if not key.startswith("msil.")} == plain.keys()
    assert (len(state) > len(plain)) == (msil is not None)
    for key, value in plain.items():
        assert torch.equal(state[key], value), key
    for counts in ([3], [0]):  # DDP waits for each parameter: also in a batch without a box
        head.zero_grad()
        summed_loss(head, counts).backward()
        for name, parameter in head.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_a_block_that_applies_to_nothing_is_the_plain_head() -> None:
    none, plain = small_vfnet({**FULL, "apply": "none"}), small_vfnet()
    assert none.msil is None
    pyramid = random_pyramid(2)
    ours, theirs = none(pyramid), plain(pyramid)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.distances, theirs.distances)
    assert torch.equal(ours.initial_distances, theirs.initial_distances)


def test_a_module_of_ones_own_may_sit_at_the_seam() -> None:
    block = nn.Module()
    assert small_vfnet(msil=block).msil is block


def test_an_image_without_boxes_adds_background_only() -> None:
    head = small_vfnet()
    predictions = head(random_pyramid(2))
    boxes = random_targets([5], 256, 320, 5)[0]
    with_empty = head.loss(predictions, [boxes, target([])], IMAGE_SIZES)
    assert predictions.initial_distances is not None
    first = Predictions(
        predictions.logits[:1],
        predictions.distances[:1],
        MAP_SIZES,
        initial_distances=predictions.initial_distances[:1],
    )
    alone = head.loss(first, [boxes], IMAGE_SIZES[:1])
    torch.testing.assert_close(with_empty["loss_bbox"], alone["loss_bbox"])
    torch.testing.assert_close(with_empty["loss_bbox_rf"], alone["loss_bbox_rf"])
    assert with_empty["loss_cls"] > alone["loss_cls"]


def test_boxes_at_background_points_may_be_anything() -> None:
    head = small_vfnet()
    predictions = head(random_pyramid(2))
    targets = random_targets([5, 3], 256, 320, 5)
    labels, _ = head.targets(predictions, targets, IMAGE_SIZES)
    background = (labels == 5)[..., None]
    assert predictions.initial_distances is not None
    clean = [predictions.initial_distances.detach(), predictions.distances.detach()]
    spoilt = [torch.where(background, math.nan, clean[0]), torch.where(background, math.inf, clean[1])]

    def losses_and_gradients(initial: Tensor, refined: Tensor) -> tuple[Tensor, list[Tensor]]:
        leaves = [initial.clone().requires_grad_(), refined.clone().requires_grad_()]
        one = Predictions(predictions.logits.detach(), leaves[1], MAP_SIZES, initial_distances=leaves[0])
        losses = torch.stack(list(head.loss(one, targets, IMAGE_SIZES).values()))
        return losses.detach(), list(torch.autograd.grad(losses.sum(), leaves))

    expected, expected_gradients = losses_and_gradients(*clean)
    losses, gradients = losses_and_gradients(*spoilt)
    assert torch.equal(losses, expected)
    for got, same in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(got, same)
        assert (got[background.squeeze(-1)] == 0).all() and (got != 0).any()


@pytest.mark.parametrize("msil", [None, FULL], ids=["plain", "msil"])
def test_bfloat16_autocast(msil: dict | None) -> None:
    head = small_vfnet(msil)
    pyramid, targets = random_pyramid(2), random_targets([4, 3], 256, 320, 5)
    expected = head.loss(head(pyramid), targets, IMAGE_SIZES)
    with torch.autocast("cpu", torch.bfloat16):
        losses = head.loss(head(pyramid), targets, IMAGE_SIZES)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name], rtol=0.02, atol=0)  # bfloat16 has 8 bits
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"init": "kaiming"}, "init must be authors or mmdet, not 'kaiming'"),
        ({"strides": (8, 16)}, "2 strides need as many regress_denoms, not 5"),
        ({"norm_groups": 5}, "multiple of norm_groups"),
        ({"msil": {"apply": "bth"}}, "apply must be one of"),
    ],
)
def test_wrong_settings_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        VFNetHead(5, 32, **{"norm_groups": 8, **settings})


def test_wrong_inputs_are_refused() -> None:
    head = small_vfnet()
    with pytest.raises(ValueError, match="5 levels, the pyramid 4"):
        head(random_pyramid(2)[:4])
    predictions = head(random_pyramid(2))
    targets = random_targets([2, 1], 256, 320, 5)
    with pytest.raises(ValueError, match="2 images need as many targets and sizes, not 1 and 2"):
        head.loss(predictions, targets[:1], IMAGE_SIZES)
    with pytest.raises(ValueError, match="2 images need as many targets and sizes, not 2 and 3"):
        head.loss(predictions, targets, [*IMAGE_SIZES, (8, 8)])


def test_predictions_move_with_all_their_tensors() -> None:
    moved = small_vfnet()(random_pyramid(1, map_sizes=SMALL_MAPS)).to("meta")
    assert moved.initial_distances is not None and moved.centerness is None
    assert {value.device.type for value in (moved.logits, moved.distances, moved.initial_distances)} == {"meta"}
    assert moved.map_sizes == SMALL_MAPS
    fcos = small_head()
    assert fcos(random_pyramid(1, map_sizes=SMALL_MAPS)).to("meta").initial_distances is None


# The boxes of either rank, for a run in which one of them has none.
RANKS = {"many and few": (9, 4), "many and none": (9, 0)}


def _targets(counts: tuple[int, int]) -> list[Target]:
    """Boxes of about the size that an untrained head predicts, so that no divisor falls below 1."""
    generator = torch.Generator().manual_seed(0)
    targets = []
    for count in counts:
        corner = torch.rand(count, 2, generator=generator) * 100
        size = 80 + 60 * torch.rand(count, 2, generator=generator)
        labels = torch.randint(5, (count,), generator=generator)
        targets.append(target(torch.cat([corner, corner + size], 1), labels))
    return targets


def _losses_and_gradients(images: slice, counts: tuple[int, int]) -> dict[str, Tensor]:
    head = small_vfnet(FULL)
    pyramid = [level[images] for level in random_pyramid(2)]
    losses = head.loss(head(pyramid), _targets(counts)[images], IMAGE_SIZES[images])
    torch.stack(list(losses.values())).sum().backward()
    gradients = {name: p.grad for name, p in head.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in {**losses, **gradients}.items()}


def _losses_of_rank(rank: int, folder: str) -> None:
    """Runs as rank 0 in the test's process and as rank 1 in another one."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(minutes=2)
    )
    try:
        for name, counts in RANKS.items():
            torch.save(_losses_and_gradients(slice(rank, rank + 1), counts), f"{folder}/{name} {rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_average_to_the_loss_of_the_whole_batch(tmp_path: Path) -> None:
    other = mp.get_context("spawn").Process(target=_losses_of_rank, args=(1, str(tmp_path)), daemon=True)
    other.start()
    _losses_of_rank(0, str(tmp_path))
    other.join(60)
    assert other.exitcode == 0
    for case, counts in RANKS.items():
        first, second = (torch.load(tmp_path / f"{case} {rank}.pt", weights_only=True) for rank in range(2))
        whole = _losses_and_gradients(slice(0, 2), counts)
        assert len(whole) == 3 + len(small_vfnet(FULL).state_dict())
        assert (second["loss_bbox"] == 0) == (counts[1] == 0)
        for name, expected in whole.items():
            mean = (first[name] + second[name]) / 2
            torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


# Two objects of the 64 x 96 pixels of SMALL_MAPS.
OBJECTS = target([[8, 12, 40, 52], [50, 6, 88, 30]], [0, 2])


def assert_found(found: Detections) -> None:
    """The two objects first, well placed, before anything else by far."""
    assert found.scores[1] > 0.7
    assert (found.scores[2:] < 0.6).all()
    order = found.labels[:2].argsort()
    assert found.labels[:2][order].tolist() == [0, 2]
    assert box_iou(found.boxes[:2][order], OBJECTS.boxes).diagonal().min() > 0.7


@pytest.mark.parametrize("msil", [None, FULL], ids=["plain", "msil"])
def test_learns_one_image_from_fixed_features(msil: dict | None) -> None:
    head, pyramid, sizes = small_vfnet(msil), random_pyramid(1, map_sizes=SMALL_MAPS), [(64, 96)]
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3)
    for _ in range(40):
        optimizer.zero_grad()
        torch.stack(list(head.loss(head(pyramid), [OBJECTS], sizes).values())).sum().backward()
        optimizer.step()
    with torch.no_grad():
        assert_found(head.detect(head(pyramid), sizes)[0])


@pytest.mark.slow
@pytest.mark.parametrize("msil", [None, FULL], ids=["plain", "msil"])
def test_a_whole_detector_learns_one_image(msil: dict | None) -> None:
    torch.manual_seed(0)
    detector = build_detector("vfnet", "resnet10", 3, channels=32, num_convs=1, norm_groups=8, msil=msil)
    image = torch.full((3, 64, 96), 60, dtype=torch.uint8)
    for (x1, y1, x2, y2), shade in zip(OBJECTS.boxes.int().tolist(), (230, 140), strict=True):
        image[:, y1:y2, x1:x2] = shade
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3)
    for _ in range(80):
        optimizer.zero_grad()
        torch.stack(list(detector.loss([image], [OBJECTS]).values())).sum().backward()
        optimizer.step()
    assert_found(detector.eval().predict([image])[0])
