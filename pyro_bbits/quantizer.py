r"""The gated residual quantizer of Bayesian Bits: a pure function, and a module that learns its ranges.

The grids of a :class:`~pyro_bbits.ladder.BitLadder` nest, so opening the gates up to `b` gives exactly the ordinary
`b`-bit quantization :math:`x_b`, and the gated sum of residuals is a mixture of them:

.. math::
    x_q = z_2 \sum_b w_b x_b, \qquad w_b = \Big(\prod_{j \le b} z_j\Big) (1 - z_{\text{next}(b)}).
"""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pyro_bbits.ladder import FLOAT32_BITS, BitLadder

__all__ = ["Quantizers", "integer_codes", "quantize_fixed", "residual_quantize", "residual_quantize_reference"]

DEFAULT_LADDER = BitLadder()

MAX_LOG_RANGE = 64.0
"""Ranges stay between e^-64 and e^64, where even the steps of a 32-bit grid are ordinary float32 numbers."""


def half_width(bits: int, signed: bool) -> float:
    """Steps between zero and the end of the range: 2^b - 1 on one side, or half of it on each."""
    return (2**bits - 1) / 2 if signed else float(2**bits - 1)


@cache
def clip_ends(bits: int, signed: bool) -> tuple[float, float]:
    """Ends of the clip in units of the base step, two float32 ulps inside the range.

    A signed range ends half a step off the grid, on a rounding tie of every rung; just inside it no code can
    overflow. This takes the place of the factor 1 - 1e-7 of the authors' code, which float32 hardly resolves.
    """
    end = np.float32(half_width(bits, signed))
    for _ in range(2):
        end = np.nextafter(end, np.float32(0))
    return (-float(end) if signed else 0.0), float(end)


def _column(gates: Tensor, x: Tensor) -> Tensor:
    return gates.reshape(-1, *[1] * (x.dim() - 1))


def _rung_weights(gates: Tensor) -> list[Tensor]:
    """Mixture weight of each rung, base first: w_b = (product of the gates up to b) (1 - next gate)."""
    weights, reached = [], gates.new_ones(())
    for z in gates.unbind():
        weights.append(reached * (1 - z))
        reached = reached * z
    return [*weights, reached]


def _gate_gradients(gates: Tensor, errors: list[Tensor]) -> Tensor:
    """Gradients of the gates from errors[i] = sum of gradient times e_b of rung i + 1, by nested sums."""
    if not errors:
        return torch.zeros_like(gates)
    inner, nested = torch.zeros_like(errors[0]), []
    for i in reversed(range(len(errors))):
        inner = errors[i] + (gates[i + 1] * inner if i + 1 < len(errors) else 0.0)
        nested.append(inner)
    reached, gradients = gates.new_ones(()), []
    for z, value in zip(gates.unbind(), reversed(nested), strict=True):
        gradients.append(reached * value)
        reached = reached * z
    return torch.stack(gradients)


CPU_CHUNK = 2**17
"""Elements worked on at a time on a CPU, so that temporaries are allocated once and stay in its cache."""


def _dense(x: Tensor, per_channel: bool) -> Tensor:
    """The tensor itself if its memory has no gaps, in either usual format of images, else a copy."""
    if x.dim() == 4 and not per_channel and x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def _ordered_like(x: Tensor, other: Tensor) -> Tensor:
    """A tensor in the memory order of a dense one of the same shape."""
    return x if x.stride() == other.stride() else torch.empty_like(other, dtype=x.dtype).copy_(x)


def _chunks(x: Tensor, per_channel: bool) -> tuple[Tensor, ...]:
    """Views of a dense tensor: runs of its memory, `(n,)`, or else whole channels, `(rows, n)`."""
    size = CPU_CHUNK if x.device.type == "cpu" else max(x.numel(), 1)
    if not per_channel:
        return torch.split(x.as_strided((x.numel(),), (1,), x.storage_offset()), size)
    rows = x.unsqueeze(-1).flatten(1)
    return torch.split(rows, max(1, size // max(rows.shape[1], 1)))


def _exact_ratios(ladder: BitLadder) -> tuple[int, ...]:
    """Step ratios of the rungs that float32 can resolve."""
    return tuple(r for bits, r in zip(ladder.residuals, ladder.ratios, strict=True) if bits <= FLOAT32_BITS)


class _Scratch:
    """Float32 buffers for the temporaries of one chunk after another."""

    def __init__(self, first: Tensor, count: int) -> None:
        self.buffers = [torch.empty_like(first, dtype=torch.float32) for _ in range(count)]

    def __call__(self, rows: int) -> list[Tensor]:
        return [buffer[:rows] for buffer in self.buffers]


class _ResidualQuantize(torch.autograd.Function):
    r"""Forward in one sweep, backward recomputed from `x` alone; all in float32 and in units of the base step.

    With :math:`t` the clipped input and :math:`\rho_b = t - x_b` the residual left at rung `b`, the output is
    :math:`z_2 s (t - \sum_b w_b \rho_b)`: the sums of gradient times residual carry every scalar gradient. Integer step
    ratios make each code exact by construction.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        beta: Tensor,
        gates: Tensor,
        channel_gates: Tensor | None,
        signed: bool,
        ladder: BitLadder,
    ) -> Tensor:
        ctx.save_for_backward(x, beta, gates, channel_gates)
        ctx.signed, ctx.ladder = signed, ladder
        per_channel = channel_gates is not None
        source = _dense(x, per_channel)
        out = torch.empty_like(source)
        step = beta.float() / half_width(ladder.base, signed)
        weights = [w * step for w in _rung_weights(gates.float())]
        parts, row = _chunks(source, per_channel), 0
        scratch = _Scratch(parts[0], 4)
        for part, target in zip(parts, _chunks(out, per_channel), strict=True):
            mixed = _mix(part, step, weights, signed, ladder, scratch(len(part)))
            if channel_gates is not None:
                mixed.mul_(channel_gates[row : row + len(part), None].float())
                row += len(part)
            target.copy_(mixed)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, beta, gates, channel_gates = ctx.saved_tensors
        signed, ladder, per_channel = ctx.signed, ctx.ladder, channel_gates is not None
        z, z2 = gates.float(), None if channel_gates is None else channel_gates.float()
        half = half_width(ladder.base, signed)
        step = beta.float() / half
        source = _dense(x, per_channel)
        grads, dx = _ordered_like(grad, source), torch.empty_like(source)
        parts, row, totals = _chunks(source, per_channel), 0, []
        scratch = _Scratch(parts[0], 4)
        for part, g, target in zip(parts, _chunks(grads, per_channel), _chunks(dx, per_channel), strict=True):
            weight = None if z2 is None else z2[row : row + len(part), None]
            totals.append(_total(part, g, target, weight, step, signed, ladder, scratch(len(part))))
            row += len(part)
        clipped, inner, *sums = torch.cat(totals, 1).unbind() if per_channel else torch.stack(totals, 1).sum(1).unbind()
        noise = sum((w * s for w, s in zip(_rung_weights(z), sums, strict=True)), torch.zeros_like(clipped))

        def weigh(values: Tensor) -> Tensor:
            return values if z2 is None else (z2 * values).sum()

        errors = [step * weigh(coarse - fine) for coarse, fine in pairwise(sums)]
        dz2 = None if channel_gates is None else (step * (inner - noise)).to(channel_gates.dtype)
        _, high = clip_ends(ladder.base, signed)
        dbeta = weigh(clipped * high - noise) / half
        return dx, dbeta.to(beta.dtype), _gate_gradients(z, errors).to(gates.dtype), dz2, None, None


def _mix(
    x: Tensor, step: Tensor, weights: list[Tensor], signed: bool, ladder: BitLadder, scratch: list[Tensor]
) -> Tensor:
    """Quantize one chunk: the sum over rungs of weight times code, in the last buffer."""
    t, code, other, mixed = scratch
    t.copy_(x).div_(step).clamp_(*clip_ends(ladder.base, signed))
    torch.round(t, out=code)
    torch.mul(code, weights[0], out=mixed)
    ratios = _exact_ratios(ladder)
    if len(ratios) < len(ladder.residuals):
        mixed.add_(torch.mul(t, weights[-1], out=other))
    residual, scale = t.sub_(code), 1
    for ratio, weight in zip(ratios, weights[1:], strict=False):
        torch.round(residual.mul_(ratio), out=other)
        residual.sub_(other)
        code.mul_(ratio).add_(other)
        scale *= ratio
        mixed.add_(torch.mul(code, weight / scale, out=other))
    return mixed


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
    t, g, other, product = scratch
    low, high = clip_ends(ladder.base, signed)
    t.copy_(x).div_(step)
    g.copy_(grad)
    above, below = t >= high, t <= low
    dx.copy_(g if weight is None else torch.mul(g, weight, out=product)).masked_fill_(above | below, 0.0)

    def total(values: Tensor) -> Tensor:
        return torch.dot(values, g) if weight is None else torch.mul(values, g, out=product).sum(1)

    other.copy_(above)
    if signed:
        other.sub_(below.float())
    sums = [total(other), total(t.clamp_(low, high))]
    residual, scale = t.sub_(torch.round(t, out=other)), 1
    sums.append(total(residual))
    for ratio in _exact_ratios(ladder):
        residual.mul_(ratio).sub_(torch.round(residual, out=other))
        scale *= ratio
        sums.append(total(residual) / scale)
    missing = len(ladder.residuals) + 3 - len(sums)  # what float32 does not resolve leaves no residual
    return torch.stack(sums + missing * [torch.zeros_like(sums[0])])


def residual_quantize(
    x: Tensor,
    beta: Tensor,
    gates: Tensor,
    channel_gates: Tensor | None = None,
    *,
    signed: bool,
    ladder: BitLadder = DEFAULT_LADDER,
) -> Tensor:
    r"""Quantize `x` by the gated sum of residuals, with straight-through gradients in closed form.

    .. math::
        x_q = z_2 (x_2 + z_4 (e_4 + z_8 (e_8 + \dots))), \qquad
        e_b = s_b \, \mathrm{round}\Big(\frac{x - x_2 - \dots - e_{b/2}}{s_b}\Big)

    with :math:`x` clipped to :math:`[-\beta, \beta]` if signed, else to :math:`[0, \beta]`, and
    :math:`s_b = (\beta - \alpha) / (2^b - 1)`. Ties round to even. Signed grids have :math:`2^b - 1` levels (2 bits are
    ternary), unsigned ones :math:`2^b`. A rung above 24 bits is the clipped input: float32 resolves no finer grid.

    Gradients, with `inside` the indicator of the open range:
    :math:`\partial x_q / \partial x = z_2 \, \mathrm{inside}`;
    :math:`\partial x_q / \partial \beta = (x_q - x) / \beta` inside and :math:`x_q / \beta` outside;
    :math:`\partial x_q / \partial z_4 = z_2 (e_4 + z_8(\dots))` and so on. Only `x` is kept for the backward pass. The
    arithmetic is float32 whatever the type of `x`, which is also the type of the result.

    Arguments:
        x: Any shape; `(C, *)` when `channel_gates` are given.
        beta: The range, a positive scalar.
        gates: `(R,)`, one value in [0, 1] for each rung above the first (`ladder.residuals`); 0 or 1 at test time.
        channel_gates: `(C,)` values of :math:`z_2`, one for each slice of dimension 0; None means 1.
        signed: Whether the range is symmetric around zero or starts there.
        ladder: The bit widths.

    Returns:
        The quantized tensor, like `x`.

    Raises:
        ValueError: If the number of gates is not that of the ladder.

    Example:
        >>> x = torch.tensor([0.05, 0.2, 0.4, 0.77])
        >>> residual_quantize(x, torch.tensor(1.0), torch.tensor([1.0, 0, 0, 0]), signed=False)  # 4 bits
        tensor([0.0667, 0.2000, 0.4000, 0.8000])

    References:
        van Baalen et al., Bayesian Bits, 2020 (arXiv 2005.07093), section 2.1.
    """
    if gates.shape != (len(ladder.residuals),):
        raise ValueError(
            f"gates must have shape ({len(ladder.residuals)},), one for each rung above the first of {ladder.bits}; "
            f"got {tuple(gates.shape)}."
        )
    return cast(Tensor, _ResidualQuantize.apply(x, beta, gates, channel_gates, signed, ladder))


def _round_through(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def residual_quantize_reference(
    x: Tensor,
    beta: Tensor,
    gates: Tensor,
    channel_gates: Tensor | None = None,
    *,
    signed: bool,
    ladder: BitLadder = DEFAULT_LADDER,
) -> Tensor:
    """The same quantizer written as the paper writes it, in plain autograd and in the type of `x`.

    It keeps every residual for the backward pass, so it is slow and large: it is the oracle that
    :func:`residual_quantize` is tested against, and open to higher derivatives and float64.
    Arguments and result are those of :func:`residual_quantize`.
    """
    low, high = clip_ends(ladder.base, signed)
    step = beta / half_width(ladder.base, signed)
    clipped = torch.where(x >= high * step, high * step, torch.where(x <= low * step, low * step, x))
    value = step * _round_through(clipped / step)
    residual, reached = clipped - value, gates.new_ones(())
    for bits, ratio, z in zip(ladder.residuals, ladder.ratios, gates.unbind(), strict=True):
        step = step / ratio
        error = residual if bits > FLOAT32_BITS else step * _round_through(residual / step)
        reached = reached * z
        value, residual = value + reached * error, residual - error
    return value if channel_gates is None else _column(channel_gates, x) * value


def _rounded_codes(x: Tensor, beta: Tensor, bits: int, signed: bool) -> Tensor:
    top = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    step = beta.float() / half_width(bits, signed)
    return (x.float() / step).round().clamp(-top if signed else 0, top)


def integer_codes(x: Tensor, beta: Tensor, bits: int, *, signed: bool) -> Tensor:
    r"""Integer codes of an ordinary quantizer at a fixed width.

    :math:`x_q = k \beta / h` with code `k`, and :math:`h = (2^b - 1) / 2` if signed, else :math:`2^b - 1`. Codes are
    clamped as integers, to :math:`\pm(2^{b-1} - 1)` or :math:`0 \dots 2^b - 1`, so that none overflows.

    Arguments:
        x: Any shape.
        beta: The range, a positive scalar.
        bits: Width in bits, at most 24.
        signed: Whether the range is symmetric around zero.

    Returns:
        int32 codes, shaped like `x`.

    Raises:
        ValueError: If `bits` is not between 2 and 24: float32 has no integer codes beyond.

    Example:
        >>> integer_codes(torch.tensor([-2.0, 0.05, 2.0]), torch.tensor(1.0), 8, signed=True)
        tensor([-127,    6,  127], dtype=torch.int32)
    """
    if not 2 <= bits <= FLOAT32_BITS:
        raise ValueError(f"integer codes exist from 2 to {FLOAT32_BITS} bits; got {bits}.")
    return _rounded_codes(x, beta, bits, signed).to(torch.int32)


def quantize_fixed(x: Tensor, beta: Tensor, bits: int, *, signed: bool) -> Tensor:
    """Ordinary uniform quantization at a fixed width: what a gated quantizer becomes once its gates are hard.

    Arguments:
        x: Any shape.
        beta: The range, a positive scalar.
        bits: Width in bits; above 24 the input is clipped to the range and not rounded.
        signed: Whether the range is symmetric around zero.

    Returns:
        The quantized tensor, like `x`; computed in float32.
    """
    if bits > FLOAT32_BITS:
        return torch.clamp(x.float(), -beta.float() if signed else torch.zeros_like(beta.float()), beta.float()).to(
            x.dtype
        )
    return (_rounded_codes(x, beta, bits, signed) * (beta.float() / half_width(bits, signed))).to(x.dtype)


class Quantizers(nn.Module):
    r"""The residual quantizers of all `T` tensors of a network: one learned range and one sign each.

    Ranges are stored as logarithms, :math:`\beta = e^\rho` with :math:`\rho` held to :math:`\pm 64`, so they are
    positive and finite whatever an optimizer does, and a learning rate means a relative change. They live in one
    parameter `log_range` of shape `(T,)`. Signs are part of the saved state.

    Arguments:
        ranges: Initial ranges, `T` positive numbers.
        signed: Whether each tensor takes negative values.
        ladder: The bit widths.

    Raises:
        ValueError: If a range is not positive and finite.
    """

    log_range: nn.Parameter

    def __init__(self, ranges: Sequence[float], signed: Sequence[bool], ladder: BitLadder = DEFAULT_LADDER) -> None:
        super().__init__()
        values = torch.tensor(list(ranges), dtype=torch.float32)
        if not (values.isfinite() & (values > 0)).all():
            raise ValueError(f"ranges must be positive and finite; got {list(ranges)}.")
        self.log_range = nn.Parameter(values.log())
        self.signed = tuple(bool(s) for s in signed)
        self.ladder = ladder

    @property
    def ranges(self) -> Tensor:
        """The ranges beta, shape `(T,)`."""
        return self.log_range.clamp(-MAX_LOG_RANGE, MAX_LOG_RANGE).exp()

    def forward(self, row: int, x: Tensor, gates: Tensor) -> Tensor:
        """Quantize tensor number `row` with its residual gates of shape `(R,)`."""
        return residual_quantize(x, self.ranges[row], gates, signed=self.signed[row], ladder=self.ladder)

    def get_extra_state(self) -> Tensor:
        """Signs as a tensor, so that a state dict holds nothing else."""
        return torch.tensor(self.signed)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the signs."""
        self.signed = tuple(bool(s) for s in state.tolist())

    def extra_repr(self) -> str:
        return f"tensors={len(self.signed)}, bits={self.ladder.bits}"
