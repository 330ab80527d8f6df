"""The quantizer written as the paper writes it, in plain autograd: the oracle of all other bodies."""

import torch
from torch import Tensor

from pyro_bbits.kernels.grid import clip_ends, half_width
from pyro_bbits.ladder import FLOAT32_BITS, BitLadder

__all__ = ["quantize_row"]


def _round_through(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def quantize_row(
    x: Tensor,
    row: Tensor,
    channel_gates: Tensor | None = None,
    *,
    signed: bool,
    ladder: BitLadder,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The body in plain autograd; see :func:`pyro_bbits.kernels.quantize_row`.

    It keeps every residual for the backward pass, so it is slow and large, but it is open to higher derivatives, and
    computes in float64 what is given in float64.
    """
    low, high = clip_ends(ladder.base, signed)
    beta, *gates = row.to(_wide(x)).unbind()
    step = beta / half_width(ladder.base, signed)
    wide = x.to(_wide(x))
    clipped = torch.where(wide >= high * step, high * step, torch.where(wide <= low * step, low * step, wide))
    value = step * _round_through(clipped / step)
    residual, reached = clipped - value, beta.new_ones(())
    for bits, ratio, z in zip(ladder.residuals, ladder.ratios, gates, strict=True):
        step = step / ratio
        error = residual if bits > FLOAT32_BITS else step * _round_through(residual / step)
        reached = reached * z
        value, residual = value + reached * error, residual - error
    if channel_gates is not None:
        value = channel_gates.to(_wide(x)).reshape(-1, *[1] * (x.dim() - 1)) * value
    return value.to(dtype or x.dtype)
