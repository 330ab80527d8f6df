r"""The gated residual quantizer of Bayesian Bits: a pure function, and a module that learns its ranges.

The grids of a :class:`~pyro_bbits.ladder.BitLadder` nest, so opening the gates up to `b` gives exactly the ordinary
`b`-bit quantization :math:`x_b`, and the gated sum of residuals is a mixture of them:

.. math::
    x_q = z_2 \sum_b w_b x_b, \qquad w_b = \Big(\prod_{j \le b} z_j\Big) (1 - z_{\text{next}(b)}).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_bbits.kernels import quantize_row
from pyro_bbits.kernels.grid import half_width
from pyro_bbits.kernels.reference import quantize_row as quantize_row_reference
from pyro_bbits.kernels.rounding import grid_codes, round_to_grid
from pyro_bbits.ladder import FLOAT32_BITS, BitLadder

__all__ = ["Quantizers", "integer_codes", "quantize_fixed", "residual_quantize", "residual_quantize_reference"]

DEFAULT_LADDER = BitLadder()

MAX_LOG_RANGE = 64.0
"""Ranges stay between e^-64 and e^64, where even the steps of a 32-bit grid are ordinary float32 numbers."""


def _pack(x: Tensor, beta: Tensor, gates: Tensor, ladder: BitLadder) -> Tensor:
    """One row [beta, z_1, .., z_R] of a gate bank, in float64 for a float64 input and else in float32."""
    if gates.shape != (len(ladder.residuals),):
        raise ValueError(
            f"gates must have shape ({len(ladder.residuals)},), one for each rung above the first of {ladder.bits}; "
            f"got {tuple(gates.shape)}."
        )
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.cat([beta.to(kind).reshape(1), gates.to(kind)])


def residual_quantize(
    x: Tensor,
    beta: Tensor,
    gates: Tensor,
    channel_gates: Tensor | None = None,
    *,
    signed: bool,
    ladder: BitLadder = DEFAULT_LADDER,
    dtype: torch.dtype | None = None,
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
    arithmetic is float32 for every 16- or 32-bit type of `x`; a float64 input is computed in float64 by
    :func:`residual_quantize_reference`. Which code does the work is chosen by :func:`pyro_bbits.kernels.quantize_row`.

    Arguments:
        x: Any shape; `(C, *)` when `channel_gates` are given.
        beta: The range, a positive scalar.
        gates: `(R,)`, one value in [0, 1] for each rung above the first (`ladder.residuals`); 0 or 1 at test time.
        channel_gates: `(C,)` values of :math:`z_2`, one for each slice of dimension 0; None means 1.
        signed: Whether the range is symmetric around zero or starts there.
        ladder: The bit widths.
        dtype: Type of the result, that of `x` by default: a float32 weight can be written as bfloat16 straight away.

    Returns:
        The quantized tensor, shaped like `x`.

    Raises:
        TypeError: If `x` is not of floating point type.
        ValueError: If the number of gates is not that of the ladder, or that of channel gates not that of channels.

    Example:
        >>> x = torch.tensor([0.05, 0.2, 0.4, 0.77])
        >>> residual_quantize(x, torch.tensor(1.0), torch.tensor([1.0, 0, 0, 0]), signed=False)  # 4 bits
        tensor([0.0667, 0.2000, 0.4000, 0.8000])

    References:
        van Baalen et al., Bayesian Bits, 2020 (arXiv 2005.07093), section 2.1.
    """
    row = _pack(x, beta, gates, ladder)
    return quantize_row(x, row, channel_gates, signed=signed, ladder=ladder, dtype=dtype)


def residual_quantize_reference(
    x: Tensor,
    beta: Tensor,
    gates: Tensor,
    channel_gates: Tensor | None = None,
    *,
    signed: bool,
    ladder: BitLadder = DEFAULT_LADDER,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The same quantizer written as the paper writes it, in plain autograd.

    It keeps every residual for the backward pass, so it is slow and large: it is the oracle that
    :func:`residual_quantize` is tested against, and open to higher derivatives and float64.
    Arguments and result are those of :func:`residual_quantize`.
    """
    row = _pack(x, beta, gates, ladder)
    return quantize_row_reference(x, row, channel_gates, signed=signed, ladder=ladder, dtype=dtype)


def _grid(beta: Tensor, bits: int, signed: bool) -> tuple[Tensor, int, int]:
    """Step, lowest and highest code."""
    top = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    return beta.float() / half_width(bits, signed), -top if signed else 0, top


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
    return grid_codes(x, *_grid(beta, bits, signed)).to(torch.int32)


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
    return round_to_grid(x, *_grid(beta, bits, signed))


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
        # clamp, whose backward pass is one kernel in place of five
        return F.hardtanh(self.log_range, -MAX_LOG_RANGE, MAX_LOG_RANGE).exp()

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
