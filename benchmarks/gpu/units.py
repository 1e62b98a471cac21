"""Operators and nets on the device beside the reference's files and beside the CPU."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.common import Setup, autocast, built, check, exact, now, off, raise_scores, scene
from conftest import Golden  # of tests/, as the next two
from detection import cases
from detection.reference import FORMS, reference_head
from msil.data.transforms import Augmentation, transform_image
from msil.detection import ResNetOptions, TimmOptions
from msil.detection.assign import ground_truth
from msil.detection.heads import HEADS
from msil.detection.postprocess import detections_from_candidates
from msil.detection.starconv import StarConv, gathered_conv, star_offsets
from msil.detection.weights import from_mmdet

GOLDEN = Golden()
Found = tuple[bool, Any]


def units(setup: Setup) -> None:
    exact()
    for name, epoch in FORMS:
        check(f"golden losses, {name}{epoch}", golden_losses, setup, name, epoch)
        check(f"golden detections, {name}", golden_detections, setup, name)
    for head in HEADS:
        check(f"assignment, {head}", assigned, setup, head)
        check(f"predict, {head}", predicted, setup, head)
        for kernel_size in (None, 3) if head in ("fcos", "vfnet") else (None,):
            for mixed in (False, True):
                name = f"a step, {head}{'' if kernel_size is None else ' with MSIL'}, {'bf16' if mixed else 'float32'}"
                check(name, stepped, setup, head, kernel_size, mixed)
    for timm in ("convnext_atto", "resnet18d"):
        check(f"a step, {timm} of timm", stepped, setup, "fcos", None, False, TimmOptions(timm))
    check("star convolution", star, setup, False)
    check("star convolution on a side stream", star, setup, True)
    check("NMS, 100 detections", nms, setup, 100)
    check("NMS, more than there are", nms, setup, 2000)
    check("pixels of device_transforms", transformed, setup)
    for kind in ("SGD", "AdamW"):
        check(f"fused {kind} leaves a step out", left_out, setup, kind)


def golden_losses(setup: Setup, name: str, epoch: str) -> Found:
    loss = gradient = 0.0
    for case in "ABC":
        head = reference_head(GOLDEN, name, epoch).to(setup.device)
        pyramid = [level.to(setup.device).requires_grad_() for level in cases.reference_pyramid(GOLDEN)]
        losses = head.loss(head(pyramid), cases.reference_targets(GOLDEN, case), cases.IMAGE_SIZES)
        torch.stack(list(losses.values())).sum().backward()
        expected = GOLDEN(name, f"{case}{epoch}/")
        for term, value in losses.items():
            theirs = [expected[key] for key in expected if key == f"loss/{term}" or key.startswith(f"loss/{term}/")]
            loss = max(loss, off(value, torch.stack(theirs).sum())) if torch.stack(theirs).any() else loss
        gradients = from_mmdet({k.removeprefix("grad/"): g for k, g in expected.items() if k.startswith("grad/")})
        own: dict[str, Any] = dict(head.named_parameters())
        gradient = max([gradient, *(off(own[key].grad, value) for key, value in gradients.items())])
    return loss < 1e-4 and gradient < 1e-3, f"losses to {loss:.0e}, gradients to {gradient:.0e}"


def golden_detections(setup: Setup, name: str) -> Found:
    head = reference_head(GOLDEN, name).to(setup.device)
    limits = {"score_thresh": 0.05, "nms_thresh": 0.6, "topk_candidates": 1000, "detections_per_img": 100}
    with torch.no_grad():
        pyramid = [level.to(setup.device) for level in cases.reference_pyramid(GOLDEN)]
        detections = head.detect(head(pyramid), cases.IMAGE_SIZES, **limits)
    same, boxes = [], 0.0
    for image, found in enumerate(detections):
        expected = GOLDEN(name, f"pred/a/{image}/")
        same.append(torch.equal(found.labels.cpu(), expected["labels"]))
        boxes = max(boxes, float((found.boxes.cpu() - expected["boxes"]).abs().max())) if same[-1] else boxes
    return all(same) and boxes < 0.05, f"labels the same: {same}, boxes to {boxes:.0e} px"


def assigned(setup: Setup, name: str) -> Found:
    """0, 7, 60 and 300 boxes, at the size of a training."""
    head = HEADS[name](80, 32, num_convs=1, **({} if name == "retinanet" else {"norm_groups": 4}))
    height, width = setup.size
    maps, generator = cases.map_sizes_of(height, width), torch.Generator().manual_seed(0)
    wrong, positive = [], []
    for boxes in (0, 7, 60, 300):
        targets, sizes = (
            cases.random_targets([boxes, boxes // 2], height, width, 80),
            [(height, width), (height - 40,) * 2],
        )
        count = len(head.priors(maps, torch.device("cpu")).centers)
        logits = torch.randn(2, count, 80, generator=generator) - 3
        predicted = cases.random_boxes(random.Random(0), 200, height, width).repeat(-(-count // 200), 1)
        found = []
        for device in (torch.device("cpu"), torch.device(setup.device)):
            truth = ground_truth(targets, sizes, device)
            mine = (logits.to(device), predicted[:count].expand(2, -1, -1).to(device)) if name == "tood" else ()
            found.append(head.assigner(head.priors(maps, device), truth, *mine).index.cpu())
        wrong.append(int((found[0] != found[1]).sum()))
        positive.append(int((found[0] >= 0).sum()))
    return max(wrong) <= (0 if name == "fcos" else 4), f"{wrong} priors differ, {positive} positive"


def star(setup: Setup, aside: bool) -> Found:
    """aside: on another stream than the current one, with work queued before that a kernel elsewhere would overtake."""
    torch.manual_seed(0)
    conv, on_gpu = StarConv(64, 64), setup.on_gpu
    features, distances = torch.randn(2, 64, 50, 84), 40 * torch.rand(2, 4, 50, 84)
    inputs = [tensor.clone().requires_grad_() for tensor in (features, distances, conv.weight.detach())]
    expected = gathered_conv(inputs[0], star_offsets(inputs[1], 8), inputs[2])
    expected.square().sum().backward()
    own = conv.to(setup.device)
    mine = [tensor.to(setup.device).requires_grad_() for tensor in (features, distances)]

    def go() -> Tensor:
        busy, late = torch.randn(2048 if on_gpu else 8, 2048 if on_gpu else 8, device=setup.device), mine[0] * 1.0
        for _ in range(20):
            late = late + 0 * (busy @ busy).sum()
        found = own(late, star_offsets(mine[1], 8))
        found.square().sum().backward()
        return found

    if aside and on_gpu:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = go()
    else:
        found = go()
    now()
    pairs = zip(
        (found, mine[0].grad, mine[1].grad, own.weight.grad), (expected, *(i.grad for i in inputs)), strict=True
    )
    errors = [off(a, b) for a, b in pairs]  # pyright: ignore[reportArgumentType]
    return max(errors) < 1e-4, f"y, dx, dd, dw to {[f'{error:.0e}' for error in errors]}"


def nms(setup: Setup, limit: int) -> Found:
    generator = torch.Generator().manual_seed(1)
    corner, side = (
        600 * torch.rand(3, 3000, 2, generator=generator),
        120 * torch.rand(3, 3000, 2, generator=generator),
    )
    tensors = (torch.cat([corner, corner + side + 10], -1), torch.rand(3, 3000, generator=generator),
               torch.randint(5, (3, 3000), generator=generator))  # fmt: skip
    found = []
    for device in ("cpu", setup.device):
        mine = [tensor.to(device) for tensor in tensors]
        found.append(detections_from_candidates(*mine, [(640, 640)] * 3, nms_thresh=0.6, detections_per_img=limit))
    pairs = list(zip(*found, strict=True))
    same = all(torch.equal(a.scores, b.scores.cpu()) and torch.equal(a.labels, b.labels.cpu()) for a, b in pairs)
    return same, f"{[len(a.scores) for a, _ in pairs]} detections"


def predicted(setup: Setup, head: str) -> Found:
    """The CPU's detections are found among the device's; some scores lie at the threshold."""
    detector = built(setup, head, backbone=ResNetOptions("resnet10"))
    detector.min_size, detector.max_size = 96, 160
    torch.nn.init.normal_(detector.head.cls_logits.weight, std=0.05)  # pyright: ignore
    raise_scores(detector.head)
    images = [torch.randint(256, (3, h, w), dtype=torch.uint8) for h, w in ((120, 160), (150, 100), (120, 160))]
    theirs = detector.predict(images)
    ours = detector.to(setup.device).predict([image.to(setup.device) for image in images])
    shares = []
    for a, b in zip(theirs, ours, strict=True):
        far = (a.boxes[:, None] - b.boxes.cpu()[None]).abs().amax(-1) + 1e3 * (
            a.labels[:, None] != b.labels.cpu()[None]
        )
        shares.append(round(float((far.amin(1) < 1).float().mean()), 3))
    return min(shares) > 0.9, f"shares found: {shares} of {[len(a.scores) for a in theirs]}"


def stepped(setup: Setup, head: str, kernel_size: int | None, mixed: bool, backbone: Any = None) -> Found:
    """Losses and gradients of a step from uint8 images, beside the CPU's in float32."""
    one, theirs = scene(setup, 2, setup.small), built(setup, head, kernel_size, backbone or ResNetOptions("resnet10"))
    theirs.lay_out(channels_last=True)
    ours = copy.deepcopy(theirs).to(setup.device)
    expected = theirs.loss([image.cpu() for image in one.images], one.targets)
    with autocast(setup, mixed):
        losses = ours.loss(one.images, one.targets)
    for found in (expected, losses):
        torch.stack(list(found.values())).sum().backward()
    loss = max(off(losses[name], expected[name]) for name in expected)
    pairs = [(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True) if p.requires_grad]
    missing = [p for p, _ in pairs if p.grad is None]
    norms = [torch.stack([n.grad.float().norm().cpu() for n in side if n.grad is not None]) for side in zip(*pairs)]  # noqa: B905
    gradient = off(norms[0].norm(), norms[1].norm())
    odd = sum(p.grad.stride() != p.stride() for p, _ in pairs if p.grad is not None and 1 not in p.shape)
    far = 5e-2 if mixed else 2e-3
    said = f"losses to {loss:.0e}, norm of gradients to {gradient:.0e}; {odd} gradients in another layout"
    return loss < far and gradient < 2 * far and not missing, said


def transformed(setup: Setup) -> Found:
    image, worst = torch.randint(256, (480, 640, 3), dtype=torch.uint8).permute(2, 0, 1), 0
    for augmentation in (Augmentation(800, 1067, True), Augmentation(300, 400, False)):
        mine = transform_image(image.to(setup.device), augmentation).cpu().int()
        worst = max(worst, int((transform_image(image, augmentation).int() - mine).abs().max()))
    return worst <= 1, f"pixels differ by {worst} at most"


def left_out(setup: Setup, kind: str) -> Found:
    """By found_inf, as FiniteSteps does."""
    weight = torch.nn.Parameter(torch.ones(64, 8, 3, 3, device=setup.device))
    more = {"momentum": 0.9} if kind == "SGD" else {}
    optimizer = getattr(torch.optim, kind)([weight], lr=0.1, fused=True, **more)
    values = []
    for gradient, bad in ((1.0, 0.0), (float("nan"), 1.0)):
        weight.grad, optimizer.found_inf = torch.full_like(weight, gradient), torch.tensor(bad, device=setup.device)
        optimizer.step()
        values.append(weight.detach().clone())
    return bool((values[0] < 1).all()) and torch.equal(*values), f"moved to {float(values[0].mean()):.3f}, then left"
