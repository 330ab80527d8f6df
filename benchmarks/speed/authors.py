r"""The published method's arithmetic, written plainly in PyTorch as a reader of the paper would write it.

It is what the speed tables compare with, and nothing else: a module for each tensor, the clip made of two ReLUs, a
chain of residuals in ordinary autograd, gates drawn one by one with a decision on the host for each, and a penalty
for each tensor. It is written from the mathematics; no code of the authors is in it.

Random numbers are drawn on the device, which is faster than what the authors published.

References:
    van Baalen et al., Bayesian Bits, 2020 (arXiv 2005.07093), sections 2.1 to 2.3.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PublishedQuantizer", "published_quantize"]

BITS = (2, 4, 8, 16, 32)
SHRINK = 1 - 1e-7
TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1
SHIFT = TEMPERATURE * math.log(-LOW / HIGH)
NEVER_AGAIN = -2.0
"""A gate whose logit is lower is not drawn any more, and neither are the finer ones."""


class _Round(torch.autograd.Function):
    """Rounding with the straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _round(x: Tensor) -> Tensor:
    rounded: Tensor = _Round.apply(x)
    return rounded


def published_quantize(
    x: Tensor, beta: Tensor, gates: Sequence[Tensor | float], channel_gates: Tensor | None = None, *, signed: bool
) -> Tensor:
    """The gated sum of residuals, step by step; a residual is computed only while its gate and all before are above 0.

    Arguments:
        x: Any shape; `(C, *)` when `channel_gates` are given.
        beta: The range, `(1,)`.
        gates: `z4`, `z8`, `z16`, `z32`, each `(1,)` or the number 0.
        channel_gates: `z2`, `(C,)`; None means 1.
        signed: Whether the range is symmetric around zero.
    """
    high = SHRINK * beta
    low = -high if signed else torch.zeros_like(high)
    clipped = high - F.relu(high - low - F.relu(x - low))
    step = (2 * beta if signed else beta) / 3
    value = step * _round(clipped / step)
    reached, errors = value, []
    for bits, gate in zip(BITS, gates, strict=False):
        if not gate > 0:  # the host waits for the device here
            break
        step = step / (2**bits + 1)
        error = step * _round((clipped - reached) / step)
        reached = reached + error
        errors.append((gate, error))
    inner: Tensor | float = 0.0
    for gate, error in reversed(errors):
        inner = gate * (error + inner)
    value = value + inner
    return value if channel_gates is None else channel_gates.reshape(-1, *[1] * (x.dim() - 1)) * value


def _draw(logits: Tensor) -> Tensor:
    """Hard concrete gates."""
    u = torch.rand_like(logits).clamp_min(1e-7)
    s = torch.sigmoid((u.log() - (-u).log1p() + logits) / TEMPERATURE)
    return torch.clamp(s * (HIGH - LOW) + LOW, 0, 1)


class PublishedQuantizer(nn.Module):
    """Range, gates and penalty of one tensor.

    Arguments:
        beta: Initial range.
        signed: Whether it is symmetric around zero.
        macs: What the tensor's bits are priced with.
        channels: Number of channel gates; 0 for none.
    """

    def __init__(self, beta: float, signed: bool, macs: float, channels: int = 0) -> None:
        super().__init__()
        self.signed, self.macs = signed, macs
        self.beta = nn.Parameter(torch.tensor([beta]))
        self.logits = nn.ParameterList(nn.Parameter(torch.tensor([6.0])) for _ in BITS[1:])
        self.channel_logits = nn.Parameter(torch.full((channels,), 6.0)) if channels else None

    def forward(self, x: Tensor) -> Tensor:
        channel_gates = None if self.channel_logits is None else _draw(self.channel_logits)
        gates: list[Tensor] = []
        for logit in self.logits:
            if logit <= NEVER_AGAIN:  # and here
                break
            gates.append(_draw(logit))
        return published_quantize(x, self.beta, gates, channel_gates, signed=self.signed).to(x.dtype)

    def penalty(self) -> Tensor:
        """Expected price of the open gates, averaged over the channels."""
        if self.channel_logits is None:
            reach = total = torch.ones_like(self.beta)
        else:
            reach = torch.sigmoid(self.channel_logits - SHIFT)
            total = BITS[0] * self.macs * reach
        for bits, logit in zip(BITS[1:], self.logits, strict=True):
            reach = reach * torch.sigmoid(logit - SHIFT)
            total = total + bits * self.macs * reach
        return total.mean()
