"""The quantizer for a fusing compiler: an out-of-place autograd function that recomputes everything from its input.

No function here may return a tensor that is one of its inputs, not even through a `.to()` that does nothing: PyTorch
2.11 compiles such a function into one whose gradients are zero, and says nothing (pytorch#180642).
"""

from itertools import accumulate
from operator import mul
from typing import Any, cast

import torch
from torch import Tensor

from pyro_bbits.kernels.grid import clip_ends, exact_ratios, half_width, row_gradient, rung_weights
from pyro_bbits.ladder import BitLadder

__all__ = ["quantize_row"]


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _column(gates: Tensor, x: Tensor) -> Tensor:
    return _cast(gates, torch.float32).reshape(-1, *[1] * (x.dim() - 1))


def _scalars(row: Tensor, signed: bool, ladder: BitLadder) -> Tensor:
    """The base step, and for each rung its weight in steps of the rung.

    In a tensor of its own: the compiler would write the arithmetic behind it into the loop over all values.
    """
    step = row[0] / half_width(ladder.base, signed)
    scales = [1, *_scales(ladder), 1]  # a rung that float32 does not resolve mixes in what is clipped
    return torch.stack([step, *(w * step / scale for w, scale in zip(rung_weights(row[1:]), scales, strict=False))])


def _scales(ladder: BitLadder) -> list[int]:
    """Base steps in steps of each rung but the first that float32 can resolve."""
    return list(accumulate(exact_ratios(ladder), mul))


def _mix(v: Tensor, weights: Tensor, signed: bool, ladder: BitLadder) -> Tensor:
    """Sum over the rungs of weight times code, for values in units of the base step."""
    ratios = exact_ratios(ladder)
    t = torch.clamp(v, *clip_ends(ladder.base, signed))
    code = torch.round(t)
    mixed, residual = code * weights[0], t - code
    if len(ratios) < len(ladder.residuals):
        mixed = mixed + t * weights[-1]
    for i, ratio in enumerate(ratios):
        digit = torch.round(residual * ratio)
        residual, code = residual * ratio - digit, code * ratio + digit
        mixed = mixed + code * weights[i + 1]
    return mixed


def _terms(v: Tensor, g: Tensor, signed: bool, ladder: BitLadder) -> tuple[Tensor, list[Tensor]]:
    """Gradient of the input, and what is summed for the others: clipped share, value, residual in each rung's steps."""
    low, high = clip_ends(ladder.base, signed)
    above, below = v >= high, v <= low
    t = torch.clamp(v, low, high)
    share = torch.where(above, g, torch.where(below, -g, 0.0) if signed else 0.0)
    residual = t - torch.round(t)
    terms = [share, g * t, g * residual]
    for ratio in exact_ratios(ladder):
        residual = residual * ratio - torch.round(residual * ratio)
        terms.append(g * residual)
    return torch.where(above | below, 0.0, g), terms


def _in_base_steps(sums: list[Tensor], ladder: BitLadder) -> list[Tensor]:
    """Sums over residuals, each from units of its rung's step."""
    return [s / scale for s, scale in zip(sums, [1, *_scales(ladder)], strict=True)]


class _QuantizeRow(torch.autograd.Function):
    """Only `x`, as large as it is, is kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        row: Tensor,
        channel_gates: Tensor | None,
        signed: bool,
        ladder: BitLadder,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x, row, channel_gates)
        ctx.signed, ctx.ladder = signed, ladder
        scalars = _scalars(_cast(row, torch.float32), signed, ladder)
        mixed = _mix(_cast(x, torch.float32) / scalars[0], scalars[1:], signed, ladder)
        if channel_gates is not None:
            mixed = mixed * _column(channel_gates, x)
        return _cast(mixed, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, row, channel_gates = ctx.saved_tensors
        signed, ladder = ctx.signed, ctx.ladder
        wide, g = _cast(row, torch.float32), _cast(grad, torch.float32)
        step = _scalars(wide, signed, ladder)[0]
        dx, terms = _terms(_cast(x, torch.float32) / step, g, signed, ladder)
        dgates = None
        if channel_gates is None:
            share, _, *sums = [term.sum() for term in terms]
            sums = _in_base_steps(sums, ladder)
        else:
            dx = dx * _column(channel_gates, x)
            # a flattened view would hide the memory order from the compiler
            share, inner, *sums = [term.sum(dim=tuple(range(1, x.dim()))) if x.dim() > 1 else term for term in terms]
            sums = _in_base_steps(sums, ladder)
            noise = [w * s for w, s in zip(rung_weights(wide[1:]), sums, strict=False)]
            dgates = _cast(step * (inner - sum(noise[1:], noise[0])), channel_gates.dtype)
            z2 = _cast(channel_gates, torch.float32)
            share, *sums = [(z2 * s).sum() for s in (share, *sums)]
        missing = len(ladder.bits) - len(sums)  # what float32 does not resolve leaves no residual
        drow = row_gradient(wide, share, sums + missing * [torch.zeros_like(share)], ladder, signed)
        return _cast(dx, x.dtype), _cast(drow, row.dtype), dgates, None, None, None


def quantize_row(
    x: Tensor,
    row: Tensor,
    channel_gates: Tensor | None = None,
    *,
    signed: bool,
    ladder: BitLadder,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The body that `torch.compile` fuses, computed in float32; see :func:`pyro_bbits.kernels.quantize_row`."""
    return cast(Tensor, _QuantizeRow.apply(x, row, channel_gates, signed, ladder, dtype or x.dtype))
