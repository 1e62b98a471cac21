"""The MSIL block: align, fuse and separate the features of two task branches (arXiv 2303.10411, eq. 3-6).

The paper gives no kernel sizes, norms or gate shapes; the choices made here are marked "our reading".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

APPLY = ("none", "cls", "reg", "both")


class ChannelAttention(nn.Module):
    """CAM(F) = sigmoid(MLP(Avg(F)) + MLP(Max(F))), one MLP for both poolings (eq. 6).

    The MLP is two 1x1 convolutions without bias, C -> C / reduction -> C, with a ReLU between (CBAM's form).
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False), nn.ReLU(), nn.Conv2d(hidden, channels, 1, bias=False)
        )

    def forward(self, features: Tensor) -> Tensor:
        """features (N, C, H, W) -> weights (N, C, 1, 1) in (0, 1)."""
        average = features.mean(dim=(2, 3), keepdim=True)
        maximum = features.amax(dim=(2, 3), keepdim=True)
        return torch.sigmoid(self.mlp(average) + self.mlp(maximum))


class Separation(nn.Module):
    """One branch's gate of eq. 5: sigmoid(f_dec(CAM(F_fusion) * F_fusion)).

    f_dec is one convolution, C -> C, so the gate weighs every channel at every pixel (our reading).
    """

    def __init__(self, channels: int, kernel_size: int, reduction: int) -> None:
        super().__init__()
        self.cam = ChannelAttention(channels, reduction)
        self.dec = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2)

    def forward(self, fusion: Tensor) -> Tensor:
        """fusion (N, C, H, W) -> gate (N, C, H, W) in (0, 1)."""
        return torch.sigmoid(self.dec(self.cam(fusion) * fusion))


class MSIL(nn.Module):
    """Lets the classification and the regression branch of a detection head learn from each other.

    Sits after the two towers and before every predictor; one set of weights serves all pyramid levels.

    align (eq. 3): F_x-align = f_conv(f_enc2(F_x + f_enc(F_x))) for x in {cls, reg}, with shared weights. f_enc and
        f_enc2 are conv + GroupNorm + ReLU, f_conv is a 1x1 convolution (our reading). False: F_x-align = F_x and
        none of the three exists (Table 1, row 1).
    fuse (eq. 4): F_fusion = f_fusion(Conc(F_reg-align, F_cls-align)), conv 2C -> C + GroupNorm + ReLU.
    separate (eq. 5): class = F_cls * sigmoid(f_dec(CAM(F_fusion) * F_fusion)), box alike with weights of its own; the
        gate multiplies the unaligned tower output. False: both gates are sigmoid(F_fusion) (Table 1, row 2).
    apply: which branch gets its gated feature, the other passes unchanged: "none", "cls", "reg" or "both" (Table 2).
        "none" has no parameter and returns its inputs.

    Parameters that a setting does not use do not exist. With separation the gates start near 0.5, for f_dec starts near
    zero; without it they lie in [0.5, 1), for F_fusion ends in a ReLU. init_gate: where they start instead, see
    `open_gates`.

    channels: C of both feature maps. kernel_size: 3 or 1, of f_enc, f_enc2, f_fusion and f_dec.
    reduction: C over the hidden width of the channel attention, whose width is at least 1.
    GroupNorm has 32 groups, or the greatest common divisor of 32 and C; half of that if each would hold one channel
        (C = 32 and below), since a group of one channel normalises a 1x1 map to nothing.

    Raises ValueError or TypeError for a switch outside its values.
    """

    def __init__(
        self,
        channels: int,
        *,
        align: bool = True,
        separate: bool = True,
        apply: str = "both",
        kernel_size: int = 3,
        reduction: int = 16,
        init_gate: float | None = None,
    ) -> None:
        super().__init__()
        _check_switches(channels, align, separate, apply, kernel_size, reduction)
        self.channels = channels
        # Not `self.apply`: that is nn.Module's own method.
        self.to_cls = apply in ("cls", "both")
        self.to_reg = apply in ("reg", "both")
        self.align = align
        self.separate = separate
        self.init_gate = init_gate
        if apply == "none":
            return
        if align:
            self.enc = _conv_norm_relu(channels, channels, kernel_size)
            self.enc2 = _conv_norm_relu(channels, channels, kernel_size)
            self.conv = nn.Conv2d(channels, channels, 1)
        self.fusion = _conv_norm_relu(2 * channels, channels, kernel_size)
        if separate:
            if self.to_cls:
                self.separate_cls = Separation(channels, kernel_size, reduction)
            if self.to_reg:
                self.separate_reg = Separation(channels, kernel_size, reduction)
        self._init_weights()
        if init_gate is not None:
            self.open_gates(init_gate)

    def forward(self, cls_feat: Tensor, reg_feat: Tensor) -> tuple[Tensor, Tensor]:
        """cls_feat, reg_feat (N, C, H, W) of one pyramid level -> the same two shapes."""
        if not (self.to_cls or self.to_reg):
            return cls_feat, reg_feat
        fusion = self.fuse(*self.aligned(cls_feat, reg_feat))
        if self.to_cls:
            cls_feat = cls_feat * (self.separate_cls(fusion) if self.separate else torch.sigmoid(fusion))
        if self.to_reg:
            reg_feat = reg_feat * (self.separate_reg(fusion) if self.separate else torch.sigmoid(fusion))
        return cls_feat, reg_feat

    def aligned(self, cls_feat: Tensor, reg_feat: Tensor) -> tuple[Tensor, Tensor]:
        """F_cls-align and F_reg-align of eq. 3, (N, C, H, W) each."""
        if not self.align:
            return cls_feat, reg_feat
        # The weights are shared and GroupNorm works sample by sample, so both branches go through as one batch.
        both = torch.cat([cls_feat, reg_feat])
        cls_align, reg_align = self.conv(self.enc2(both + self.enc(both))).chunk(2)
        return cls_align, reg_align

    def fuse(self, cls_align: Tensor, reg_align: Tensor) -> Tensor:
        """F_fusion of eq. 4, (N, C, H, W): the regression branch comes first in the concatenation."""
        return self.fusion(torch.cat([reg_align, cls_align], dim=1))

    @torch.no_grad()
    def open_gates(self, value: float | None = None) -> None:
        """Start with gates close to `value`, in (0, 1), or in (0.5, 1) without separation, where 0.5 would be the
        ReLU's end without a gradient; by default init_gate, and 0.99 where that is None.

        A gate multiplies its branch's feature, so near 1 the detector behind it is as it would be without the block;
        the gate's own gradient is value * (1 - value) / 0.25 of what it is at 0.5. With separation the biases of f_dec
        are set (its small weights move the gate by some thousandths); without it the GroupNorm in front of the gate
        starts with weight 0, and the gate is exactly `value`.

        Raises ValueError for a value outside the range.
        """
        if value is None:
            value = 0.99 if self.init_gate is None else self.init_gate
        if not (0 if self.separate else 0.5) < value < 1:
            low = "0" if self.separate else "0.5"
            raise ValueError(f"the gates' value must be above {low} and below 1, not {value}.")
        bias = math.log(value / (1 - value))
        if not self.separate:
            norm = self.fusion[1]
            assert isinstance(norm, nn.GroupNorm)
            nn.init.zeros_(norm.weight)
            nn.init.constant_(norm.bias, bias)
        for module in self.modules():
            if isinstance(module, Separation) and module.dec.bias is not None:
                nn.init.constant_(module.dec.bias, bias)

    def _init_weights(self) -> None:
        """N(0, 0.01) and zero biases, as in the heads around the block; the attention's MLP keeps torch's own."""
        attention = [m for cam in self.modules() if isinstance(cam, ChannelAttention) for m in cam.modules()]
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module not in attention:
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


class Deeper(nn.Module):
    """More convolutions a tower in the place of MSIL: what its price buys without any interaction.

    convs: a tower. Behind `convs` more of a plain head's layers; 4 cost what MSIL costs with kernels of 3 x 3 (it has
    8 and two of 1 x 1 in all), 1 a quarter of that.
    """

    def __init__(self, channels: int, *, convs: int = 1) -> None:
        super().__init__()
        self.cls, self.reg = (
            nn.Sequential(*(_conv_norm_relu(channels, channels, 3) for _ in range(convs))) for _ in range(2)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)

    def forward(self, cls_feat: Tensor, reg_feat: Tensor) -> tuple[Tensor, Tensor]:
        """cls_feat, reg_feat (N, C, H, W) -> the same two shapes."""
        return self.cls(cls_feat), self.reg(reg_feat)


def _conv_norm_relu(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    # No bias: the norm that follows would remove it.
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
        nn.GroupNorm(_norm_groups(out_channels), out_channels),
        nn.ReLU(),
    )


def _norm_groups(channels: int) -> int:
    groups = math.gcd(32, channels)
    return groups if groups < channels else max(groups // 2, 1)


def _check_switches(channels: int, align: bool, separate: bool, apply: str, kernel_size: int, reduction: int) -> None:
    for name, value in (("align", align), ("separate", separate)):
        if not isinstance(value, bool):
            # A string such as "false" is true in Python and would train the wrong row of a table.
            raise TypeError(f"MSIL {name} must be True or False, not {value!r}.")
    if apply not in APPLY:
        raise ValueError(f"MSIL apply must be one of {', '.join(APPLY)}, not {apply!r}.")
    if isinstance(kernel_size, bool) or kernel_size not in (1, 3):
        raise ValueError(f"MSIL kernel_size must be 1 or 3, not {kernel_size!r}.")
    if channels < 1 or reduction < 1:
        raise ValueError(f"MSIL channels and reduction must be positive, not {channels} and {reduction}.")
