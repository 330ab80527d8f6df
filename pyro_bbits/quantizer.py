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
        step = beta.float() / half_width(ladder.base, signed)
        weights = [w * step for w in _rung_weights(gates.float())]
        t = (x.float() / step).clamp_(*clip_ends(ladder.base, signed))
        code = t.round()
        residual = t - code
        out = code * weights[0]
        scale = 1
        for bits, ratio, weight in zip(ladder.residuals, ladder.ratios, weights[1:], strict=True):
            if bits > FLOAT32_BITS:
                out.addcmul_(t, weight)
                break
            fraction = residual.mul_(ratio).round()
            residual.sub_(fraction)
            code.mul_(ratio).add_(fraction)
            scale *= ratio
            out.addcmul_(code, weight / scale)
        if channel_gates is not None:
            out.mul_(_column(channel_gates.float(), x))
        return out if out.dtype == x.dtype else out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, beta, gates, channel_gates = ctx.saved_tensors
        signed, ladder = ctx.signed, ctx.ladder
        g, z, z2 = grad.float(), gates.float(), None if channel_gates is None else channel_gates.float()
        half = half_width(ladder.base, signed)
        low, high = clip_ends(ladder.base, signed)
        step = beta.float() / half
        t = x.float() / step
        above, below = t > high, t < low
        dx = (g if z2 is None else g * _column(z2, x)).masked_fill(above | below, 0.0)
        t.clamp_(low, high)

        def total(values: Tensor) -> Tensor:
            """Sum of gradient times values, kept per channel where channels have gates of their own."""
            if z2 is None:
                return torch.dot(values.reshape(-1), g.reshape(-1))
            return (values * g).flatten(1).sum(1)

        clipped = total(above.float()) - (total(below.float()) if signed else 0.0)
        inner = None if z2 is None else total(t)
        residual = t.sub_(t.round())
        sums, scale = [total(residual)], 1
        for bits, ratio in zip(ladder.residuals, ladder.ratios, strict=True):
            if bits > FLOAT32_BITS:
                sums.append(torch.zeros_like(sums[0]))
                break
            residual.mul_(ratio).sub_(residual.round())
            scale *= ratio
            sums.append(total(residual) / scale)
        noise = sum((w * s for w, s in zip(_rung_weights(z), sums, strict=True)), torch.zeros_like(sums[0]))
        dz2 = None if inner is None else (step * (inner - noise)).to(channel_gates.dtype)

        def weigh(values: Tensor) -> Tensor:
            return values if z2 is None else (z2 * values).sum()

        errors = [step * weigh(coarse - fine) for coarse, fine in pairwise(sums)]
        dbeta = weigh(clipped * high - noise) / half
        dgates = _gate_gradients(z, errors).to(gates.dtype)
        return dx.to(x.dtype), dbeta.to(beta.dtype), dgates, dz2, None, None


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

    Example:
        >>> x = torch.tensor([0.05, 0.2, 0.4, 0.77])
        >>> residual_quantize(x, torch.tensor(1.0), torch.tensor([1.0, 0, 0, 0]), signed=False)  # 4 bits
        tensor([0.0667, 0.2000, 0.4000, 0.8000])

    References:
        van Baalen et al., Bayesian Bits, 2020 (arXiv 2005.07093), section 2.1.
    """
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
    clipped = torch.where(x > high * step, high * step, torch.where(x < low * step, low * step, x))
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

    Ranges are stored as logarithms, :math:`\beta = e^\rho`, so they are positive whatever an optimizer does, and a
    learning rate means a relative change. They live in one parameter `log_range` of shape `(T,)`. Signs are part of
    the saved state.

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
        return self.log_range.exp()

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
