"""The quantizer for eager mode: an autograd function that works in place, chunk by chunk, on any device."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_bbits.kernels.grid import clip_ends, exact_ratios, half_width, row_gradient, rung_weights
from pyro_bbits.kernels.layout import dense, empty_like, ordered_like
from pyro_bbits.ladder import BitLadder

__all__ = ["quantize_row"]

_gradient_inside = torch.ops.aten.hardtanh_backward.grad_input
"""The gradient where a value lies between two ends, 0 elsewhere; in one pass."""

CPU_CHUNK = 2**19
"""Elements worked on at a time on a CPU, so that temporaries are allocated once and stay in its cache."""


def _chunks(x: Tensor, per_channel: bool) -> tuple[Tensor, ...]:
    """Views of a dense tensor: runs of its memory, `(n,)`, or else whole channels, `(rows, n)`."""
    size = CPU_CHUNK if x.device.type == "cpu" else max(x.numel(), 1)
    if not per_channel:
        return torch.split(x.as_strided((x.numel(),), (1,), x.storage_offset()), size)
    length = x.numel() // max(len(x), 1)
    rows = x.as_strided((len(x), length), (length, 1), x.storage_offset())
    return torch.split(rows, max(1, size // max(length, 1)))


class _Scratch:
    """Float32 buffers for the temporaries of one chunk after another."""

    def __init__(self, first: Tensor, count: int) -> None:
        self.buffers = [torch.empty_like(first, dtype=torch.float32) for _ in range(count)]

    def __call__(self, rows: int) -> list[Tensor]:
        return [buffer[:rows] for buffer in self.buffers]


class _QuantizeRow(torch.autograd.Function):
    """Forward in one sweep, backward recomputed from `x` alone; all in float32 and in units of the base step."""

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
        per_channel = channel_gates is not None
        source, out = dense(x, per_channel), empty_like(x, per_channel, dtype)
        step = row[0].float() / half_width(ladder.base, signed)
        weights = [w * step for w in rung_weights(row[1:].float())]
        parts, first = _chunks(source, per_channel), 0
        scratch = _Scratch(parts[0], 4)
        for part, target in zip(parts, _chunks(out, per_channel), strict=True):
            t, code, other, spare = scratch(len(part))
            mixed = target if target.dtype == torch.float32 else spare
            _mix(part, step, weights, signed, ladder, (t, code, other, mixed))
            if channel_gates is not None:
                mixed.mul_(channel_gates[first : first + len(part), None].float())
                first += len(part)
            if mixed is spare:
                target.copy_(mixed)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, row, channel_gates = ctx.saved_tensors
        signed, ladder, per_channel = ctx.signed, ctx.ladder, channel_gates is not None
        wide, z2 = row.float(), None if channel_gates is None else channel_gates.float()
        step = wide[0] / half_width(ladder.base, signed)
        source, dx = dense(x, per_channel), empty_like(x, per_channel, x.dtype)
        grads = _chunks(ordered_like(grad, source), per_channel)
        parts, first, totals = _chunks(source, per_channel), 0, []
        scratch = _Scratch(parts[0], 4)
        for part, g, target in zip(parts, grads, _chunks(dx, per_channel), strict=True):
            weight = None if z2 is None else z2[first : first + len(part), None]
            totals.append(_total(part, g, target, weight, step, signed, ladder, scratch(len(part))))
            first += len(part)
        if z2 is None:
            share, _, *sums = torch.stack(totals, 1).sum(1).unbind()
            return dx, row_gradient(wide, share, sums, ladder, signed).to(row.dtype), None, None, None, None
        share, inner, *sums = torch.cat(totals, 1).unbind()
        noise = sum((w * s for w, s in zip(rung_weights(wide[1:]), sums, strict=True)), torch.zeros_like(share))
        dgates = (step * (inner - noise)).to(channel_gates.dtype)
        share, *sums = [torch.dot(z2, s) for s in (share, *sums)]
        return dx, row_gradient(wide, share, sums, ladder, signed).to(row.dtype), dgates, None, None, None


def _in_steps(x: Tensor, step: Tensor, out: Tensor) -> Tensor:
    """A chunk in units of the base step; narrow types are widened first."""
    return torch.div(x, step, out=out) if x.dtype == out.dtype else out.copy_(x).div_(step)


def _mix(
    x: Tensor, step: Tensor, weights: list[Tensor], signed: bool, ladder: BitLadder, scratch: tuple[Tensor, ...]
) -> None:
    """Quantize one chunk: the sum over rungs of weight times code, in the last buffer."""
    t, code, other, mixed = scratch
    _in_steps(x, step, t).clamp_(*clip_ends(ladder.base, signed))
    torch.round(t, out=code)
    torch.mul(code, weights[0], out=mixed)
    ratios = exact_ratios(ladder)
    if len(ratios) < len(ladder.residuals):
        mixed.add_(torch.mul(t, weights[-1], out=other))
    residual, scale = t.sub_(code), 1
    for ratio, weight in zip(ratios, weights[1:], strict=False):
        torch.round(residual.mul_(ratio), out=other)
        residual.sub_(other)
        torch.add(other, code, alpha=ratio, out=code)
        scale *= ratio
        mixed.add_(torch.mul(code, weight / scale, out=other))  # rounded twice, as compiled code does


def _total(
    x: Tensor,
    grad: Tensor,
    dx: Tensor,
    weight: Tensor | None,
    step: Tensor,
    signed: bool,
    ladder: BitLadder,
    scratch: list[Tensor],
) -> Tensor:
    """Fill in the gradient of one chunk and add up gradient times everything that scalar gradients need.

    Returns:
        `(R + 3,)` sums, or `(R + 3, rows)` where channels have gates: clipped share, input, residual at each rung.
    """
    t, spare, other, product = scratch
    low, high = clip_ends(ladder.base, signed)
    g = grad if grad.dtype == spare.dtype else spare.copy_(grad)

    def total(values: Tensor, factors: Tensor) -> Tensor:
        return torch.dot(values, factors) if weight is None else torch.mul(values, factors, out=product).sum(1)

    inside = _gradient_inside(g, _in_steps(x, step, t), low, high, grad_input=other)
    dx.copy_(inside if weight is None else torch.mul(inside, weight, out=product))
    outside = torch.sub(g, inside, out=inside)
    t.clamp_(low, high)  # one end of the range or the other wherever the gradient is outside
    sums = [total(outside, t) / high, total(t, g)]
    residual, scale = t.sub_(torch.round(t, out=other)), 1
    sums.append(total(residual, g))
    for ratio in exact_ratios(ladder):
        residual.mul_(ratio).sub_(torch.round(residual, out=other))
        scale *= ratio
        sums.append(total(residual, g) / scale)
    missing = len(ladder.residuals) + 3 - len(sums)  # what float32 does not resolve leaves no residual
    return torch.stack(sums + missing * [torch.zeros_like(sums[0])])


def quantize_row(
    x: Tensor,
    row: Tensor,
    channel_gates: Tensor | None = None,
    *,
    signed: bool,
    ladder: BitLadder,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The body for eager mode, computed in float32; see :func:`pyro_bbits.kernels.quantize_row`."""
    return cast(Tensor, _QuantizeRow.apply(x, row, channel_gates, signed, ladder, dtype or x.dtype))
