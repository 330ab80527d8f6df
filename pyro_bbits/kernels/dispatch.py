"""The choice of a body: by the tensor's type and place, and by whether a compiler is watching."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from pyro_bbits.kernels import compiled, eager, reference
from pyro_bbits.kernels.availability import triton_runs
from pyro_bbits.kernels.grid import TRITON_BASE_BITS
from pyro_bbits.ladder import BitLadder

__all__ = ["Body", "check", "choose_body", "forced_body", "quantize_row", "use_body"]

Body = Literal["reference", "eager", "compiled", "triton"]

Quantize = Callable[..., Tensor]

_BODIES: dict[str, Quantize] = {
    "reference": reference.quantize_row,
    "compiled": compiled.quantize_row,
    "eager": eager.quantize_row,
}

_forced: list[Body] = []


@contextmanager
def use_body(body: Body) -> Iterator[None]:
    """Inside, every quantizer runs with this body: for tests and measurements.

    Example:
        >>> x, row = torch.tensor([0.2, 0.8]), torch.tensor([1.0, 0.5])
        >>> with use_body("reference"):
        ...     quantize_row(x, row, signed=False, ladder=BitLadder((2, 4)))
        tensor([0.2667, 0.7333])
    """
    _forced.append(body)
    try:
        yield
    finally:
        _forced.pop()


def forced_body() -> Body | None:
    """The body that :func:`use_body` asks for now."""
    return _forced[-1] if _forced else None


def choose_body(x: Tensor, ladder: BitLadder) -> Body:
    """Which body quantizes a tensor: `reference` in float64, `triton` on a GPU, else `compiled` or `eager`."""
    if _forced:
        return _forced[-1]
    if x.dtype == torch.float64:
        return "reference"
    fits = x.is_cuda and x.element_size() in (2, 4) and ladder.base <= TRITON_BASE_BITS
    if fits and triton_runs(x.device):
        return "triton"
    return "compiled" if torch.compiler.is_compiling() else "eager"


def check(x: Tensor, row: Tensor, channel_gates: Tensor | None, ladder: BitLadder) -> None:
    """Raise if types or shapes do not fit: TypeError or ValueError, as :func:`quantize_row` says."""
    if not x.is_floating_point():
        raise TypeError(f"x must be of floating point type; got {x.dtype}: convert it first.")
    if row.shape != (len(ladder.bits),):
        raise ValueError(
            f"row must have shape ({len(ladder.bits)},), the range and one gate for each rung above the first of "
            f"{ladder.bits}; got {tuple(row.shape)}."
        )
    if channel_gates is not None and channel_gates.shape != x.shape[:1]:
        raise ValueError(
            "channel_gates must have shape (C,), one for each slice of dimension 0 of x; "
            f"got {tuple(channel_gates.shape)} for x of shape {tuple(x.shape)}."
        )


def quantize_row(
    x: Tensor,
    row: Tensor,
    channel_gates: Tensor | None = None,
    *,
    signed: bool,
    ladder: BitLadder,
    dtype: torch.dtype | None = None,
    spend_grad: bool = False,
) -> Tensor:
    r"""Quantize a tensor by the gated sum of residuals, with its range and gates as one row of a gate bank.

    The function of :func:`pyro_bbits.residual_quantize`, whose range and gates arrive, and whose gradients leave, as
    one tensor: :math:`[\beta, z_1, \dots, z_R]`. All bodies agree; none waits for the device to decide by a value, so
    that all can be captured in a CUDA graph.

    ============  ===========================================================================================
    body          chosen for
    ============  ===========================================================================================
    `reference`   float64
    `triton`      16- and 32-bit floats on a GPU with Triton, if the base of the ladder has at most 16 bits
    `compiled`    anything else inside `torch.compile`
    `eager`       anything else
    ============  ===========================================================================================

    Arguments:
        x: Any shape; `(C, *)` when `channel_gates` are given.
        row: `(1 + R,)`, the range and one gate in [0, 1] for each rung above the first.
        channel_gates: `(C,)` values of :math:`z_2`, one for each slice of dimension 0; None means 1.
        signed: Whether the range is symmetric around zero or starts there.
        ladder: The bit widths.
        dtype: Type of the result, that of `x` by default. Its gradient arrives in this type too.
        spend_grad: Whether the memory of the gradient that arrives may take that of `x`: where products alone read the
            result, whose gradients, or the sum of these, nobody else sees. On a GPU it saves as much as a weight in the
            backward pass, if both are of one type.

    Returns:
        The quantized tensor, shaped like `x`.

    Raises:
        TypeError: If `x` is not of floating point type.
        ValueError: If the shape of `row` or `channel_gates` does not fit.

    References:
        van Baalen et al., Bayesian Bits, 2020 (arXiv 2005.07093), section 2.1.
    """
    check(x, row, channel_gates, ladder)
    body = choose_body(x, ladder)
    if body == "triton":
        from pyro_bbits.kernels import triton_body  # imports Triton, which need not be installed

        return triton_body.quantize_row(
            x, row, channel_gates, signed=signed, ladder=ladder, dtype=dtype, spend_grad=spend_grad
        )
    return _BODIES[body](x, row, channel_gates, signed=signed, ladder=ladder, dtype=dtype)
