"""Candidates beside what runs today, alone: GroupNorm + ReLU, the star convolution, levels and towers as one
convolution, the batch normalised in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from benchmarks.gpu.common import Setup, built, check, milliseconds, off, scene
from benchmarks.scenes import map_sizes
from msil.detection.preprocess import common_size, image_sizes
from msil.detection.starconv import star_offsets

Found = tuple[bool, dict[str, Any]]
LOW = torch.bfloat16


def micro(setup: Setup) -> None:
    batch, channels, sizes = setup.batch, setup.channels, map_sizes(setup.size)
    device = setup.device

    def made(*size: int, channels: int = channels) -> Tensor:
        maps = torch.randn(batch, channels, *size, device=device, dtype=LOW)
        return maps.to(memory_format=torch.channels_last).requires_grad_()

    def conv(out: int = channels, groups: int = 1) -> nn.Conv2d:
        own = nn.Conv2d(channels * groups, out, 3, padding=1, bias=False, groups=groups)
        return own.to(device, LOW, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def both(pairs: list[tuple[nn.Conv2d, Tensor]]) -> float:
        """Milliseconds of all these convolutions, forward and backward."""
        gradients = [torch.randn_like(one(maps)) for one, maps in pairs]
        inputs = [*{id(maps): maps for _, maps in pairs}.values(), *{id(one): one.weight for one, _ in pairs}.values()]
        return round(
            milliseconds(setup, lambda: torch.autograd.grad([one(maps) for one, maps in pairs], inputs, gradients)), 3
        )

    x, dy = made(*sizes[0]), made(*sizes[0]).detach()
    group_norms(setup, x, dy)
    star_convolutions(setup, x, dy)

    def levels() -> Found:
        one, maps = conv(), [made(*size) for size in sizes]
        # P3, the others side by side below it and zeros between: the same sums.
        packed = made(sizes[0][0] + 1 + sizes[1][0], max(sizes[0][1], sum(width + 1 for _, width in sizes[1:])))
        found = {"five levels, ms": both([(one, level) for level in maps]), "P3 alone": both([(one, maps[0])])}
        return True, {**found, "packed into one map": both([(one, packed)])}

    def towers() -> Found:
        wide = made(*sizes[0], channels=2 * channels)
        found = {
            "two convolutions, ms": both([(conv(), x), (conv(), x)]),
            "one of twice the width": both([(conv(2 * channels), x)]),
        }
        return True, {**found, "one of two groups": both([(conv(2 * channels, groups=2), wide)])}

    check("a tower's convolution over the levels", levels)
    check("the first convolution of both towers", towers)
    check("the batch", batches, setup)


def group_norms(setup: Setup, x: Tensor, dy: Tensor) -> None:
    """Of a convolution's bf16 output in channels_last, to what the next convolution takes; errors beside float64's."""
    channels, groups = x.shape[1], 32 if x.shape[1] >= 64 else 8
    weight, bias = (torch.randn(channels, device=setup.device).requires_grad_() for _ in range(2))

    def as_it_is(x: Tensor) -> Tensor:
        with torch.autocast(setup.device, LOW):
            y = F.relu(F.group_norm(x, groups, weight, bias))
        return y.to(LOW).contiguous(memory_format=torch.channels_last)

    def in_bf16(x: Tensor) -> Tensor:
        y = F.relu(F.group_norm(x, groups, weight.to(LOW), bias.to(LOW)))
        return y.contiguous(memory_format=torch.channels_last)

    ways: dict[str, Callable[[Tensor], Tensor]] = {"eager under autocast": as_it_is, "eager in bf16": in_bf16}
    if setup.on_gpu:
        ways["compiled"] = torch.compile(as_it_is)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    F.relu(F.group_norm(exact[0], groups, exact[1], exact[2])).backward(dy.double())

    def measured(way: Callable[[Tensor], Tensor], far: float) -> Found:
        errors = [
            off(a, b.grad) for a, b in zip(torch.autograd.grad(way(x), [x, weight, bias], dy), exact, strict=True)
        ]  # pyright: ignore
        found = forward_and_both(setup, lambda: way(x), [x, weight, bias], dy)
        return errors[0] < far, found | {"dx, dw, db off by": [f"{error:.0e}" for error in errors]}

    for name, way in ways.items():
        check(f"GroupNorm + ReLU of P3, {name}", measured, way, 1.0 if name == "eager in bf16" else 3e-2)


def star_convolutions(setup: Setup, x: Tensor, dy: Tensor) -> None:
    batch, channels, height, width = x.shape
    kernel = torch.randn(channels, channels, 3, 3, device=setup.device).mul(0.02).requires_grad_()
    distances = (8 + 60 * torch.rand(batch, 4, height, width, device=setup.device)).requires_grad_()
    inputs, truth = [x, distances, kernel], []

    def operator() -> Tensor:
        return deform_conv2d(x.float(), star_offsets(distances, 8), kernel, padding=(1, 1)).to(x.dtype)

    def sampled() -> Tensor:
        """Nine taps by grid_sample, then one product in bf16."""
        taps, place = star_offsets(distances, 8).unflatten(1, (9, 2)), torch.arange(9, device=x.device)
        ys = torch.arange(height, device=x.device)[:, None] + taps[:, :, 0] + (place // 3 - 1)[:, None, None]
        xs = torch.arange(width, device=x.device) + taps[:, :, 1] + (place % 3 - 1)[:, None, None]
        grid = torch.stack([(2 * xs + 1) / width - 1, (2 * ys + 1) / height - 1], -1).reshape(batch, -1, width, 2)
        columns = F.grid_sample(x.float(), grid, align_corners=False).to(x.dtype)
        columns = columns.view(batch, channels, 9, height * width).flatten(1, 2)
        return torch.matmul(kernel.flatten(1).to(x.dtype), columns).view(batch, -1, height, width)

    def measured(way: Callable[[], Tensor], tf32: bool) -> Found:
        torch.backends.cuda.matmul.allow_tf32 = tf32  # for the whole of it: backward runs in another thread
        try:
            out = way()
            tensors = [out.detach(), *torch.autograd.grad(out, inputs, dy)]
            truth.append(tensors)
            found = forward_and_both(setup, way, inputs, dy)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
        errors = [off(mine, other) for mine, other in zip(tensors, truth[0], strict=True)]
        return max(errors) < 5e-2, found | {"y, dx, dd, dk off by": [f"{error:.0e}" for error in errors]}

    for name, way in {"float32, as it is": operator, "TF32": operator, "grid_sample, bf16 product": sampled}.items():
        check(f"star convolution of P3, {name}", measured, way, name == "TF32")


def forward_and_both(setup: Setup, way: Callable[[], Tensor], inputs: list[Tensor], dy: Tensor) -> dict[str, Any]:
    with torch.no_grad():
        forward = milliseconds(setup, way)
    both = milliseconds(setup, lambda: torch.autograd.grad(way(), inputs, dy))
    return {"forward, ms": round(forward, 3), "and backward": round(both, 3)}


def batches(setup: Setup) -> Found:
    detector = built(setup, "fcos").to(setup.device)
    images = [image[:, :, :-11] for image in scene(setup, setup.batch).images]
    mean, std = detector.image_mean.view(3, 1, 1), detector.image_std.view(3, 1, 1)

    def in_place() -> Tensor:
        size = common_size(image_sizes(images))
        batch = torch.zeros((len(images), 3, *size), device=setup.device).to(memory_format=torch.channels_last)
        for slot, image in zip(batch, images, strict=True):
            part = slot[:, : image.shape[-2], : image.shape[-1]]
            torch.sub(image, mean, out=part)
            part.div_(std)
        return batch

    same = torch.equal(in_place(), detector.batch(images))
    found = {"as it is, ms": round(milliseconds(setup, lambda: detector.batch(images)), 3)}
    return same, found | {"normalised in place": round(milliseconds(setup, in_place), 3)}
