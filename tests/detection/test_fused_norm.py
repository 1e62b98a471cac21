"""The fused GroupNorm and ReLU: in Triton's interpreter against float64, and where it is chosen."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from msil.detection import fused_norm
from msil.detection.fused_norm import group_norm_relu

# Triton's own functions, too, must be imported under TRITON_INTERPRET, so in a process of their own.
PROGRAM = """
import torch
from msil.detection.fused_norm import fused_norm_relu

def check(dtype, shape, groups, limit):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    x = (draw(*shape) * 2 + 0.5).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias, dy = draw(shape[1]), draw(shape[1]), draw(*shape).to(dtype)
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = torch.relu(torch.nn.functional.group_norm(exact[0], groups, *exact[1:]))
    expected.backward(dy.double())
    own = [t.requires_grad_() for t in (x, weight, bias)]
    found, *_ = fused_norm_relu(*own, groups, 1e-5)
    assert found.dtype == dtype and found.stride() == x.stride()
    found.backward(dy)  # contiguous
    for ours, theirs in ((found, expected), *((o.grad, e.grad) for o, e in zip(own, exact))):
        error = (ours.detach().double() - theirs.detach()).abs().max() / theirs.abs().max()
        assert error < limit, (dtype, shape, float(error))

for shape, groups in (((2, 32, 7, 9), 8), ((1, 64, 1, 1), 8), ((2, 16, 20, 17), 4)):
    check(torch.float32, shape, groups, 1e-6)
    check(torch.bfloat16, shape, groups, 0.01)
x = torch.randn(2, 16, 3, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
torch.library.opcheck(fused_norm_relu, (x, torch.ones(16).requires_grad_(), torch.zeros(16), 4, 1e-5))
print("checked")
"""


def test_values_and_gradients_are_those_of_float64() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    assert (done.returncode, done.stdout) == (0, "checked\n"), done.stderr


@pytest.mark.parametrize("enabled", [False, True])
def test_a_gpu_gets_the_operator_if_it_is_enabled_and_fits(monkeypatch: pytest.MonkeyPatch, enabled: bool) -> None:
    monkeypatch.setattr(fused_norm, "ENABLED", enabled)
    operator, taken = fused_norm.fused_norm_relu, []
    monkeypatch.setattr(fused_norm, "fused_norm_relu", lambda *given: taken.append(given[0]) or operator(*given))

    def fused(channels: int, dtype: torch.dtype, device: str, layout: torch.memory_format) -> bool:
        x = torch.zeros(2, channels, 3, 5, dtype=dtype, device=device).contiguous(memory_format=layout)
        del taken[:]
        found = group_norm_relu(x, nn.GroupNorm(4, channels, device=device, dtype=dtype))
        assert found.shape == x.shape and found.dtype == dtype
        return bool(taken)

    last, first, bf16 = torch.channels_last, torch.contiguous_format, torch.bfloat16
    with FakeTensorMode(), torch.no_grad():
        assert fused(64, bf16, "cuda", last) is enabled and fused(256, torch.float32, "cuda", last) is enabled
        assert not fused(64, bf16, "cpu", last) and not fused(64, bf16, "cuda", first)
        assert not fused(96, bf16, "cuda", last) and not fused(64, torch.float64, "cuda", last)
