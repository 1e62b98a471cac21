"""VFNet's star-shaped deformable convolution: a 3x3 convolution whose taps lie on the predicted box (arXiv 2008.13367).

N images, C input and K output channels, H x W cells.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d


def star_offsets(distances: Tensor, stride: int) -> Tensor:
    """Offsets that put the nine taps on a box's corners, side middles and the point itself.

    distances (N, 4, H, W): left, top, right, bottom from each cell's point, in pixels. A tenth of the gradient
    passes through to them.
    Returns (N, 18, H, W) as torchvision.ops.deform_conv2d takes it: channel 2k is y and 2k + 1 is x of tap k, in
    cells, relative to the regular 3x3 grid; taps in row-major order.
    """
    distances = (0.9 * distances.detach() + 0.1 * distances) / stride
    left, top, right, bottom = distances.unbind(1)
    zero = torch.zeros_like(left)
    # minus the regular grid: -1, 0, 1
    rows, columns = (1 - top, zero, bottom - 1), (1 - left, zero, right - 1)
    return torch.stack([offset for row in rows for column in columns for offset in (row, column)], dim=1)


class StarConv(nn.Module):
    """A 3x3 deformable convolution, padding 1, stride 1, no bias, one offset group.

    On the CPU the nine taps of every cell are gathered as one weighted sum of four rows each and multiplied by the
    weight as one matrix; elsewhere, and in an exported graph, torchvision's operator runs. Both give the same output
    and gradients up to rounding.

    weight: (K, C, 3, 3), initialised uniformly with Kaiming's bound for ReLU (std sqrt(2 / 9C)), as in MMDetection.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3))
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def forward(self, features: Tensor, offsets: Tensor) -> Tensor:
        """features (N, C, H, W), offsets (N, 18, H, W) as of `star_offsets` -> (N, K, H, W)."""
        # An exported graph gets the operator too: ONNX has it as DeformConv.
        if features.device.type in ("cpu", "meta") and not torch.compiler.is_exporting():
            return gathered_conv(features, offsets, self.weight)
        # In float32: the operator has no bfloat16, and 8 bits would move the taps.
        return deform_conv2d(features.float(), offsets.float(), self.weight.float(), padding=(1, 1)).to(features.dtype)


def gathered_conv(features: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """torchvision.ops.deform_conv2d(features, offsets, weight, padding=1) by gathers and one matrix product.

    features (N, C, H, W), offsets (N, 18, H, W), weight (K, C, 3, 3) -> (N, K, H, W) in channels-last memory.
    """
    batch, channels, height, width = features.shape
    index, share = _corners(offsets, height, width)
    rows = features.permute(0, 2, 3, 1).reshape(-1, channels)  # (N H W, C)
    taps = F.embedding_bag(index, rows, per_sample_weights=share.to(rows.dtype), mode="sum")  # (N H W 9, C)
    matrix = weight.permute(2, 3, 1, 0).reshape(9 * channels, -1)
    out = taps.view(-1, 9 * channels) @ matrix.to(taps.dtype)
    return out.view(batch, height, width, -1).permute(0, 3, 1, 2)


def _corners(offsets: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The four cells round each tap, as rows of the flattened batch, and their bilinear shares; 0 outside the map.

    Returns index (N H W 9, 4) int64 and share (N H W 9, 4) float.
    """
    batch, device = len(offsets), offsets.device
    offsets = offsets.to(torch.promote_types(offsets.dtype, torch.float32))
    tap_y, tap_x = offsets.unflatten(1, (9, 2)).permute(2, 0, 3, 4, 1)  # (N, H, W, 9)
    steps = torch.arange(-1, 2, device=device)
    y = tap_y + torch.arange(height, device=device)[:, None, None] + steps.repeat_interleave(3)
    x = tap_x + torch.arange(width, device=device)[:, None] + steps.repeat(3)
    low_y, share_y = _two_lines(y, height)
    low_x, share_x = _two_lines(x, width)
    first = torch.arange(batch, device=device)[:, None, None, None, None] * (height * width)
    index = first[..., None] + low_y[..., :, None] * width + low_x[..., None, :]
    share = share_y[..., :, None] * share_x[..., None, :]
    return index.view(-1, 4), share.view(-1, 4)


def _two_lines(position: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """The grid lines before and after each position (...), clamped to the map, and their shares -> (..., 2) each."""
    low = position.detach().floor()
    after = position - low
    lines = torch.stack([low, low + 1], dim=-1)
    outside = (lines < 0) | (lines >= cells)
    share = torch.where(outside, 0, torch.stack([1 - after, after], dim=-1))
    # Clamped as floats: infinity and NaN have no integer. A NaN stays visible in its share.
    return lines.clamp(0, cells - 1).nan_to_num().long(), share
